#include "device/device_clock.h"

#include <utility>

#include "base/clock.h"

namespace pyar {

std::optional<double> Mark::passed_s() const {
  if (captured_s) return captured_s;
  if (!event || !event->has_passed()) return std::nullopt;
  return anchor->at_s + event->seconds_since(anchor->event);
}

Mark DeviceClock::mark(CudaStream stream) {
  if (cuda_.is_capturing(stream)) return {nullptr, nullptr, now_s()};
  std::shared_ptr<const Anchor> before = anchor();
  auto event = std::make_shared<Event>(cuda_, Event::Timing::kYes);
  event->record(stream);
  return {std::move(event), std::move(before)};
}

std::shared_ptr<const Anchor> DeviceClock::anchor() {
  const std::lock_guard lock(mutex_);
  if (!anchor_ || now_s() > anchor_->at_s + kAnchorHoldsS) {
    auto fresh = std::make_shared<Anchor>(cuda_);
    fresh->event.record(stream_.get());
    stream_.synchronize();
    fresh->at_s = now_s();
    anchor_ = std::move(fresh);
  }
  return anchor_;
}

}  // namespace pyar
