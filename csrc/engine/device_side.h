// Collectives of device memory, run by the engine that runs those of host memory: one order for
// both, and one first error. The host never waits for the device; it waits for the other hosts,
// which must agree before anything is launched.
#pragma once

#include <atomic>
#include <functional>
#include <memory>

#include "device/device_clock.h"
#include "engine/engine.h"
#include "group/nccl_group.h"

namespace pyar {

// When a task's work on the device began and ended. To be read once the task is done.
struct DeviceTimes {
  Mark begun, ended;
};

class DeviceSide {
 public:
  // Makes the group; runs inside the first task, on all ranks alike.
  using Connect = std::function<std::unique_ptr<NcclGroup>(const Call&)>;
  // Queues a collective, and what follows it on the group's stream.
  using Body = std::function<void(NcclGroup&, const Call&)>;

  DeviceSide(const CudaRuntime& cuda, int device, Connect connect);

  int device() const { return device_; }

  // What the engine is to run. On the device it comes after what is on `stream` by now, though the
  // engine may be late. `times`, if given, is filled in; costs two events with timing.
  Engine::Task task(CudaStream stream, Body body, std::shared_ptr<DeviceTimes> times = nullptr);

  // The following need a task that is done.

  // What comes later on `stream` waits for the tasks up to a sequence number; or for all that has
  // been queued after collectives, too. Throws the first error.
  void hold_back(CudaStream stream, uint64_t sequence);
  void hold_back(CudaStream stream);
  // True also of tasks that have never got there.
  bool has_ended(uint64_t sequence) { return !group_ || group_->has_ended(sequence); }
  CudaStream stream() const { return group_->stream(); }
  std::shared_ptr<NcclBuffer> allocate(size_t bytes) { return group_->allocate(bytes); }
  const std::atomic<uint32_t>& aborted() const { return group_->aborted(); }

  // Throws the first error of the device, if one has happened.
  void check() const;
  Mark mark(CudaStream stream);
  // Ends what hangs in a call; at most a second. From any thread, once no task is to begin any
  // more.
  void leave();

 private:
  NcclGroup& group_for(const Call& call);

  const CudaRuntime& cuda_;
  const int device_;
  const Connect connect_;
  std::unique_ptr<DeviceClock> clock_;
  std::unique_ptr<NcclGroup> group_;
  std::atomic<bool> is_connected_{false};
};

}  // namespace pyar
