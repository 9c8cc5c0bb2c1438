// A counter in shared memory that one rank advances and the others wait for.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "base/wait.h"

namespace pyar {

inline constexpr size_t kCacheLine = 64;

// Blocks for at most slice_s while *word == expected; may return early.
void futex_wait(std::atomic<uint32_t>& word, uint32_t expected, double slice_s);
void futex_wake_all(std::atomic<uint32_t>& word);

// Counts the phases its owner has finished. Wraps around: compared by difference, ranks are never
// 2^31 apart.
struct alignas(kCacheLine) PhaseFlag {
  std::atomic<uint32_t> phase;
  std::atomic<uint32_t> sleepers;
  // On this line because every waiter reads it anyway.
  std::atomic<uint32_t> failed;  // the owner will go no further
  std::atomic<int32_t> cpu;      // where the owner was last seen, if ranks outnumber the cores

  // Publishes everything the owner wrote before: pairs with the acquire in reached().
  void publish(uint32_t value) {
    phase.store(value, std::memory_order_release);
    // Either this load sees the sleeper, or the sleeper's look at `phase` after announcing itself
    // sees the value: pairs with the fence in sleep_until().
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (sleepers.load(std::memory_order_relaxed) != 0) futex_wake_all(phase);
  }

  bool reached(uint32_t value) const {
    return static_cast<int32_t>(phase.load(std::memory_order_acquire) - value) >= 0;
  }

  void sleep_until(uint32_t value, double slice_s) {
    sleepers.fetch_add(1, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    const uint32_t seen = phase.load(std::memory_order_acquire);
    if (static_cast<int32_t>(seen - value) < 0) futex_wait(phase, seen, slice_s);
    // A sleeper killed before this line leaves the count up: from then on publish() wakes in vain,
    // nothing worse.
    sleepers.fetch_sub(1, std::memory_order_relaxed);
  }
};
static_assert(sizeof(PhaseFlag) == kCacheLine);
static_assert(std::atomic<uint32_t>::is_always_lock_free, "shared between processes");

}  // namespace pyar
