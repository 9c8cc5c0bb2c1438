// 16 bytes per memory access, for every CUDA kernel; and what surrounds a launch. C++17.
#pragma once

#include <algorithm>
#include <cuda_runtime.h>
#include <string>

#include "base/dtype.h"
#include "base/error.h"
#include "kernels/cuda/cuda_kernels.h"

#define PYAR_CUDA(call)                                                              \
  do {                                                                               \
    const cudaError_t pyar_error = (call);                                           \
    if (pyar_error != cudaSuccess)                                                   \
      throw ::pyar::Error(std::string(#call ": ") + cudaGetErrorString(pyar_error)); \
  } while (false)

namespace pyar {

// kWidth elements that move in one access: 16 bytes in the body of a loop, a single element in its
// tail.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T elems[kWidth];
};
template <typename T>
constexpr int kWidth128 = 16 / sizeof(T);

template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <typename T>
using AccType = typename AccOf<T>::type;

template <typename T, int kWidth>
__device__ __forceinline__ void load(const void* base, size_t index, AccType<T> (&values)[kWidth]) {
  const auto pack = *reinterpret_cast<const Pack<T, kWidth>*>(static_cast<const T*>(base) + index);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) values[j] = static_cast<AccType<T>>(pack.elems[j]);
}

// Rounds to the storage type; NaN becomes the one quiet NaN, as on the CPU.
template <typename T>
__device__ __forceinline__ T narrow(AccType<T> value) {
  return value != value ? static_cast<T>(static_cast<AccType<T>>(__builtin_nan("")))
                        : static_cast<T>(value);
}

template <typename T, int kWidth>
__device__ __forceinline__ void store(void* base, size_t index,
                                      const AccType<T> (&values)[kWidth]) {
  Pack<T, kWidth> pack;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) pack.elems[j] = narrow<T>(values[j]);
  *reinterpret_cast<Pack<T, kWidth>*>(static_cast<T*>(base) + index) = pack;
}

// Pointers travel in the kernel's arguments, so the lists may die when the launcher returns.
struct PointerList {
  void* at[kMaxCudaSpans];
  int count;

  PointerList(void* const* pointers, size_t num_pointers) : at{}, count(int(num_pointers)) {
    if (num_pointers > kMaxCudaSpans)
      throw UsageError("a CUDA kernel takes at most " + std::to_string(kMaxCudaSpans) + " spans");
    std::copy(pointers, pointers + num_pointers, at);
  }
  bool aligned128() const {
    return std::all_of(at, at + count,
                       [](void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
  }
};

constexpr int kBlockThreads = 256;

// Fills today's largest GPUs (H200: 132 SMs x 8 blocks); the kernels' grid strides do the rest. Not
// tuned yet.
inline unsigned blocks_for(size_t num_accesses) {
  const size_t blocks = (num_accesses + kBlockThreads - 1) / kBlockThreads;
  return static_cast<unsigned>(std::clamp<size_t>(blocks, 1, 2048));
}

// Calls launch(T{}) with the element type of a floating dtype.
template <typename Launch>
void with_type(DType dtype, Launch launch) {
  switch (dtype) {
    case DType::kFloat64:
      return launch(double{});
    case DType::kFloat32:
      return launch(float{});
    case DType::kBFloat16:
      return launch(BFloat16{});
    case DType::kFloat16:
      return launch(Float16{});
    default:
      throw UsageError(std::string("no CUDA kernel for ") + name_of(dtype));
  }
}

}  // namespace pyar
