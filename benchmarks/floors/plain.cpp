// The floor of an in-place all-reduce (sum) on one host when each rank's data lie in private
// memory, as an ordinary tensor's do. Two ways, MODE:
//   staged  every rank copies the others' shards of its buffer to shared slots, chunk by chunk, and
//   copies
//           the results back; slots alternate, so that one barrier a chunk is enough
//   readv   the owner of a shard reads it from the others' memory (process_vm_readv), and they read
//   the
//           result from the owner's: one copy each way, made by the kernel
#include <sys/prctl.h>
#include <sys/uio.h>

#include "host.h"

namespace {

using floors::Shard;

// The number of ranks is known to the compiler: its loop over sources costs nothing then.
template <int kRanks>
class Staged {
 public:
  // Of one rank's data for one other, in elements. Half or twice as much changes nothing; much
  // less: more barriers; much more: the slots leave the second-level cache.
  static constexpr size_t kArea = size_t{32} << 10;

  Staged(floors::Host& host, size_t count, float* mine)
      : host_(host),
        count_(count),
        mine_(mine),
        slots_(floors::map_floats(2 * kRanks * kRanks * kArea, true)) {}

  // A chunk has an area for every rank to reduce. Between two barriers chunk c is reduced, c + 1
  // goes in and c - 1 comes out.
  void run() const {
    const size_t chunks = (count_ + kRanks * kArea - 1) / (kRanks * kArea);
    copy_in(0);
    host_.barrier();
    for (size_t chunk = 0; chunk < chunks; ++chunk) {
      reduce(chunk);
      if (chunk + 1 < chunks) copy_in(chunk + 1);
      host_.barrier();
      copy_out(chunk);
    }
  }

 private:
  Shard area(size_t chunk, size_t owner) const {
    const size_t begin = chunk * kRanks * kArea, length = std::min(kRanks * kArea, count_ - begin);
    const Shard part = floors::shard_of(length, static_cast<int>(owner), kRanks);
    return {begin + part.begin, begin + part.end};
  }
  // Data from one rank for another; the slot that an owner has for itself takes its results.
  float* slot(size_t chunk, size_t from, size_t owner) const {
    return slots_ + (((chunk % 2) * kRanks + from) * kRanks + owner) * kArea;
  }
  size_t me() const { return static_cast<size_t>(host_.rank()); }

  void copy_in(size_t chunk) const {
    for (size_t owner = 0; owner < kRanks; ++owner)
      if (const Shard s = area(chunk, owner); owner != me())
        std::copy(mine_ + s.begin, mine_ + s.end, slot(chunk, me(), owner));
  }
  void reduce(size_t chunk) const {
    const Shard s = area(chunk, me());
    float *from[kRanks], *own = mine_ + s.begin, *result = slot(chunk, me(), me());
    for (size_t r = 0; r < kRanks; ++r) from[r] = r == me() ? own : slot(chunk, r, me());
    for (size_t i = 0; i < s.end - s.begin; i += floors::kElemsPerVector) {
      floors::Vector sum = floors::vector_at(from[0] + i);
      for (size_t r = 1; r < kRanks; ++r) sum += floors::vector_at(from[r] + i);
      floors::vector_at(own + i) = sum;
      floors::vector_at(result + i) = sum;
    }
  }
  void copy_out(size_t chunk) const {
    for (size_t owner = 0; owner < kRanks; ++owner)
      if (const Shard s = area(chunk, owner); owner != me())
        std::copy_n(slot(chunk, owner, owner), s.end - s.begin, mine_ + s.begin);
  }

  floors::Host& host_;
  size_t count_;
  float *mine_, *slots_;
};

class Readv {
 public:
  static constexpr size_t kChunk =
      size_t{32} << 10;  // elements; with its source inside the second-level cache

  // The buffers lie at the same address in all ranks: the mapping was made before the fork.
  Readv(floors::Host& host, size_t count, float* mine)
      : host_(host), count_(count), mine_(mine), chunk_(kChunk) {
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY);  // siblings may read, where Yama asks for permission
    host_.barrier();
  }

  void run() {
    host_.barrier();  // all data are there
    const Shard mine = floors::shard_of(count_, host_.rank(), host_.ranks());
    for (size_t begin = mine.begin; begin < mine.end; begin += kChunk)
      add_others(begin, std::min(mine.end, begin + kChunk));
    host_.barrier();  // all results are there
    for (int owner = 0; owner < host_.ranks(); ++owner)
      if (const Shard s = floors::shard_of(count_, owner, host_.ranks()); owner != host_.rank())
        read(owner, mine_ + s.begin, mine_ + s.begin, s.end - s.begin);
    host_.barrier();  // nobody reads any more
  }

 private:
  // In place; whole numbers make any order of summation exact.
  void add_others(size_t begin, size_t end) {
    for (int r = 0; r < host_.ranks(); ++r) {
      if (r == host_.rank()) continue;
      read(r, chunk_.data(), mine_ + begin, end - begin);
      for (size_t i = begin; i < end; ++i) mine_[i] += chunk_[i - begin];
    }
  }
  void read(int from, float* to, float* at, size_t count) const {
    for (size_t done = 0, bytes = count * sizeof(float); done < bytes;) {
      const iovec here{reinterpret_cast<char*>(to) + done, bytes - done};
      const iovec there{reinterpret_cast<char*>(at) + done, bytes - done};
      const ssize_t got = process_vm_readv(host_.pid_of(from), &here, 1, &there, 1, 0);
      if (got <= 0) floors::fail("process_vm_readv");
      done += static_cast<size_t>(got);
    }
  }

  floors::Host& host_;
  size_t count_;
  float* mine_;
  std::vector<float> chunk_;
};

template <typename Way>
int serve(floors::Host& host, const floors::Arguments& args, float* mine, Way way) {
  const floors::Pattern pattern(host.ranks());
  return host.serve(
      args.evict_bytes, [&](long round) { pattern.write(mine, args.count, host.rank(), round); },
      [&](int) { way.run(); },
      [&](long round) {
        return pattern.count_wrong(args.count, round,
                                   [&](size_t i, float sum) { return mine[i] == sum; });
      });
}

template <int kRanks>
int serve_staged(floors::Host& host, const floors::Arguments& args, float* mine) {
  const Staged<kRanks> staged(host, args.count, mine);
  host.fork_ranks();
  return serve(host, args, mine, staged);
}

}  // namespace

int main(int argc, char** argv) {
  const floors::Arguments args(argc, argv, "staged, readv");
  floors::Host host(args.ranks);
  float* mine = floors::map_floats(args.count, false);
  if (args.is("staged")) {
    if (args.ranks == 2) return serve_staged<2>(host, args, mine);
    if (args.ranks == 3) return serve_staged<3>(host, args, mine);
    return serve_staged<4>(host, args, mine);
  }
  if (args.is("readv")) {
    host.fork_ranks();
    return serve(host, args, mine, Readv(host, args.count, mine));
  }
  return args.refuse();
}
