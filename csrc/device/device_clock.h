// When a device passed a mark, on the clock of the host (now_s()).
#pragma once

#include <memory>
#include <mutex>
#include <optional>

#include "device/cuda_runtime.h"

namespace pyar {

// A moment that the device and the host both know.
struct Anchor {
  explicit Anchor(const CudaRuntime& cuda) : event(cuda, Event::Timing::kYes) {}
  Event event;
  double at_s = 0;
};

// Of a stream; the anchor is of about the same time.
struct Mark {
  std::shared_ptr<const Event> event;
  std::shared_ptr<const Anchor> anchor;
  // Instead of both, on a stream that is captured into a graph: the host's time.
  std::optional<double> captured_s = {};
  // Nothing before the stream has passed it.
  std::optional<double> passed_s() const;
};

class DeviceClock {
 public:
  // Of the current device.
  explicit DeviceClock(const CudaRuntime& cuda) : cuda_(cuda), stream_(cuda) {}

  // From any thread that works on the device. Neither waits for other streams than the clock's own.
  Mark mark(CudaStream stream);
  // For events that will be recorded soon.
  std::shared_ptr<const Anchor> anchor();

 private:
  // Elapsed times are floats, of milliseconds: this long after an anchor they are good to 1 us.
  static constexpr double kAnchorHoldsS = 10.0;
  static constexpr double kAnchorGoodS = 20e-6;
  static constexpr int kAnchorTries = 8;

  std::shared_ptr<const Anchor> new_anchor();

  const CudaRuntime& cuda_;
  Stream stream_;  // always idle: to synchronise it costs 10 us and waits for nobody
  std::mutex mutex_;
  std::shared_ptr<const Anchor> anchor_;
};

}  // namespace pyar
