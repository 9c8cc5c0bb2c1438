#include "group/nccl_lane.h"

#include <algorithm>
#include <utility>

#include "group/nccl_watch.h"

namespace pyar {

NcclLane::NcclLane(const CudaRuntime& cuda, int device) : cuda_(cuda), device_(device) {
  const DeviceScope scope(cuda, device);
  stream_ = std::make_unique<const Stream>(cuda);
}

void NcclLane::enter(std::shared_ptr<NcclWatch> watch) {
  const std::lock_guard lock(mutex_);
  watches_.push_back(std::move(watch));
}

void NcclLane::leave(const NcclWatch& watch) {
  const std::lock_guard lock(mutex_);
  std::erase_if(watches_, [&](const auto& weak) {
    const auto other = weak.lock();
    return !other || other.get() == &watch;
  });
}

// They are asked without the mutex: a watch has one of its own.
std::vector<std::shared_ptr<NcclWatch>> NcclLane::watches() const {
  const std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<NcclWatch>> found;
  for (const auto& weak : watches_)
    if (auto watch = weak.lock()) found.push_back(std::move(watch));
  return found;
}

void NcclLane::mark_aborted() const {
  for (const auto& watch : watches()) watch->mark_aborted();
}

void NcclLane::fail(const Error& cause) const {
  for (const auto& watch : watches()) watch->end_by(cause);
}

bool NcclLane::has_group_behind(uint64_t place) const {
  return std::ranges::any_of(watches(), [&](const auto& watch) {
    return watch->place() > place && watch->place() != kNoPlace;
  });
}

}  // namespace pyar
