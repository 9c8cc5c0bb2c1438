// Under ThreadSanitizer ranks are threads of one process, each with a mapping of the segment of its
// own. The sanitizer knows memory by its address: it would see neither that a flag written in one
// mapping is the flag read in another, nor that two ranks touch the same bytes. So here a segment
// is mapped once per process, and every rank gets that address (--wrap=mmap, --wrap=munmap). Then
// the whole protocol is judged, flags and data, by the memory model of C++ rather than by the order
// that this machine happens to keep.
#include <cstddef>
#include <map>
#include <mutex>
#include <sys/mman.h>
#include <sys/stat.h>
#include <utility>

extern "C" {
void* __real_mmap(void*, size_t, int, int, int, off_t);
int __real_munmap(void*, size_t);
}

namespace {

struct Mapping {
  std::pair<dev_t, ino_t> file;
  int users;
};

std::mutex mutex;

std::map<void*, Mapping>& mappings() {
  static std::map<void*, Mapping> by_address;
  return by_address;
}

}  // namespace

extern "C" void* __wrap_mmap(void* wanted, size_t bytes, int protection, int flags, int fd,
                             off_t offset) {
  struct stat status;
  if (!(flags & MAP_SHARED) || fd < 0 || fstat(fd, &status) != 0)
    return __real_mmap(wanted, bytes, protection, flags, fd, offset);
  const std::pair<dev_t, ino_t> file{status.st_dev, status.st_ino};
  const std::lock_guard lock(mutex);
  for (auto& [address, mapping] : mappings())
    if (mapping.file == file) return ++mapping.users, address;
  void* const address = __real_mmap(wanted, bytes, protection, flags, fd, offset);
  if (address != MAP_FAILED) mappings()[address] = {file, 1};
  return address;
}

extern "C" int __wrap_munmap(void* address, size_t bytes) {
  const std::lock_guard lock(mutex);
  const auto found = mappings().find(address);
  if (found != mappings().end()) {
    if (--found->second.users > 0) return 0;
    mappings().erase(found);
  }
  return __real_munmap(address, bytes);
}
