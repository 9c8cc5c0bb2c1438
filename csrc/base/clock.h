#pragma once

#include <chrono>

namespace pyar {

// Seconds on CLOCK_MONOTONIC: the same clock for all processes of a host, and Python's
// time.monotonic().
inline double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace pyar
