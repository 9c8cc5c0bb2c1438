#include "kernels/cuda/pack128.cuh"

namespace pyar {
namespace {

template <typename T, int kWidth>
__device__ __forceinline__ void reduce_at(const PointerList& sources,
                                          const PointerList& destinations, AccType<T> scale,
                                          size_t index) {
  AccType<T> sum[kWidth], next[kWidth];
  load<T>(sources.at[0], index, sum);
  for (int k = 1; k < sources.count; ++k) {
    load<T>(sources.at[k], index, next);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum[j] += next[j];
  }
#pragma unroll
  for (int j = 0; j < kWidth; ++j) sum[j] *= scale;
  for (int k = 0; k < destinations.count; ++k) store<T>(destinations.at[k], index, sum);
}

// Elements [0, num_packed) go 16 bytes at a time, the rest one by one.
template <typename T>
__global__ void reduce_kernel(PointerList sources, PointerList destinations, AccType<T> scale,
                              size_t num_packed, size_t num_elems) {
  constexpr int kWidth = kWidth128<T>;
  const size_t thread = blockIdx.x * size_t{blockDim.x} + threadIdx.x;
  const size_t stride = gridDim.x * size_t{blockDim.x};
  for (size_t i = thread * kWidth; i < num_packed; i += stride * kWidth)
    reduce_at<T, kWidth>(sources, destinations, scale, i);
  for (size_t i = num_packed + thread; i < num_elems; i += stride)
    reduce_at<T, 1>(sources, destinations, scale, i);
}

}  // namespace

// ---- launchers ----

int device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice) return 0;
  PYAR_CUDA(error);
  return count;
}

void launch_reduce(DType dtype, double scale, const ReduceSpans& spans, void* stream) {
  if (spans.num_elems == 0) return;
  const PointerList sources(const_cast<void* const*>(spans.sources), spans.num_sources);
  const PointerList destinations(spans.destinations, spans.num_destinations);
  const bool packed = sources.aligned128() && destinations.aligned128();
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const size_t width = packed ? kWidth128<T> : 1;
    const size_t num_packed = packed ? spans.num_elems / width * width : 0;
    reduce_kernel<T><<<blocks_for(spans.num_elems / width), kBlockThreads, 0,
                       static_cast<cudaStream_t>(stream)>>>(
        sources, destinations, static_cast<AccType<T>>(scale), num_packed, spans.num_elems);
  });
  PYAR_CUDA(cudaGetLastError());
}

}  // namespace pyar
