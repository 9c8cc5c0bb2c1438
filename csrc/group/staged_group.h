// Device memory over a group of host memory: the door to wires that NCCL does not know.
#pragma once

#include <array>
#include <memory>

#include "group/group.h"
#include "group/nccl_group.h"
#include "group/outgrown.h"

namespace pyar {

// Beside an NcclGroup, on its lane: what both do to a device's memory happens in the order of their
// calls. A collective costs what NCCL's do not: two copies over the bus, and the host waits for the
// device, until the call's deadline, before the inner group may see the data. Its errors are the
// inner group's, and those that the lane has met by then; one that the lane meets later reaches the
// inner group with fail(), which whoever owns both groups calls.
class StagedGroup final : public Group {
 public:
  // `beside` must live during all calls.
  StagedGroup(std::unique_ptr<Group> inner, NcclGroup& beside);
  ~StagedGroup() override;

  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }

  // Of device memory. call.ready is waited for.
  void all_reduce(Span data, Op op, const Call& call) override;
  void reduce_scatter(Span output, ConstSpan input, Op op, const Call& call) override;
  void all_gather(Span output, ConstSpan input, const Call& call) override;
  void broadcast(Span data, int root, const Call& call) override;
  // Of the hosts; devices go on.
  void barrier(const Call& call) override { inner_->barrier(call); }
  void fail(const Error& cause) override { inner_->fail(cause); }

 private:
  // How often the host looks whether the device is done: what a short collective loses at most.
  static constexpr double kPollS = 5e-5;
  enum Side { kInput, kOutput };
  struct Room {
    std::shared_ptr<PinnedMemory> memory;
    size_t bytes = 0;
  };

  // Pinned memory for what lies on the device. To be touched only after wait_for_device().
  Span room(Side side, ConstSpan data);
  void copy(Span to, ConstSpan from);
  // Until all that is queued has happened: copies to the host, and those back of the calls before.
  void wait_for_device(const Call& call);

  const std::unique_ptr<Group> inner_;
  NcclGroup& beside_;
  const std::shared_ptr<const NcclLane> lane_;
  Event mark_;
  Outgrown outgrown_;
  std::array<Room, 2> rooms_;
};

}  // namespace pyar
