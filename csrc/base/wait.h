// The one wait loop. Every wait in the core has a deadline, and someone who says what is being
// waited for.
#pragma once

#include <algorithm>
#include <functional>
#include <sched.h>

#include "base/clock.h"

namespace pyar {

// When a wait ends at the latest, and who may end it before.
class Deadline {
 public:
  // *on_slice, if given, runs after every slice of every wait until this deadline, on the thread
  // that waits, and may throw.
  explicit Deadline(double timeout_s, const std::function<void()>* on_slice = nullptr)
      : timeout_s_(timeout_s), at_s_(now_s() + timeout_s), on_slice_(on_slice) {}
  double timeout_s() const { return timeout_s_; }
  double remaining_s() const { return std::max(0.0, at_s_ - now_s()); }
  bool passed() const { return now_s() >= at_s_; }
  void on_slice() const {
    if (on_slice_) (*on_slice_)();
  }
  // Later by extra_s; timeout_s(), which messages name, stays what the user gave.
  Deadline plus(double extra_s) const {
    Deadline later = *this;
    later.at_s_ += extra_s;
    return later;
  }

 private:
  double timeout_s_, at_s_;
  const std::function<void()>* on_slice_;
};

// How long a waiter keeps its core before it sleeps on a futex. A wake-up costs 5 us, and 50 when
// the core has gone idle under a hypervisor.
struct Patience {
  int spins;       // about 40 ns each; wasted when the peer needs this very core
  double yield_s;  // then others may run; ends with their first whole time slice
  bool is_crowded() const { return spins == 0; }
};
// Every rank has a core: nobody is delayed by spinning.
inline constexpr Patience kSpinFirst{.spins = 2000, .yield_s = 50e-6};
// Ranks outnumber the cores. 4 ranks on 2 cores, 4 KiB after 10 us of work each: 35 us with 5
// yields (2 us), 32 with 20, 33 with 400; 88 without; each spin delays the peer waited for.
inline constexpr Patience kYieldFirst{.spins = 0, .yield_s = 200e-6};
// The worker competes with compute, which would keep the core for a whole slice (3 ms) after each
// yield; a sleeper that is woken preempts it.
inline constexpr Patience kSleepSoon{.spins = 50, .yield_s = 0};

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
  if (patience.yield_s > 0)
    for (const Deadline yielding(patience.yield_s); !yielding.passed(); sched_yield())
      if (ready()) return;
  while (!ready()) {
    sleep(std::min(kWatchSliceS, deadline.remaining_s()));
    if (ready()) return;
    deadline.on_slice();
    watch(deadline.passed());
  }
}

}  // namespace pyar
