// 16 bytes per memory access, for every kernel: elements on their way between memory and registers.
#pragma once

#include "kernels/cuda/grid.cuh"

namespace pyar {

// What is calculated with: double for float64, float for everything else.
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

// Elements per access where spans of two types are walked together: the wider one moves 16 bytes.
template <typename A, typename B = A>
constexpr int kWidthOf = 16 / static_cast<int>(sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));

// A chunk's span. nvcc sees that it is global memory by the base, which is an argument; a base may
// be null, from where sanitizers allow no pointer arithmetic.
template <typename T, typename Byte>
PYAR_KERNEL_CODE T* span_at(Byte* base, uint64_t offset) {
#if defined(__CUDACC__)
  return reinterpret_cast<T*>(base + offset);
#else
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base) + offset);
#endif
}

// kWidth elements that move in one access.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T elems[kWidth];
};

// One access, also where nvcc would split the assignment of a struct into stores of its elements,
// as it does in loops over destinations.
template <typename Whole>
PYAR_KERNEL_CODE void store_whole(void* to, const Whole& pack) {
#if defined(__CUDACC__)
  if constexpr (sizeof(Whole) == 16)
    __stwb(static_cast<uint4*>(to), __builtin_bit_cast(uint4, pack));
  else if constexpr (sizeof(Whole) == 8)
    __stwb(static_cast<uint2*>(to), __builtin_bit_cast(uint2, pack));
  else
#endif
    *static_cast<Whole*>(to) = pack;
}

// Rounds to the storage type; NaN becomes the one quiet NaN, as on the CPU.
template <typename T, typename Acc>
PYAR_KERNEL_CODE T narrow(Acc value) {
  return value != value ? static_cast<T>(static_cast<AccType<T>>(__builtin_nan("")))
                        : static_cast<T>(static_cast<AccType<T>>(value));
}

// A thread's elements of one span, in registers. Loads and stores of a batch are independent of
// each other: all of them are under way before the first is waited for.
template <typename Acc, typename A>
struct Tile {
  Acc at[A::kBatch][A::kWidth];

  template <typename T>
  PYAR_KERNEL_CODE void load(const T* span, const A& access) {
    Pack<T, A::kWidth> packs[A::kBatch];
    PYAR_UNROLL
    for (int k = 0; k < A::kBatch; ++k)
      packs[k] = *reinterpret_cast<const Pack<T, A::kWidth>*>(span + access.at(k));
    PYAR_UNROLL
    for (int k = 0; k < A::kBatch; ++k) {
      PYAR_UNROLL
      for (int j = 0; j < A::kWidth; ++j)
        at[k][j] = static_cast<Acc>(static_cast<AccType<T>>(packs[k].elems[j]));
    }
  }

  template <typename T>
  PYAR_KERNEL_CODE void store(T* span, const A& access) const {
    PYAR_UNROLL
    for (int k = 0; k < A::kBatch; ++k) {
      Pack<T, A::kWidth> pack;
      PYAR_UNROLL
      for (int j = 0; j < A::kWidth; ++j) pack.elems[j] = narrow<T>(at[k][j]);
      store_whole(span + access.at(k), pack);
    }
  }

  // change(element) for each; the index pair finds the same element in another tile.
  template <typename Change>
  PYAR_KERNEL_CODE void each(const Change& change) {
    PYAR_UNROLL
    for (int k = 0; k < A::kBatch; ++k) {
      PYAR_UNROLL
      for (int j = 0; j < A::kWidth; ++j) change(at[k][j], k, j);
    }
  }
};

}  // namespace pyar
