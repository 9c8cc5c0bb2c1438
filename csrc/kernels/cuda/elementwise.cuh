// Copy, reduction, and casts of many spans at once.
#pragma once

#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/pack128.cuh"

namespace pyar {

// Accesses under way per thread. The machine needs some 23 KiB per multiprocessor (4.3 TB/s, 0.7
// us, 132 of them); 4 of 16 bytes fill that with 384 threads.
constexpr int kElementwiseBatch = 4;

// What a block takes of a single span at a time.
template <typename T>
constexpr size_t kSpanChunk = kChunkBytes / sizeof(T);

// Whole words, to measure bandwidth with.
struct CopyBody {
  struct Arguments {
    const uint32_t* source;
    uint32_t* destination;
    size_t head, num_words;
  };
  using Shared = NothingShared;

  template <typename Block>
  PYAR_KERNEL_CODE static void run(const Block& block, const Arguments& a, Shared&) {
    each_element_of_span<kWidthOf<uint32_t>, kElementwiseBatch, kSpanChunk<uint32_t>>(
        block, a.head, a.num_words, [&](size_t begin, const auto& access) {
          move(a.source + begin, a.destination + begin, access);
        });
  }

 private:
  template <int kWidth, int kBatch>
  PYAR_KERNEL_CODE static void move(const uint32_t* source, uint32_t* destination,
                                    const Accesses<kWidth, kBatch>& access) {
    using Words = Pack<uint32_t, kWidth>;
    Words words[kBatch];
    PYAR_UNROLL
    for (int k = 0; k < kBatch; ++k)
      words[k] = *reinterpret_cast<const Words*>(source + access.at(k));
    PYAR_UNROLL
    for (int k = 0; k < kBatch; ++k) store_whole(destination + access.at(k), words[k]);
  }
};

// Pointers travel in the arguments, so the caller's list may die when the launch returns.
struct PointerList {
  void* at[kMaxCudaSpans];
  int count;
};

// Sum in source order times scale.
template <typename T>
struct ReduceBody {
  struct Arguments {
    PointerList sources, destinations;
    AccType<T> scale;
    size_t head, num_elems;
  };
  using Shared = NothingShared;

  template <typename Block>
  PYAR_KERNEL_CODE static void run(const Block& block, const Arguments& a, Shared&) {
    each_element_of_span<kWidthOf<T>, kElementwiseBatch, kSpanChunk<T>>(
        block, a.head, a.num_elems,
        [&](size_t begin, const auto& access) { reduce(a, begin, access); });
  }

 private:
  template <typename A>
  PYAR_KERNEL_CODE static void reduce(const Arguments& a, size_t begin, const A& access) {
    Tile<AccType<T>, A> sum, next;
    sum.load(static_cast<const T*>(a.sources.at[0]) + begin, access);
    for (int s = 1; s < a.sources.count; ++s) {
      next.load(static_cast<const T*>(a.sources.at[s]) + begin, access);
      sum.each([&](AccType<T>& value, int k, int j) { value += next.at[k][j]; });
    }
    sum.each([&](AccType<T>& value, int, int) { value *= a.scale; });
    for (int d = 0; d < a.destinations.count; ++d)
      sum.store(static_cast<T*>(a.destinations.at[d]) + begin, access);
  }
};

// destination = source * scale, rounded once; also in place.
template <typename From, typename To>
struct CastBody {
  struct Arguments {
    const SpanChunk* chunks;
    size_t num_chunks;
    const char* sources;
    char* destinations;
    AccType<From> scale;
  };
  using Shared = NothingShared;

  template <typename Block>
  PYAR_KERNEL_CODE static void run(const Block& block, const Arguments& a, Shared&) {
    for (size_t i = block.index(); i < a.num_chunks; i += block.count()) {
      const SpanChunk chunk = a.chunks[i];
      const auto* source = span_at<const From>(a.sources, chunk.source);
      auto* destination = span_at<To>(a.destinations, chunk.destination);
      block.each_thread([&](unsigned thread) {
        each_element<kWidthOf<From, To>, kElementwiseBatch>(
            thread, chunk.head, chunk.num_elems,
            [&](const auto& access) { cast(source, destination, a.scale, access); });
      });
    }
  }

 private:
  template <typename A>
  PYAR_KERNEL_CODE static void cast(const From* source, To* destination, AccType<From> scale,
                                    const A& access) {
    Tile<AccType<From>, A> values;
    values.load(source, access);
    values.each([&](AccType<From>& value, int, int) { value *= scale; });
    values.store(destination, access);
  }
};

}  // namespace pyar
