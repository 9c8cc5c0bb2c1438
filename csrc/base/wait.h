// The one wait loop. Every wait in the core has a deadline, and someone who says what is being
// waited for.
#pragma once

#include <algorithm>
#include <sched.h>

#include "base/clock.h"

namespace pyar {

class Deadline {
 public:
  explicit Deadline(double timeout_s) : timeout_s_(timeout_s), at_s_(now_s() + timeout_s) {}
  double timeout_s() const { return timeout_s_; }
  double remaining_s() const { return std::max(0.0, at_s_ - now_s()); }
  bool passed() const { return now_s() >= at_s_; }

 private:
  double timeout_s_, at_s_;
};

// How long a waiter keeps its core before it sleeps. Spinning saves a wake-up (about 5 us under
// KVM) while the peer runs on another core; once ranks outnumber cores each spin delays the very
// peer that is waited for.
struct Patience {
  int spins;   // about 40 ns each
  int yields;  // about 0.5 us each, or a time slice of whoever else is runnable
};
inline constexpr Patience kSpinFirst{.spins = 2000, .yields = 20};
inline constexpr Patience kSleepSoon{.spins = 50, .yields = 5};

// A dead peer or a report of another rank is noticed after at most this long.
inline constexpr double kWatchSliceS = 0.02;

inline void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Returns once ready() is true: spins, then yields, then sleeps. `sleep(slice_s)` blocks for at
// most that long and may return early; `watch(late)` runs after each slice and throws if the wait
// cannot end well: someone died, the communicator is being closed, or, always when `late`, the
// deadline has passed.
template <typename Ready, typename Sleep, typename Watch>
void await(const Deadline& deadline, Patience patience, Ready ready, Sleep sleep, Watch watch) {
  for (int i = 0; i < patience.spins; ++i, pause_core())
    if (ready()) return;
  for (int i = 0; i < patience.yields; ++i, sched_yield())
    if (ready()) return;
  while (!ready()) {
    sleep(std::min(kWatchSliceS, deadline.remaining_s()));
    if (ready()) return;
    watch(deadline.passed());
  }
}

}  // namespace pyar
