// A collective as a value: who exchanges which chunks with whom, step by step. Pure; the group room
// makes it move bytes.
#pragma once

#include <vector>

namespace pyar {

// Chunks [begin, end) of the buffer. `reduce`: the receiver combines them with its own (true) or
// overwrites its own (false); sender and receiver state the same.
struct Transfer {
  int peer;
  int begin, end;
  bool reduce;
  bool operator==(const Transfer&) const = default;
};

// All transfers of a step may be in flight together: sends read what was there before the step, and
// a chunk that is overwritten is not sent in the same step. Contributions to a chunk are combined
// in rank order, the receiver's own among them.
struct Step {
  std::vector<Transfer> sends, recvs;
  bool operator==(const Step&) const = default;
};

// What one rank does. All ranks have the same number of steps, and a send meets its receive in the
// same step; a rank that has nothing to do in a step has an empty one.
struct Schedule {
  int rank, size, num_chunks;
  std::vector<Step> steps;
  bool operator==(const Schedule&) const = default;
};

inline Transfer add(int peer, int begin, int end) { return {peer, begin, end, true}; }
inline Transfer add(int peer, int chunk) { return add(peer, chunk, chunk + 1); }
inline Transfer copy(int peer, int begin, int end) { return {peer, begin, end, false}; }
inline Transfer copy(int peer, int chunk) { return copy(peer, chunk, chunk + 1); }

// A reduce-scatter played backwards, sends and receives swapped and overwriting, is an all-gather:
// what each rank gave away as a partial sum comes back to it as a result.
Schedule mirrored(const Schedule& reduce_scatter);

// Both on the same chunks, one after the other.
Schedule then(Schedule first, const Schedule& second);

}  // namespace pyar
