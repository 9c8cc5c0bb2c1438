// A collective on real bytes: the one interface the engine sees.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "base/dtype.h"
#include "base/error.h"
#include "base/wait.h"

namespace pyar {

struct Span {
  void* data;
  size_t num_elems;
  DType dtype;
  size_t bytes() const { return num_elems * size_of(dtype); }
};

struct ConstSpan {
  const void* data;
  size_t num_elems;
  DType dtype;
  ConstSpan(const void* data, size_t num_elems, DType dtype)
      : data(data), num_elems(num_elems), dtype(dtype) {}
  ConstSpan(const Span& span) : ConstSpan(span.data, span.num_elems, span.dtype) {}
  size_t bytes() const { return num_elems * size_of(dtype); }
};

// What a reduction of floats notices on its way; equal on all ranks afterwards.
struct Findings {
  size_t num_elems = 0;          // in: look at the first num_elems only
  bool norm_is_wanted = false;   // in
  double sum_squares = 0;        // of the result, if wanted; in the order of the shards
  bool has_nonfinite = false;    // the result holds inf or NaN
  size_t nonfinite_elem = 0;     // the first of them
  int nonfinite_rank = kNoRank;  // whose contribution it came with; kNoRank: only the sum overflows
  static constexpr int kNoRank = -1;
};

struct Fingerprint;

// What a call carries besides its arguments.
struct Call {
  uint64_t sequence;  // the how-manyeth collective of this communicator, from 1; equal on all ranks
  uint64_t layout;    // hash of what the caller believes the buffer holds; 0 when it has no opinion
  Deadline deadline;
  Patience patience;          // until all ranks have come
  Patience present_patience;  // afterwards, while they do their shares
  double* arrivals_s =
      nullptr;  // [size] or null: where to write when each rank arrived (clock of now_s())
  Findings* findings =
      nullptr;  // or null; only SharedMemoryGroup looks, in all_reduce in place and update
  std::string_view subject = {};  // what the data are, for messages; SharedMemoryGroup tells peers
  // The collective of a larger group of which this call is a part, or null. Ranks then compare, and
  // messages name, that one.
  const Fingerprint* part_of = nullptr;
  // Of device memory, a CudaEvent, or null: what the caller has queued before, and comes first.
  void* ready = nullptr;
};

// Ranks 0..size-1 call the same methods in the same order, one at a time. Every method throws
// PeerError, TimeoutError or MismatchError (base/error.h), after which the group must not be used
// again. Arguments have been checked by the engine; buffers of the two-buffer methods do not
// overlap.
class Group {
 public:
  virtual ~Group() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;

  virtual void all_reduce(Span data, Op op, const Call& call) = 0;
  // input holds `size` shards of output.num_elems; rank r gets the reduction of shard r.
  virtual void reduce_scatter(Span output, ConstSpan input, Op op, const Call& call) = 0;
  // output receives the ranks' inputs in rank order.
  virtual void all_gather(Span output, ConstSpan input, const Call& call) = 0;
  virtual void broadcast(Span data, int root, const Call& call) = 0;
  virtual void barrier(const Call& call) = 0;

  // Ends the group for all its ranks, who get `cause` from what they wait for now or call later; if
  // another cause came first, that one counts. For errors met outside this group. By default nobody
  // is told: the deadlines end the others' waits.
  virtual void fail([[maybe_unused]] const Error& cause) {}
};

}  // namespace pyar
