// Memory shared by the ranks of a host. Anonymous (memfd, or a file without a name): nothing is
// left behind by kill -9. A memfd is not limited by the size of /dev/shm.
#pragma once

#include <cstddef>

#include "memory/fd.h"

namespace pyar {

class Segment {
 public:
  // Reserves the pages first, so that a lack of memory is an Error here and not a SIGBUS later.
  // Zeroed.
  static Segment create(size_t bytes);
  // Maps a segment that another rank created; refuses one smaller than `bytes`.
  static Segment map(Fd fd, size_t bytes);

  Segment(Segment&& other) noexcept;
  Segment& operator=(Segment&& other) noexcept;
  ~Segment();

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  // Held by the creator until all ranks have the segment; a mapping needs none.
  int fd() const { return fd_.get(); }
  void close_fd() { fd_ = Fd(); }

 private:
  Segment(Fd fd, size_t bytes);

  Fd fd_;
  char* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace pyar
