// An owned file descriptor: its destructor is the only clean-up path.
#pragma once

#include <cstddef>
#include <unistd.h>
#include <utility>

namespace pyar {

class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  ~Fd() {
    if (fd_ >= 0) ::close(fd_);
  }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

// A message over a unix socket, with at most one descriptor beside it (`attached` < 0: none). The
// kernel delivers both or neither. Socket type SOCK_SEQPACKET: a message is never split, a longer
// one is an error.
void send_message(const Fd& socket, const void* message, size_t bytes, int attached = -1);

struct Received {
  size_t bytes;  // 0: the other side has closed
  Fd attached;
};
// Does not block: returns false when nothing has arrived.
bool try_receive_message(const Fd& socket, void* message, size_t capacity_bytes,
                         Received& received);

}  // namespace pyar
