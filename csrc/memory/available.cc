#include "memory/available.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>

namespace pyar {
namespace {

constexpr size_t kUnlimited = std::numeric_limits<size_t>::max();

size_t minus(size_t a, size_t b) { return a - std::min(a, b); }

size_t number_in(const std::string& path, size_t otherwise) {
  std::ifstream file(path);
  size_t value;
  return file >> value ? value : otherwise;  // "max" is no number either
}

// The values of the lines "<name> <value>" with these names, added up.
size_t sum_in(const std::string& path, const std::string& one, const std::string& other) {
  size_t sum = 0;
  std::ifstream file(path);
  std::string name;
  for (size_t value; file >> name >> value; file.ignore(100, '\n'))
    if (name == one || name == other) sum += value;
  return sum;
}

// How the two versions of control groups name the same things.
struct Version {
  const char *root, *limit, *usage, *inactive_file, *active_file;
};
constexpr Version kV1{"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
                      "total_inactive_file", "total_active_file"};
constexpr Version kV2{"/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file",
                      "active_file"};

size_t available_in(const std::string& group, const Version& version) {
  const size_t limit = number_in(group + "/" + version.limit, kUnlimited);
  const size_t used = number_in(group + "/" + version.usage, 0);
  const size_t cache = sum_in(group + "/memory.stat", version.inactive_file, version.active_file);
  return minus(limit, minus(used, cache));
}

// A limit above binds as well: the group at `path` and all around it. A container often sees only
// the files of its own group, and those at the root, whatever its path.
size_t available_up_from(std::string path, const Version& version) {
  size_t available = kUnlimited;
  for (;; path.erase(path.rfind('/'))) {
    available = std::min(available, available_in(version.root + path, version));
    if (path.empty()) return available;
  }
}

size_t available_to_control_groups() {
  size_t available = kUnlimited;
  std::ifstream groups("/proc/self/cgroup");  // lines "<id>:<controllers>:/<path>"
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first, second + 1 - first);
    std::string path = line.substr(second + 1);
    if (path == "/" || !path.starts_with('/')) path.clear();
    if (controllers == "::")
      available = std::min(available, available_up_from(path, kV2));
    else if (controllers.find("memory") != std::string::npos)
      available = std::min(available, available_up_from(path, kV1));
  }
  return available;
}

}  // namespace

size_t available_bytes() {
  constexpr size_t kUnknown = kUnlimited >> 10;
  size_t kibibytes = sum_in("/proc/meminfo", "MemAvailable:", "");
  if (kibibytes == 0) kibibytes = kUnknown;
  return std::min(kibibytes << 10, available_to_control_groups());
}

}  // namespace pyar
