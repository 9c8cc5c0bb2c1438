#include "group/nccl_library.h"

#include <map>
#include <memory>
#include <mutex>

namespace pyar {
namespace {

constexpr const char* kRemedy =
    "Install torch with CUDA, which brings NCCL, or: pip install nvidia-nccl-cu13 (-cu12 for CUDA "
    "12)";

LibrarySearch search_for(const std::string& path, const std::vector<std::string>& folders) {
  return {.name = "NCCL",
          .variable = "PYALLREDUCE_NCCL",
          .path = path,
          .sonames = {"libnccl.so.2"},
          .folders = folders,
          .remedy = kRemedy};
}

}  // namespace

const NcclLibrary& NcclLibrary::load(const std::string& path,
                                     const std::vector<std::string>& folders) {
  // Never destroyed: communicators refer to it until the process ends.
  static auto& mutex = *new std::mutex;
  static auto& by_path = *new std::map<std::string, std::unique_ptr<const NcclLibrary>>;
  const std::lock_guard lock(mutex);
  std::unique_ptr<const NcclLibrary>& loaded = by_path[path];
  if (!loaded) loaded.reset(new NcclLibrary(path, folders));
  return *loaded;
}

// The version first: an old library lacks functions, but that is not what is wrong with it.
NcclLibrary::NcclLibrary(const std::string& path, const std::vector<std::string>& folders)
    : library_(search_for(path, folders)) {
  ForeignFunction<int*> get_version("ncclGetVersion");
  if (!get_version.find_in(library_, &explain, this)) throw unusable("it lacks ncclGetVersion");
  get_version(&version_);
  if (version_ < kOldestVersion)
    throw unusable("version " + name_of(version_) + " is older than " + name_of(kOldestVersion));
  find_required();
  find_optional();
}

void NcclLibrary::find_required() {
  std::string lacking;
  get_error_string_ = reinterpret_cast<const char* (*)(int)>(library_.symbol("ncclGetErrorString"));
  if (!get_error_string_) lacking.append(" ncclGetErrorString");
  const auto find = [&](auto&... functions) {
    ((functions.find_in(library_, &explain, this) ||
      (lacking.append(" ").append(functions.name()), false)),
     ...);
  };
  find(get_unique_id, comm_init, comm_abort, comm_get_async_error, all_reduce, reduce_scatter,
       all_gather, broadcast);
  if (!lacking.empty()) throw unusable("it lacks" + lacking);
}

void NcclLibrary::find_optional() {
  get_last_error_ =
      reinterpret_cast<const char* (*)(NcclComm)>(library_.symbol("ncclGetLastError"));
  if (!get_last_error_) missing_.emplace_back("ncclGetLastError");
  const auto find = [&](auto&... functions) {
    ((functions.find_in(library_, &explain, this) ||
      (missing_.emplace_back(functions.name()), false)),
     ...);
  };
  find(comm_split, mem_alloc, mem_free, comm_register, comm_deregister);
}

Error NcclLibrary::unusable(const std::string& why) const {
  return Error("NCCL at " + library_.path() + " (" + library_.how() + ") cannot be used: " + why +
               ". " + kRemedy + ".");
}

std::string NcclLibrary::explain(const void* library, int status) {
  const auto& self = *static_cast<const NcclLibrary*>(library);
  // None while the version is being asked for.
  std::string text = self.get_error_string_ ? self.get_error_string_(status) : "failed";
  if (const std::string more = self.last_error(); !more.empty()) text += ": " + more;
  return text;
}

Error NcclLibrary::error(const std::string& what, int status) const {
  return Error(what + ": " + explain(this, status) + " (status " + std::to_string(status) + ")");
}

std::string NcclLibrary::last_error() const {
  const char* const text = get_last_error_ ? get_last_error_(nullptr) : nullptr;
  return text ? text : "";
}

// Up to 2.8 a version was 2804 for 2.8.4; those are too old anyway, and named as well as can be.
std::string NcclLibrary::name_of(int version) {
  const int unit = version < 10000 ? 1000 : 10000;
  return std::to_string(version / unit) + "." + std::to_string(version % unit / 100) + "." +
         std::to_string(version % 100);
}

}  // namespace pyar
