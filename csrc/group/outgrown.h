// Memory that a stream may still be using when nobody else wants it any more.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "base/fork.h"
#include "device/cuda_runtime.h"
#include "group/nccl_lane.h"

namespace pyar {

class Outgrown {
 public:
  explicit Outgrown(std::shared_ptr<const NcclLane> lane) : lane_(std::move(lane)) {}
  Outgrown(const Outgrown&) = delete;
  Outgrown& operator=(const Outgrown&) = delete;
  // Waits up to kEndS. What a stuck device may touch after that is never given back.
  ~Outgrown();

  // Keeps the memory until the stream has passed all that is queued on it now. Null: nothing.
  void keep(std::shared_ptr<const void> memory) noexcept;

 private:
  // Groups leave before: by then their flights have ended or are aborted, and only copies may be
  // left.
  static constexpr double kEndS = 0.1, kPollS = 5e-4;
  struct Memory {
    std::shared_ptr<const void> owner;
    std::unique_ptr<Event> mark;
  };

  bool is_unused(const Memory& memory) const;
  void release();

  const std::shared_ptr<const NcclLane> lane_;
  std::vector<Memory> kept_;
  OwnerProcess owner_;
};

}  // namespace pyar
