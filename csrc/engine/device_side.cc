#include "engine/device_side.h"

#include <utility>

namespace pyar {

DeviceSide::DeviceSide(const CudaRuntime& cuda, int device, Connect connect)
    : cuda_(cuda), device_(device), connect_(std::move(connect)) {
  const DeviceScope scope(cuda_, device_);
  clock_ = std::make_unique<DeviceClock>(cuda_);
}

// Only the engine's tasks, one at a time, write it; who is not one of them asks is_connected_.
NcclGroup& DeviceSide::group_for(const Call& call) {
  if (!group_) {
    group_ = connect_(call);
    is_connected_.store(true, std::memory_order_release);
  }
  return *group_;
}

Engine::Task DeviceSide::task(CudaStream stream, Body body, std::shared_ptr<DeviceTimes> times) {
  const DeviceScope scope(cuda_, device_);
  if (cuda_.is_capturing(stream))
    throw UsageError(
        "a collective on a stream that is being captured into a CUDA graph: before each launch the "
        "ranks' hosts agree, which a replay would not repeat; capture what is between collectives, "
        "the optimizer's step() for one");
  const auto ready = std::make_shared<Event>(cuda_, Event::Timing::kNo);
  ready->record(stream);
  if (times) times->begun.anchor = times->ended.anchor = clock_->anchor();
  return [this, ready, body = std::move(body), times = std::move(times)](Group&, const Call& call) {
    const DeviceScope on_worker(cuda_, device_);
    NcclGroup& group = group_for(call);
    Call mine = call;
    mine.ready = ready->get();
    body(group, mine);
    if (!times) return;
    times->begun.event = group.latest().begun;
    auto ended = std::make_shared<Event>(cuda_, Event::Timing::kYes);
    ended->record(group.stream());  // not that of the collective: the body may have queued more
    times->ended.event = std::move(ended);
  };
}

void DeviceSide::hold_back(CudaStream stream, uint64_t sequence) {
  group_->wait_on(stream, sequence);
}

void DeviceSide::hold_back(CudaStream stream) {
  group_->check();
  const DeviceScope scope(cuda_, device_);
  Event queued(cuda_, Event::Timing::kNo);
  queued.record(group_->stream());
  queued.hold_back(stream);
}

void DeviceSide::check() const {
  if (is_connected_.load(std::memory_order_acquire)) group_->check();
}

Mark DeviceSide::mark(CudaStream stream) {
  const DeviceScope scope(cuda_, device_);
  return clock_->mark(stream);
}

void DeviceSide::leave() {
  if (is_connected_.load(std::memory_order_acquire)) group_->leave();
}

}  // namespace pyar
