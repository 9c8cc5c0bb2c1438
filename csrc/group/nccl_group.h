// The ranks' devices through NCCL, under the control of their hosts. A collective returns when it
// has been launched: the host never waits for the device. It is all ranks' error, with the names of
// those who caused it, if they disagree (found before anything is launched), or if one dies, falls
// silent or leaves (NCCL is aborted then). Sums are rounded as NCCL rounds them, in the order that
// it chooses; min and max treat NaN as it does.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "device/cuda_runtime.h"
#include "group/control.h"
#include "group/group.h"
#include "group/nccl_lane.h"
#include "group/nccl_library.h"
#include "group/nccl_watch.h"

namespace pyar {

// Device memory that NCCL knows beforehand: its fast paths reach it without copies. Local, but all
// ranks must use such memory in a collective, at equal offsets, for those paths to be taken.
class NcclBuffer {
 public:
  NcclBuffer(const NcclBuffer&) = delete;
  NcclBuffer& operator=(const NcclBuffer&) = delete;
  ~NcclBuffer();

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  friend class NcclGroup;
  NcclBuffer(const NcclLibrary& nccl, std::shared_ptr<NcclWatch> watch, size_t bytes);

  const NcclLibrary& nccl_;
  const std::shared_ptr<NcclWatch> watch_;
  void* data_ = nullptr;
  void* registration_ = nullptr;
  size_t bytes_;
  OwnerProcess owner_;
};

// Where the process may fork, it is never destroyed in a child (DeleteByOwner, as the engine is).
class NcclGroup final : public Group {
 public:
  // Multiplies device memory of a floating dtype, in stream order: the second half of an average.
  using Scale = std::function<void(Span data, double factor, CudaStream stream)>;

  // Collective over the ranks of `control`, which serves this group alone. `device`: of this rank.
  // Without `scale` there are no averages. `call` counts as the one before the first. Throws what a
  // collective throws, and Error when NCCL or the device refuses.
  NcclGroup(const NcclLibrary& nccl, const CudaRuntime& cuda, int device,
            std::shared_ptr<Control> control, Scale scale, const Call& call);
  ~NcclGroup() override;

  int rank() const override { return control_.rank(); }
  int size() const override { return control_.size(); }

  // Of device memory. call.ready is waited for, on the device.
  void all_reduce(Span data, Op op, const Call& call) override;
  void reduce_scatter(Span output, ConstSpan input, Op op, const Call& call) override;
  void all_gather(Span output, ConstSpan input, const Call& call) override;
  void broadcast(Span data, int root, const Call& call) override;
  // Of the hosts; devices go on.
  void barrier(const Call& call) override;

  static constexpr int kNoColor = -1;
  // Collective: ranks of equal color form a group, ranked as in the `control` that serves it. Those
  // of kNoColor take part too, give no control and get no group. Error if NCCL cannot split. Both
  // groups run on one stream: what either launches comes after all that both have launched before.
  // They are used by one thread at a time, in the same order on all ranks, and fail together; each
  // may be gone before the other.
  std::unique_ptr<NcclGroup> split(int color, std::shared_ptr<Control> control, const Call& call);

  // What comes later on `stream` waits for all collectives launched so far, or up to a call. Throws
  // the first error.
  void wait_on(CudaStream stream, uint64_t sequence = std::numeric_limits<uint64_t>::max()) {
    watch_->hold_back(stream, sequence);
  }
  // True once the devices have passed all collectives up to a call.
  bool has_ended(uint64_t sequence) { return watch_->has_ended(sequence); }
  // Where all collectives run, in their order: what is queued here comes after those launched so
  // far.
  CudaStream stream() const { return lane_->stream(); }
  const std::shared_ptr<NcclLane>& lane() const { return lane_; }
  // When the latest collective began and ended on the device. For the thread that launches.
  const FlightMarks& latest() const { return latest_; }
  // Throws the first error, if one has happened.
  void check() const { watch_->check(); }
  // Not zero once results are worthless: what is queued behind them reads it first, and does
  // nothing. Pinned host memory, valid as long as the group.
  const std::atomic<uint32_t>& aborted() const { return watch_->aborted(); }

  // Throws UsageError if this group cannot do the op: averages without a Scale.
  void check_op(Op op) const;
  // In stream order.
  void scale(Span data, double factor);

  // Memory of this device that may outlive the group. Error if NCCL gives none.
  std::shared_ptr<NcclBuffer> allocate(size_t bytes);

  void fail(const Error& cause) override;
  // From any thread: what waits on the host ends with an Error.
  void interrupt() { control_.interrupt(); }
  // At most a second; idempotent; nothing in a forked child. What is in flight may end in the first
  // half of it.
  void leave();

 private:
  struct Parts {
    const NcclLibrary& nccl;
    const CudaRuntime& cuda;
    int device;
    std::shared_ptr<Control> control;
    Scale scale;
    std::shared_ptr<NcclLane> lane;  // null: a new one
  };
  // What NCCL may write to after the function that asks for a communicator has returned.
  struct Wanted {
    NcclConfig config;
    NcclComm comm = nullptr;
  };

  explicit NcclGroup(Parts parts);  // without a communicator
  void connect(const Call& call);
  // Agrees with the other ranks, then launches what `begin` begins; for averages, scales `result`.
  void launch(const char* function, const Fingerprint& mine, const Call& call,
              const std::function<int(NcclComm)>& begin, Span result = {}, Op op = Op::kSum);

  const Parts parts_;
  const NcclLibrary& nccl_ = parts_.nccl;
  Control& control_ = *parts_.control;
  const OwnerProcess owner_;
  std::shared_ptr<NcclLane> lane_;
  FlightMarks latest_;
  std::unique_ptr<Wanted> wanted_;
  std::shared_ptr<NcclWatch> watch_;
  std::thread watching_;
  std::mutex leaving_;  // two threads may close at once; only one can join
};

}  // namespace pyar
