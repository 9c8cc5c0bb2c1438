// Note [Twin]: a kernel is a Body, a type with
//   Arguments   plain values, copied to the device with the launch
//   Shared      what the threads of a block share
//   static void run(block, arguments, shared)   one block's work, in phases between barriers
// On a GPU (launch.cu) each thread runs its own part of a phase; on the host (twin.cc) one thread
// runs all parts in turn. So the source that a GPU runs is the source that `make test` runs,
// without a GPU and under the sanitizers, and its bits are compared with those of kernels/cpu. Both
// compilers are told not to contract a*b+c (-fmad=false, -ffp-contract=off). C++17.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"

#if defined(__CUDACC__)
#define PYAR_KERNEL_CODE __device__ __forceinline__
#define PYAR_UNROLL _Pragma("unroll")
#define PYAR_NO_UNROLL _Pragma("unroll 1")
#else  // in no hurry: unrolled, inlined and sanitized, the twin compiles for minutes
#define PYAR_KERNEL_CODE inline
#define PYAR_UNROLL
#define PYAR_NO_UNROLL
#endif

namespace pyar {

constexpr unsigned kBlockThreads = 256;

#if defined(__CUDACC__)
struct DeviceBlock {
  __device__ __forceinline__ size_t index() const { return blockIdx.x; }
  __device__ __forceinline__ size_t count() const { return gridDim.x; }
  // Calls phase(thread) for every thread of the block.
  template <typename Phase>
  __device__ __forceinline__ void each_thread(Phase phase) const {
    phase(threadIdx.x);
  }
  __device__ __forceinline__ void barrier() const { __syncthreads(); }
};
#else
class HostBlock {
 public:
  HostBlock(size_t index, size_t count) : index_(index), count_(count) {}
  size_t index() const { return index_; }
  size_t count() const { return count_; }
  template <typename Phase>
  void each_thread(Phase phase) const {
    for (unsigned thread = 0; thread < kBlockThreads; ++thread) phase(thread);
  }
  void barrier() const {}

 private:
  size_t index_, count_;
};
#endif

struct NothingShared {};

// kBatch accesses of one thread, kWidth elements side by side each. Neighbouring threads have
// neighbouring accesses.
template <int kWidthOfOne, int kNumAccesses>
struct Accesses {
  static constexpr int kWidth = kWidthOfOne, kBatch = kNumAccesses;
  static constexpr size_t kStride = size_t{kBlockThreads} * kWidth;
  size_t first;  // in elements

  PYAR_KERNEL_CODE size_t at(int k) const { return first + size_t(k) * kStride; }
};

// A thread's share of a block's elements [begin, end), a multiple of kWidth.
template <int kWidth, int kBatch, typename Visit>
PYAR_KERNEL_CODE void each_access(unsigned thread, size_t begin, size_t end, const Visit& visit) {
  constexpr size_t kStride = Accesses<kWidth, kBatch>::kStride;
  size_t i = begin + size_t{thread} * kWidth;
  for (; i + (kBatch - 1) * kStride < end; i += kBatch * kStride)
    visit(Accesses<kWidth, kBatch>{i});
  for (; i < end; i += kStride) visit(Accesses<kWidth, 1>{i});
}

// The same for any chunk: elements before `head` (chunk_table.h) and after the last whole access go
// one by one.
template <int kWidth, int kBatch, typename Visit>
PYAR_KERNEL_CODE void each_element(unsigned thread, size_t head, size_t num_elems,
                                   const Visit& visit) {
  const size_t end = head + (num_elems - head) / kWidth * kWidth;
  each_access<kWidth, kBatch>(thread, head, end, visit);
  PYAR_NO_UNROLL  // both ends share the code
      for (int k = 0; k < 2; ++k)
          each_access<1, kBatch>(thread, k == 0 ? 0 : end, k == 0 ? head : num_elems, visit);
}

// A single span, in chunks of kChunkElems, a multiple of kWidth: visit(begin of a chunk, accesses).
template <int kWidth, int kBatch, size_t kChunkElems, typename Block, typename Visit>
PYAR_KERNEL_CODE void each_element_of_span(const Block& block, size_t head, size_t num_elems,
                                           const Visit& visit) {
  for (size_t begin = block.index() * kChunkElems; begin < num_elems;
       begin += block.count() * kChunkElems) {
    const size_t rest = num_elems - begin, count = rest < kChunkElems ? rest : kChunkElems;
    block.each_thread([&](unsigned thread) {
      each_element<kWidth, kBatch>(thread, head < count ? head : count, count,
                                   [&](const auto& access) { visit(begin, access); });
    });
  }
}

}  // namespace pyar
