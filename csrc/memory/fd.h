// An owned file descriptor: its destructor is the only clean-up path. Forked children have closed
// it before anything else runs in them; their copies of the object own nothing.
#pragma once

#include <cstddef>
#include <utility>

#include "base/fork.h"

namespace pyar {

class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {
    if (fd_ >= 0) close_in_children(fd_);
  }
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)), owner_(other.owner_) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    std::swap(owner_, other.owner_);
    return *this;
  }
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  ~Fd() {
    if (fd_ >= 0 && owner_.is_this_one()) close_descriptor(fd_);
  }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
  OwnerProcess owner_;
};

// A message over a unix socket, with at most one descriptor beside it (`attached` < 0: none). The
// kernel delivers both or neither. Socket type SOCK_SEQPACKET: a message is never split, a longer
// one is an error. Neither function blocks.
enum class Sent { kYes, kNoRoom, kClosed };
Sent try_send_message(const Fd& socket, const void* message, size_t bytes, int attached = -1);

struct Received {
  size_t bytes;  // 0: the other side has closed
  Fd attached;   // none also if this process may open no more
};
// False when nothing has arrived.
bool try_receive_message(const Fd& socket, void* message, size_t capacity_bytes,
                         Received& received);

}  // namespace pyar
