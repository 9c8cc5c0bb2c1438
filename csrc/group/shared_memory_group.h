// The ranks of one host. Vocabulary: a *part* is one rank's share of a symmetric buffer; a *turn*
// is one half of the staging slots, halves alternate; a *shard* is what one rank reduces; a *phase*
// is one barrier among all ranks.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "base/cpu.h"
#include "base/error.h"
#include "group/control.h"
#include "group/fingerprint.h"
#include "group/group.h"
#include "kernels/kernels.h"
#include "memory/futex.h"
#include "memory/host_link.h"
#include "memory/segment.h"

namespace pyar {

// One part per rank in one segment (or, with one_copy, a single part that all ranks see). Lives as
// long as anyone holds it, also after the group is gone. Forked children keep the mapping: they may
// read what tensors of theirs lie in it, and unmap it with the last of them.
struct SymmetricBuffer {
  Segment segment;
  uint64_t id;         // equal on all ranks: the how-manyeth allocation
  size_t part_stride;  // bytes between the parts of neighbouring ranks; 0 with one_copy
  size_t part_bytes;
  bool is_one_copy() const { return part_stride == 0; }
  char* part(int rank) const { return segment.data() + static_cast<size_t>(rank) * part_stride; }
};

struct Range {
  size_t begin, end;
  size_t count() const { return end - begin; }
};

// What `rank` reduces: whole cache lines, so that no line is written by two ranks.
Range shard_of(size_t num_elems, int rank, int size, size_t elem_bytes);

// One parameter inside a bucket.
struct UpdatePiece {
  size_t begin, num_elems;  // in elements of the bucket
  SgdScalars scalars;
  double
      idle_scale;  // of its momentum when no rank has used it: an absorbed one may change its unit
};

// What one rank found in the elements that it reduced; `elem` counts from the buffer's begin.
struct Found {
  NonFinite nonfinite;
  double sum_squares = 0;
};

// A bucket whose reduction and SGD step are one pass. gradients and weights are symmetric buffers
// of the same layout: the pieces, then (gradients only) one flag per piece from element flags_begin
// on, non-zero where this rank has used the parameter. A piece that no rank has used keeps weight
// and momentum. Weights may be in a one_copy buffer.
struct BucketUpdate {
  Span gradients, weights;
  void* momentum;  // in a one_copy buffer, layout of the pieces; null: none
  std::span<const UpdatePiece> pieces;
  size_t flags_begin;
  bool is_reduced;  // all_reduce has been here; only the update is left
  double scale;     // of the sum of the ranks' gradients, or of the reduced ones
};

class SharedMemoryGroup final : public Group, public Control {
 public:
  // Collective over the ranks of the link.
  SharedMemoryGroup(HostLink link, const Deadline& deadline);

  int rank() const override { return link_.local_rank(); }
  int size() const override { return link_.local_size(); }
  const std::vector<int>& global_ranks() const override { return link_.global_ranks(); }
  int global_rank() const { return link_.global_ranks()[static_cast<size_t>(rank())]; }

  void all_reduce(Span data, Op op, const Call& call) override;
  void reduce_scatter(Span output, ConstSpan input, Op op, const Call& call) override;
  void all_gather(Span output, ConstSpan input, const Call& call) override;
  void broadcast(Span data, int root, const Call& call) override;
  void barrier(const Call& call) override;
  void fail(const Error& cause) override { report(cause); }

  std::shared_ptr<SymmetricBuffer> allocate(size_t num_elems, DType dtype, bool one_copy,
                                            const Call& call);
  // Gradients are zero afterwards; the weights are equal on all ranks.
  void update(const BucketUpdate& bucket, const Call& call);

  void agree(const Fingerprint& mine, const Call& call) override;
  void tell(Progress mine) override;
  Progress progress_of(int rank) const override;
  void check_peers(uint64_t number, std::string_view during) const override;
  void report(const Error& error) override;
  void interrupt() override { interrupted_.store(true, std::memory_order_relaxed); }
  bool is_interrupted() const override { return interrupted_.load(std::memory_order_relaxed); }
  void leave() override;

