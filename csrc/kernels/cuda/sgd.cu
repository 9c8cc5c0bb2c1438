#include "kernels/cuda/pack128.cuh"
#include "kernels/sgd_rule.h"

namespace pyar {
namespace {

template <typename T, SgdKind kKind, int kWidth>
__device__ __forceinline__ void sgd_at(const PointerList& gradients, const PointerList& weights,
                                       void* momentum, AccType<T> scale,
                                       const SgdFactors<AccType<T>>& factors, bool zero_gradients,
                                       size_t index) {
  AccType<T> g[kWidth], next[kWidth], w[kWidth], u[kWidth] = {};
  load<T>(gradients.at[0], index, g);
  for (int k = 1; k < gradients.count; ++k) {
    load<T>(gradients.at[k], index, next);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) g[j] += next[j];
  }
  load<T>(weights.at[0], index, w);
  if (kKind != SgdKind::kPlain) load<T>(momentum, index, u);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    const auto mean = static_cast<AccType<T>>(narrow<T>(g[j] * scale));
    w[j] = sgd_rule<kKind>(mean, w[j], u[j], factors);
  }
  if (kKind != SgdKind::kPlain) store<T>(momentum, index, u);
  for (int k = 0; k < weights.count; ++k) store<T>(weights.at[k], index, w);
  if (!zero_gradients) return;
  const AccType<T> zero[kWidth] = {};
  for (int k = 0; k < gradients.count; ++k) store<T>(gradients.at[k], index, zero);
}

// Elements [0, num_packed) go 16 bytes at a time, the rest one by one.
template <typename T, SgdKind kKind>
__global__ void sgd_kernel(PointerList gradients, PointerList weights, void* momentum,
                           AccType<T> scale, SgdFactors<AccType<T>> factors, bool zero_gradients,
                           size_t num_packed, size_t num_elems) {
  constexpr int kWidth = kWidth128<T>;
  const size_t thread = blockIdx.x * size_t{blockDim.x} + threadIdx.x;
  const size_t stride = gridDim.x * size_t{blockDim.x};
  for (size_t i = thread * kWidth; i < num_packed; i += stride * kWidth)
    sgd_at<T, kKind, kWidth>(gradients, weights, momentum, scale, factors, zero_gradients, i);
  for (size_t i = num_packed + thread; i < num_elems; i += stride)
    sgd_at<T, kKind, 1>(gradients, weights, momentum, scale, factors, zero_gradients, i);
}

}  // namespace

// ---- launchers ----

void launch_sgd(DType dtype, const SgdScalars& scalars, double scale, const SgdSpans& spans,
                void* stream) {
  if (spans.num_elems == 0) return;
  const PointerList gradients(spans.gradients, spans.num_gradients);
  const PointerList weights(spans.weights, spans.num_weights);
  const PointerList momentum(&spans.momentum, 1);  // nullptr counts as aligned
  const bool packed = gradients.aligned128() && weights.aligned128() && momentum.aligned128();
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const size_t width = packed ? kWidth128<T> : 1;
    const size_t num_packed = packed ? spans.num_elems / width * width : 0;
    const auto kernel = !spans.momentum    ? sgd_kernel<T, SgdKind::kPlain>
                        : scalars.nesterov ? sgd_kernel<T, SgdKind::kNesterov>
                                           : sgd_kernel<T, SgdKind::kMomentum>;
    kernel<<<blocks_for(spans.num_elems / width), kBlockThreads, 0,
             static_cast<cudaStream_t>(stream)>>>(
        gradients, weights, spans.momentum, static_cast<AccType<T>>(scale),
        SgdFactors<AccType<T>>(scalars), spans.zero_gradients, num_packed, spans.num_elems);
  });
  PYAR_CUDA(cudaGetLastError());
}

}  // namespace pyar
