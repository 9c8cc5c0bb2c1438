#include "device/device_clock.h"

#include <limits>
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
  if (!anchor_ || now_s() > anchor_->at_s + kAnchorHoldsS) anchor_ = new_anchor();
  return anchor_;
}

// A thread that loses its core between the event and the clock is late by a time slice: the
// quickest of a few tries.
std::shared_ptr<const Anchor> DeviceClock::new_anchor() {
  std::shared_ptr<const Anchor> best;
  double best_took_s = std::numeric_limits<double>::infinity();
  for (int tries = 0; tries < kAnchorTries && best_took_s > kAnchorGoodS; ++tries) {
    auto fresh = std::make_shared<Anchor>(cuda_);
    const double begun_s = now_s();
    fresh->event.record(stream_.get());
    stream_.synchronize();
    fresh->at_s = now_s();
    const double took_s = fresh->at_s - begun_s;
    if (took_s < best_took_s) best = std::move(fresh), best_took_s = took_s;
  }
  return best;
}

}  // namespace pyar
