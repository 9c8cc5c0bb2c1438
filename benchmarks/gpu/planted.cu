// A fault of each kind that a sanitizer must find before its silence about our kernels means
// anything. In our namespace: the filter by name is shown to let them through.
#include <cstdio>
#include <cstring>
#include <cuda_runtime.h>

namespace pyar {

constexpr int kThreads = 64;  // two warps: within one, shared memory would be in order by accident

__global__ void planted_past_the_end(int* data) { data[threadIdx.x + 1] = 1; }

// Reads what the other warp has written, without waiting for it.
__global__ void planted_race(int* data) {
  __shared__ int tile[kThreads];
  tile[threadIdx.x] = data[threadIdx.x];
  data[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

}  // namespace pyar

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  int* data = nullptr;
  cudaError_t error = cudaMalloc(&data, pyar::kThreads * sizeof(int));
  if (error == cudaSuccess) error = cudaMemset(data, 0, pyar::kThreads * sizeof(int));
  if (error == cudaSuccess) {
    if (std::strcmp(argv[1], "memcheck") == 0)
      pyar::planted_past_the_end<<<1, pyar::kThreads>>>(data);
    else
      pyar::planted_race<<<1, pyar::kThreads>>>(data);
    error = cudaDeviceSynchronize();
  }
  std::printf("%s\n", cudaGetErrorString(error));
  return 0;
}