 private:
  // What a rank tells the others when it arrives at a call.
  struct alignas(kCacheLine) Notice {
    Fingerprint fingerprint;
    uint64_t buffer_id, offset_bytes;  // where in a symmetric buffer its data lie; id 0: nowhere
    double arrived_s;
  };
  static constexpr size_t kSubjectBytes = 256;
  // All that a rank writes for the others to read, except data.
  struct alignas(4096) Page {
    PhaseFlag flag;
    // Alternate: a rank may announce its next call while a slow one still reads the notice of this
    // one; it cannot be two calls ahead, since each call waits for all.
    Notice notices[2];
    char subjects[2][kSubjectBytes];  // of the notices, for messages; cut short, with its end
    // What this rank found in its shard. Written between the two phases of a collective, read by
    // all after the second; not written again before all have announced the next.
    Found found;
    std::atomic<uint32_t> has_left;
    std::atomic<uint64_t> begun, ended;  // Progress of its device
    // The first error of this rank, for those who wait for it; valid once its flag says `failed`.
    ErrorReport report;
  };
  struct Location {
    std::shared_ptr<SymmetricBuffer> buffer;  // null: an ordinary tensor
    size_t offset_bytes = 0;
    char* part(int rank) const { return buffer->part(rank) + offset_bytes; }
  };

  // Staging per rank and turn. Smaller: more barriers per byte; larger: falls out of the
  // second-level cache. 25 MiB on Zen 3: 2 ranks 3.4, 3.3, 3.4, 3.9 ms with 64, 128, 512, 1024 KiB;
  // 4 ranks on 2 cores 11.3, 11.0, 10.8, 9.7.
  static constexpr size_t kTurnBytes = size_t{512} << 10;

  Page& page(int rank) const { return reinterpret_cast<Page*>(control_.data())[rank]; }
  char* slot(int rank, unsigned turn) const;
  Location locate(const void* data, size_t bytes);
  // Where the ranks' data lie. kSame: at one place of one symmetric buffer, usable without staging.
  enum class Places { kOrdinary, kMixed, kSame };
  // Announces the call, waits until all have announced theirs, compares.
  Places arrive(const Fingerprint& mine, const Location& where, const Call& call);
  // A barrier: what any rank wrote before is visible to all ranks after.
  void next_phase(const Call& call) { next_phase(call, call.present_patience); }
  void next_phase(const Call& call, Patience patience);
  // Goes to a core with fewer ranks, if there is one.
  void spread_out();
  std::string subject_of(int rank, size_t parity) const;
  void all_reduce_in_place(const Location& where, Span data, Op op, Findings* findings);
  void all_reduce_staged(Span data, Op op, const Call& call);
  void reduce_slots(unsigned turn, Range elems, DType dtype, Op op, void* to, Findings* findings);
  void update_piece(const BucketUpdate& bucket, size_t i, Range mine, const Location& gradients,
                    const Location& weights, NonFinite& nonfinite);
  // Sums up what the ranks have found, in their order.
  void conclude(Findings& findings, std::span<const Found> by_rank) const;
  // The same for all ranks' pages, after the phase that ends a collective of num_elems.
  void collect(Findings& findings, size_t num_elems) const;
  void watch(uint32_t phase, bool late, const Call& call);
  // Throws if a rank has reported an error, or has ended or left although it is_needed(rank).
  template <typename Needed>
  void check_ranks(std::string_view during, Needed is_needed) const;
  // Runs a collective; if it fails, the others learn why.
  template <typename Body>
  void guarded(Body body);

  // Ranks that yield to each other never sleep, and the kernel leaves three on one core beside one
  // on the next for tenths of a second: 4 ranks on 2 cores, 4 KiB: 29 us instead of 14. Not more
  // often than this: somebody else's work may be why they are there.
  static constexpr double kMoveIntervalS = 0.01;

  HostLink link_;
  Segment control_;         // pages of all ranks, then slots of all ranks
  uint64_t num_calls_ = 0;  // of this group; sequence numbers may repeat, see Call::part_of
  uint32_t phase_ = 0;
  unsigned turn_ = 0;
  const std::vector<int> cpus_ = allowed_cpus();
  double moved_s_ = 0;
  Fingerprint current_{};  // for messages
  std::atomic<bool> interrupted_{false};
  std::mutex report_mutex_;
  std::mutex buffers_mutex_;
  std::vector<std::weak_ptr<SymmetricBuffer>> buffers_;
  uint64_t num_allocated_ = 0;
};

template <typename Body>
void SharedMemoryGroup::guarded(Body body) {
  try {
    body();
  } catch (const Error& error) {
    report(error);
    throw;
  } catch (const std::exception& error) {
    report(Error(error.what()));
    throw;
  }
}

}  // namespace pyar
