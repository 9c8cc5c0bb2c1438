#include "base/fork.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <pthread.h>
#include <unistd.h>
#include <vector>

namespace pyar {
namespace {

std::atomic<unsigned> generation{0};

struct Descriptors {
  std::mutex mutex;  // held across fork(), so that the child finds the list whole
  std::vector<int> open;
};

// Never destroyed: descriptors may be closed after static destructors have run.
Descriptors& descriptors() {
  static auto& only = *new Descriptors;
  return only;
}

// In the child, of which nothing is known but that this thread has forked: no allocation, no lock
// but our own.
void begin_child() {
  generation.fetch_add(1, std::memory_order_relaxed);
  Descriptors& inherited = descriptors();
  for (const int fd : inherited.open) ::close(fd);
  inherited.open.clear();
  inherited.mutex.unlock();
}

[[maybe_unused]] const int registered = pthread_atfork(
    [] { descriptors().mutex.lock(); }, [] { descriptors().mutex.unlock(); }, begin_child);

}  // namespace

unsigned fork_generation() { return generation.load(std::memory_order_relaxed); }

void close_in_children(int fd) {
  const std::lock_guard lock(descriptors().mutex);
  descriptors().open.push_back(fd);
}

void close_descriptor(int fd) {
  const std::lock_guard lock(descriptors().mutex);
  std::erase(descriptors().open, fd);
  ::close(fd);  // under the lock: nobody can be given this number, and register it, in between
}

}  // namespace pyar
