#include "memory/segment.h"

#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <utility>

#include "base/env.h"
#include "base/error.h"
#include "memory/available.h"

namespace pyar {
namespace {

std::string mebibytes(size_t bytes) { return std::to_string((bytes + 0xfffff) >> 20) + " MiB"; }

std::string cannot_reserve(size_t bytes) {
  return "cannot reserve " + mebibytes(bytes) + " of memory shared by the ranks of this host: ";
}

constexpr const char* kSmaller =
    "raise the memory limit of the container or job (or ulimit -v), or use smaller buckets";

// A memfd; none, and errno, if the kernel refuses.
Fd open_memfd() {
  constexpr unsigned kNoExecSeal = 8;  // MFD_NOEXEC_SEAL: some hardened systems insist on it
  constexpr unsigned kFlags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  Fd fd(memfd_create("pyallreduce", kFlags | kNoExecSeal));
  if (!fd && errno == EINVAL) fd = Fd(memfd_create("pyallreduce", kFlags));  // Linux < 6.3
  return fd;
}

// Takes the pages now. Returns 0 or an errno.
int reserve(const Fd& fd, size_t bytes) {
  int failed;
  do failed = bytes ? posix_fallocate(fd.get(), 0, static_cast<off_t>(bytes)) : 0;
  while (failed == EINTR);
  return failed;
}

// Where no memfd is to be had (a strict seccomp profile): a file that has no name either, in a
// folder where it is memory, or where the user says.
Fd reserve_file(size_t bytes, std::string refusals) {
  for (const std::string& folder : {std::string("/dev/shm"), temporary_folder()}) {
    Fd fd(open(folder.c_str(), O_TMPFILE | O_EXCL | O_RDWR | O_CLOEXEC, 0600));
    const int failed = fd ? reserve(fd, bytes) : errno;
    if (!failed) return fd;
    refusals += "; in " + folder + ": " + std::strerror(failed);
  }
  throw Error(cannot_reserve(bytes) + refusals +
              ". Allow memfd_create in the container's seccomp profile, enlarge /dev/shm (docker "
              "--shm-size), or set TMPDIR to a folder with room");
}

Fd reserve_anywhere(size_t bytes) {
  Fd fd = open_memfd();
  if (!fd) return reserve_file(bytes, std::string("memfd_create: ") + std::strerror(errno));
  if (const int failed = reserve(fd, bytes))
    throw Error(cannot_reserve(bytes) + std::strerror(failed) + "; " + kSmaller);
  // Nobody may shrink it under a rank that is reading.
  if (fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
    throw_errno("cannot seal shared memory");
  return fd;
}

}  // namespace

Segment Segment::create(size_t bytes) {
  // fallocate alone does not refuse what the machine lacks: it takes page after page until the
  // kernel kills some process.
  if (const size_t available = available_bytes(); bytes > available)
    throw Error(cannot_reserve(bytes) + mebibytes(available) + " are available; " + kSmaller);
  return Segment(reserve_anywhere(bytes), bytes);
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
  if (mapped == MAP_FAILED)
    throw Error("cannot map " + mebibytes(bytes) + " of memory shared by the ranks of this host: " +
                std::strerror(errno) + "; " + kSmaller);
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
