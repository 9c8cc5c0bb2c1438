#include "base/fork.h"

#include <atomic>
#include <pthread.h>

namespace pyar {
namespace {

std::atomic<unsigned> generation{0};

}  // namespace

unsigned fork_generation() {
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { generation.fetch_add(1, std::memory_order_relaxed); });
  (void)registered;
  return generation.load(std::memory_order_relaxed);
}

}  // namespace pyar
