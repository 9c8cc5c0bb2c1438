// Ranks without Python: threads of this process, or processes forked from it.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <iterator>
#include <memory>
#include <numeric>
#include <string>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include "check.h"
#include "group/shared_memory_group.h"

namespace pyar::test {

// What all ranks of a host know. Global ranks are 10, 13, 16, ... (of another host, from another
// first one on): a local rank that gets where a global one belongs is not one of them.
class World {
 public:
  explicit World(int size, int first_global = 10) : World(every_third(size, first_global)) {}
  explicit World(std::vector<int> global_ranks) : global_ranks_(std::move(global_ranks)) {
    static std::atomic<int> worlds{0};
    name_ = "pyallreduce-test-" + std::to_string(getpid()) + "-" + std::to_string(worlds++);
  }
  int size() const { return static_cast<int>(global_ranks_.size()); }
  int global(int local_rank) const { return global_ranks_[static_cast<size_t>(local_rank)]; }
  const std::vector<int>& global_ranks() const { return global_ranks_; }
  const std::string& name() const { return name_; }
  static std::string token() { return std::string(64, 't'); }

  HostLink link(int local_rank, double timeout_s = 30) const {
    return HostLink(local_rank, global_ranks_, name_, token(), Deadline(timeout_s));
  }
  std::unique_ptr<SharedMemoryGroup> group(int local_rank) const {
    return std::make_unique<SharedMemoryGroup>(link(local_rank), Deadline(30));
  }

 private:
  static std::vector<int> every_third(int size, int first) {
    std::vector<int> ranks;
    for (int r = 0; r < size; ++r) ranks.push_back(first + 3 * r);
    return ranks;
  }

  std::vector<int> global_ranks_;
  std::string name_;
};

// Ranks outnumber the cores of a machine that tests.
inline constexpr Patience kPatience = kYieldFirst;

// The calls of one rank, numbered.
class Calls {
 public:
  Call next(double timeout_s = 60) {
    return {.sequence = ++sequence_,
            .layout = 0,
            .deadline = Deadline(timeout_s),
            .patience = kPatience,
            .present_patience = kPatience};
  }

 private:
  uint64_t sequence_ = 0;
};

inline void on_threads(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

// Each in a child of its own; what waitpid() says of them. Only from a process without threads.
inline std::vector<int> in_processes(int count, const std::function<void(int)>& body) {
  std::vector<pid_t> children;
  for (int i = 0; i < count; ++i) {
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
      body(i);
      std::exit(0);  // with the leak checker's look at this process
    }
    children.push_back(child);
  }
  std::vector<int> statuses;
  for (const pid_t child : children) {
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    statuses.push_back(status);
  }
  return statuses;
}

// Of this process. Where one has been closed and one leaked, the lowest free number tells nothing.
inline long num_descriptors() {
  return std::distance(std::filesystem::directory_iterator("/proc/self/fd"), {});
}

inline bool ended_well(int status) { return WIFEXITED(status) && WEXITSTATUS(status) == 0; }

}  // namespace pyar::test
