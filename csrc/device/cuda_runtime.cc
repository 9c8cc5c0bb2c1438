#include "device/cuda_runtime.h"

#include <cstring>
#include <map>
#include <memory>
#include <mutex>

namespace pyar {
namespace {

LibrarySearch search_for(const std::string& path, const std::vector<std::string>& folders) {
  return {.name = "the CUDA runtime",
          .variable = "PYALLREDUCE_CUDART",
          .path = path,
          .sonames = {"libcudart.so.13", "libcudart.so.12"},
          .folders = folders,
          .remedy = "Install torch with CUDA, which brings it, and import torch first"};
}

}  // namespace

template <typename Self, typename Visit>
void CudaRuntime::for_each_function(Self& self, Visit visit) {
  const auto all = [&](auto&... functions) { (visit(functions), ...); };
  all(self.get_device_count, self.set_device, self.get_device, self.runtime_get_version,
      self.device_get_stream_priority_range, self.stream_create, self.stream_destroy,
      self.stream_synchronize, self.stream_is_capturing, self.stream_wait_event, self.event_create,
      self.event_destroy, self.event_record, self.event_query, self.event_elapsed_time,
      self.memcpy_async, self.host_alloc, self.free_host, self.exchange_capture_mode,
      self.get_last_error);
}

const CudaRuntime& CudaRuntime::load(const std::string& path,
                                     const std::vector<std::string>& folders) {
  // Never destroyed: what streams and events refer to outlives them.
  static auto& mutex = *new std::mutex;
  static auto& by_path = *new std::map<std::string, std::unique_ptr<const CudaRuntime>>;
  const std::lock_guard lock(mutex);
  std::unique_ptr<const CudaRuntime>& loaded = by_path[path];
  if (!loaded) loaded.reset(new CudaRuntime(path, folders));
  return *loaded;
}

CudaRuntime::CudaRuntime(const std::string& path, const std::vector<std::string>& folders)
    : library_(search_for(path, folders)) {
  constexpr const char* kGetErrorString = "cudaGetErrorString";
  get_error_string_ = reinterpret_cast<const char* (*)(int)>(library_.symbol(kGetErrorString));
  std::string missing;
  if (!get_error_string_) missing.append(" ").append(kGetErrorString);
  for_each_function(*this, [&](auto& function) {
    if (!function.find_in(library_, &explain, this)) missing.append(" ").append(function.name());
  });
  if (!missing.empty())
    throw Error(library_.path() + " (" + library_.how() + ") is no CUDA runtime: it lacks" +
                missing);
}

std::string CudaRuntime::explain(const void* runtime, int status) {
  return static_cast<const CudaRuntime*>(runtime)->get_error_string_(status);
}

int CudaRuntime::device_count() const {
  int count = 0;
  const int status = get_device_count.status(&count);
  if (status == kCudaInsufficientDriver || status == kCudaNoDevice) {
    get_last_error.status();  // or the next caller would take it for its own
    return 0;
  }
  get_device_count.check(status);
  return count;
}

bool CudaRuntime::is_capturing(CudaStream stream) const {
  int status = 0;  // cudaStreamCaptureStatusNone
  stream_is_capturing(stream, &status);
  return status != 0;
}

int CudaRuntime::version() const {
  int version = 0;
  runtime_get_version(&version);
  return version;
}

DeviceScope::DeviceScope(const CudaRuntime& cuda, int device) : cuda_(cuda) {
  cuda_.get_device(&before_);
  cuda_.set_device(device);
}

Stream::Stream(const CudaRuntime& cuda) : cuda_(cuda) {
  int least = 0, greatest = 0;
  cuda_.device_get_stream_priority_range(&least, &greatest);
  cuda_.stream_create(&stream_, kCudaStreamNonBlocking, greatest);
}

Stream::~Stream() {
  if (owner_.is_this_one()) cuda_.stream_destroy.status(stream_);
}

Event::Event(const CudaRuntime& cuda, Timing timing) : cuda_(cuda) {
  cuda_.event_create(&event_, timing == Timing::kYes ? kCudaEventDefault : kCudaEventDisableTiming);
}

Event::~Event() {
  if (owner_.is_this_one()) cuda_.event_destroy.status(event_);
}

bool Event::has_passed() const {
  const int status = cuda_.event_query.status(event_);
  if (status == kCudaNotReady) {
    cuda_.get_last_error.status();  // which it counts as
    return false;
  }
  cuda_.event_query.check(status);
  return true;
}

double Event::seconds_since(const Event& earlier) const {
  float milliseconds = 0;
  cuda_.event_elapsed_time(&milliseconds, earlier.event_, event_);
  return 1e-3 * static_cast<double>(milliseconds);
}

PinnedMemory::PinnedMemory(const CudaRuntime& cuda, size_t bytes) : cuda_(cuda) {
  cuda_.host_alloc(&data_, bytes, kCudaHostAllocPortable | kCudaHostAllocMapped);
  std::memset(data_, 0, bytes);
}

PinnedMemory::~PinnedMemory() {
  if (owner_.is_this_one()) cuda_.free_host.status(data_);
}

}  // namespace pyar
