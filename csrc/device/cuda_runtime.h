// The few calls of the CUDA runtime that the core makes on the host. The library is found at run
// time (torch's copy, as a rule): no CUDA header, and nothing to link. Streams and events of
// different copies of the runtime work together, since all use the driver's primary context of a
// device.
#pragma once

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "base/fork.h"
#include "device/dynamic_library.h"

namespace pyar {

// Handles, opaque here; null is the default stream.
using CudaStream = void*;
using CudaEvent = void*;

// Values of CUDA's own enumerations; equal in all versions.
inline constexpr int kCudaSuccess = 0;
inline constexpr int kCudaInsufficientDriver = 35;  // also: there is no driver at all
inline constexpr int kCudaNoDevice = 100;
inline constexpr int kCudaNotReady = 600;
inline constexpr unsigned kCudaStreamNonBlocking = 1;  // does not wait for the default stream
inline constexpr unsigned kCudaEventDefault = 0;       // with timing
inline constexpr unsigned kCudaEventDisableTiming = 2;
inline constexpr int kCudaMemcpyDefault = 4;  // where the memory lies is told by its address
inline constexpr int kCudaCaptureModeRelaxed = 2;
inline constexpr unsigned kCudaHostAllocPortable = 1;  // pinned for all devices
inline constexpr unsigned kCudaHostAllocMapped = 2;    // kernels can read it at the same address

class CudaRuntime {
 public:
  // `path`: value of PYALLREDUCE_CUDART, or empty. `folders`: of installed packages. Cheap when it
  // has been loaded before; lives as long as the process. Error that says where it was sought, or
  // which functions it lacks.
  static const CudaRuntime& load(const std::string& path,
                                 const std::vector<std::string>& folders = {});

  CudaRuntime(const CudaRuntime&) = delete;
  CudaRuntime& operator=(const CudaRuntime&) = delete;

  // 0 also where there is no driver, or one too old.
  int device_count() const;
  // 13020 is 13.2.
  int version() const;
  // Into a graph: what is queued on the stream runs when somebody replays that, if ever.
  bool is_capturing(CudaStream) const;
  const DynamicLibrary& library() const { return library_; }

  ForeignFunction<int*> get_device_count{"cudaGetDeviceCount"};
  ForeignFunction<int> set_device{"cudaSetDevice"};
  ForeignFunction<int*> get_device{"cudaGetDevice"};
  ForeignFunction<int*> runtime_get_version{"cudaRuntimeGetVersion"};
  ForeignFunction<int*, int*> device_get_stream_priority_range{"cudaDeviceGetStreamPriorityRange"};
  ForeignFunction<CudaStream*, unsigned, int> stream_create{"cudaStreamCreateWithPriority"};
  ForeignFunction<CudaStream> stream_destroy{"cudaStreamDestroy"};
  ForeignFunction<CudaStream> stream_synchronize{"cudaStreamSynchronize"};
  ForeignFunction<CudaStream, int*> stream_is_capturing{"cudaStreamIsCapturing"};
  ForeignFunction<CudaStream, CudaEvent, unsigned> stream_wait_event{"cudaStreamWaitEvent"};
  ForeignFunction<CudaEvent*, unsigned> event_create{"cudaEventCreateWithFlags"};
  ForeignFunction<CudaEvent> event_destroy{"cudaEventDestroy"};
  ForeignFunction<CudaEvent, CudaStream> event_record{"cudaEventRecord"};
  ForeignFunction<CudaEvent> event_query{"cudaEventQuery"};
  ForeignFunction<float*, CudaEvent, CudaEvent> event_elapsed_time{"cudaEventElapsedTime"};
  ForeignFunction<void*, const void*, size_t, int, CudaStream> memcpy_async{"cudaMemcpyAsync"};
  ForeignFunction<void**, size_t, unsigned> host_alloc{"cudaHostAlloc"};
  ForeignFunction<void*> free_host{"cudaFreeHost"};
  ForeignFunction<int*> exchange_capture_mode{"cudaThreadExchangeStreamCaptureMode"};
  // And forgets it.
  ForeignFunction<> get_last_error{"cudaGetLastError"};

 private:
  CudaRuntime(const std::string& path, const std::vector<std::string>& folders);

  template <typename Self, typename Visit>
  static void for_each_function(Self& self, Visit visit);
  static std::string explain(const void* runtime, int status);

  DynamicLibrary library_;
  const char* (*get_error_string_)(int) = nullptr;
};

// The calling thread works on `device` until the end of the scope.
class DeviceScope {
 public:
  DeviceScope(const CudaRuntime& cuda, int device);
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  ~DeviceScope() { cuda_.set_device.status(before_); }

 private:
  const CudaRuntime& cuda_;
  int before_ = 0;
};

// What the following three own is released by the process that has made it, and by none of its
// forked children, for whom CUDA does not work. Releasing ignores errors: at the end of a program
// the runtime may be gone already.

// A stream of the current device.
class Stream {
 public:
  // Of the highest priority that the device has: its kernels start before those that wait
  // elsewhere.
  explicit Stream(const CudaRuntime& cuda);
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream();

  CudaStream get() const { return stream_; }
  // Blocks the calling thread.
  void synchronize() const { cuda_.stream_synchronize(stream_); }

 private:
  const CudaRuntime& cuda_;
  CudaStream stream_ = nullptr;
  OwnerProcess owner_;
};

// A mark on a stream of the current device. May be recorded anew: who waits, waits for the latest
// mark at that moment.
class Event {
 public:
  enum class Timing { kNo, kYes };
  Event(const CudaRuntime& cuda, Timing timing);
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event();

  CudaEvent get() const { return event_; }
  void record(CudaStream stream) { cuda_.event_record(event_, stream); }
  // Whether the stream has passed the mark. Throws what has broken the device, if something has.
  bool has_passed() const;
  // The stream goes on only after this mark; the host does not wait.
  void hold_back(CudaStream stream) const { cuda_.stream_wait_event(stream, event_, 0); }
  // Both with timing, and passed.
  double seconds_since(const Event& earlier) const;

 private:
  const CudaRuntime& cuda_;
  CudaEvent event_ = nullptr;
  OwnerProcess owner_;
};

// Host memory that copies and kernels of all devices reach directly, at the same address. Zeroed.
class PinnedMemory {
 public:
  PinnedMemory(const CudaRuntime& cuda, size_t bytes);
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;
  ~PinnedMemory();

  void* data() const { return data_; }

 private:
  const CudaRuntime& cuda_;
  void* data_ = nullptr;
  OwnerProcess owner_;
};

}  // namespace pyar
