// A stream of a device, and the groups whose collectives run on it.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "base/error.h"
#include "device/cuda_runtime.h"

namespace pyar {

class NcclWatch;

// Note [Groups of one lane fail together]
// What is queued behind an aborted flight works on what that one has left in memory, and may hand
// it to peers that have met no error. So an error of one group is an error of all groups of its
// lane: `aborted` is set for all of them first, then the communicators are aborted from the end of
// the queue to its head. NCCL's abort may itself wait for its flights, which wait for those before
// them; so nobody waits longer than NcclWatch::kBehindS for the abort of what is behind. By then
// the threads that move its data to other nodes have stopped, which happens first.

// For any thread.
class NcclLane {
 public:
  NcclLane(const CudaRuntime& cuda, int device);

  const CudaRuntime& cuda() const { return cuda_; }
  int device() const { return device_; }
  CudaStream stream() const { return stream_->get(); }

  // Where in the queue a flight stands that is about to be launched.
  uint64_t next_place() { return ++num_places_; }
  static constexpr uint64_t kNoPlace = std::numeric_limits<uint64_t>::max();

  // From the first to the last moment in which the watch has a communicator.
  void enter(std::shared_ptr<NcclWatch> watch);
  void leave(const NcclWatch& watch);
  // Both of all groups on this lane; the first waits for nobody.
  void mark_aborted() const;
  void fail(const Error& cause) const;
  // Whether a group that is still here has flights, and all of them behind this place.
  bool has_group_behind(uint64_t place) const;

 private:
  std::vector<std::shared_ptr<NcclWatch>> watches() const;

  const CudaRuntime& cuda_;
  const int device_;
  std::unique_ptr<const Stream> stream_;
  std::atomic<uint64_t> num_places_{0};
  mutable std::mutex mutex_;
  std::vector<std::weak_ptr<NcclWatch>> watches_;
};

}  // namespace pyar
