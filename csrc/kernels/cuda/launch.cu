// The kernels on a GPU.
#include <algorithm>
#include <atomic>
#include <cuda_runtime.h>
#include <string>

#include "kernels/cuda/launchers.cuh"

namespace pyar {
namespace {

// Clears the runtime's memory of the error: others in this process ask it after launches of theirs.
void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());
  throw Error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <typename Body>
__global__ void __launch_bounds__(kBlockThreads)
    kernel(const __grid_constant__ typename Body::Arguments arguments) {
  __shared__ typename Body::Shared shared;
  Body::run(DeviceBlock{}, arguments, shared);
}

// Blocks of this kernel that the current device holds at once. Asked once per device: the question
// costs more than a launch, and loads the kernel, which a graph capture may not.
template <typename Body>
unsigned resident_blocks() {
  constexpr int kMaxDevices = 64;
  static std::atomic<unsigned> known[kMaxDevices];
  int device = 0, per_processor = 0, processors = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  // Relaxed: whoever comes second finds the same number.
  if (device < kMaxDevices)
    if (const unsigned blocks = known[device].load(std::memory_order_relaxed)) return blocks;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  check(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel<Body>, kBlockThreads, 0),
      "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  const auto blocks = static_cast<unsigned>(std::max(processors * per_processor, 1));
  if (device < kMaxDevices) known[device].store(blocks, std::memory_order_relaxed);
  return blocks;
}

// A persistent grid: as many blocks as fit, each takes every so-manyeth part.
struct DeviceGrid {
  template <typename Body>
  static void run(const typename Body::Arguments& arguments, size_t num_parts,
                  const Launch& launch) {
    const size_t most = launch.max_blocks ? launch.max_blocks : resident_blocks<Body>();
    const auto blocks = static_cast<unsigned>(std::min(num_parts, most));
    void* values[] = {const_cast<typename Body::Arguments*>(&arguments)};
    check(cudaLaunchKernel(kernel<Body>, dim3(blocks), dim3(kBlockThreads), values, 0,
                           static_cast<cudaStream_t>(launch.stream)),
          "cudaLaunchKernel");
  }
};

}  // namespace

const CudaKernels& cuda_kernels() {
  static constexpr CudaKernels kKernels = Launchers<DeviceGrid>::table();
  return kKernels;
}

int device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice) {
    static_cast<void>(cudaGetLastError());
    return 0;
  }
  check(error, "cudaGetDeviceCount");
  return count;
}

}  // namespace pyar
