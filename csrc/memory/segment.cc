#include "memory/segment.h"

#include <algorithm>
#include <cerrno>
#include <fcntl.h>
#include <fstream>
#include <limits>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <utility>

#include "base/error.h"

namespace pyar {
namespace {

std::string mebibytes(size_t bytes) { return std::to_string((bytes + 0xfffff) >> 20) + " MiB"; }

size_t number_in(const char* path, size_t otherwise) {
  std::ifstream file(path);
  size_t value;
  return file >> value ? value : otherwise;  // "max" is no number either
}

// What the machine and the control group can still give. fallocate alone does not refuse what they
// cannot: it takes page after page until the kernel kills some process.
size_t available_bytes() {
  size_t available = std::numeric_limits<size_t>::max();
  std::ifstream meminfo("/proc/meminfo");
  std::string name;
  for (size_t kibibytes; meminfo >> name >> kibibytes; meminfo.ignore(100, '\n'))
    if (name == "MemAvailable:") available = kibibytes << 10;
  const size_t limit = number_in("/sys/fs/cgroup/memory.max", available);
  const size_t used = number_in("/sys/fs/cgroup/memory.current", 0);
  return std::min(available, limit - std::min(limit, used));
}

}  // namespace

Segment Segment::create(size_t bytes) {
  const std::string remedy =
      "; raise the memory limit of the container or job, or use smaller buckets";
  if (const size_t available = available_bytes(); bytes > available)
    throw Error("cannot reserve " + mebibytes(bytes) +
                " of memory shared by the ranks of this host: " + mebibytes(available) +
                " are available" + remedy);
  Fd fd(memfd_create("pyallreduce", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd) throw_errno("memfd_create");
  int failed;
  do failed = bytes ? posix_fallocate(fd.get(), 0, static_cast<off_t>(bytes)) : 0;
  while (failed == EINTR);
  if (failed) {
    errno = failed;
    throw_errno("cannot reserve " + mebibytes(bytes) +
                " of memory shared by the ranks of this host" + remedy);
  }
  // Nobody may shrink it under a rank that is reading.
  if (fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
    throw_errno("cannot seal shared memory");
  return Segment(std::move(fd), bytes);
}

Segment Segment::map(Fd fd, size_t bytes) {
  struct stat status;
  if (fstat(fd.get(), &status) < 0) throw_errno("fstat of shared memory");
  if (static_cast<size_t>(status.st_size) < bytes)
    throw Error("a shared segment has " + mebibytes(static_cast<size_t>(status.st_size)) +
                " instead of " + mebibytes(bytes));
  Segment segment(std::move(fd), bytes);
  segment.close_fd();
  return segment;
}

Segment::Segment(Fd fd, size_t bytes) : fd_(std::move(fd)), bytes_(bytes) {
  if (bytes == 0) return;
  void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0);
  if (mapped == MAP_FAILED) throw_errno("cannot map " + mebibytes(bytes) + " of shared memory");
  data_ = static_cast<char*>(mapped);
}

Segment::Segment(Segment&& other) noexcept
    : fd_(std::move(other.fd_)),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)) {}

Segment& Segment::operator=(Segment&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Segment::~Segment() {
  if (data_) munmap(data_, bytes_);
}

}  // namespace pyar
