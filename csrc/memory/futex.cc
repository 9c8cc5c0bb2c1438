#include "memory/futex.h"

#include <climits>
#include <cmath>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

namespace pyar {
namespace {

// Not FUTEX_PRIVATE: the word is shared between processes.
long futex(std::atomic<uint32_t>& word, int operation, uint32_t value, const timespec* timeout) {
  static_assert(sizeof(word) == sizeof(uint32_t));
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation, value, timeout, nullptr,
                 0);
}

}  // namespace

void futex_wait(std::atomic<uint32_t>& word, uint32_t expected, double slice_s) {
  const double whole_s = std::floor(slice_s);
  const timespec timeout{static_cast<time_t>(whole_s),
                         static_cast<long>((slice_s - whole_s) * 1e9)};
  futex(word, FUTEX_WAIT, expected, &timeout);
}

void futex_wake_all(std::atomic<uint32_t>& word) { futex(word, FUTEX_WAKE, INT_MAX, nullptr); }

}  // namespace pyar
