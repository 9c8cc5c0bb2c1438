// Vectors of elements: loading, storing and rounding them. Part of loops.h: see Note [One table]
// there.
#pragma once

#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "base/dtype.h"

namespace pyar {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// kLanes elements side by side. One lane is the plain type, so that the tail of a loop is the same
// code as its body.
template <typename T, int kLanes>
struct LanesOf {
  typedef T type __attribute__((vector_size(sizeof(T) * kLanes)));
};
template <typename T>
struct LanesOf<T, 1> {
  using type = T;
};
template <typename T, int kLanes>
using Lanes = typename LanesOf<T, kLanes>::type;

// How elements lie in memory (Stored) and are calculated with (Acc).
template <typename StoredType, typename AccType = StoredType>
struct ElementOf {
  using Stored = StoredType;
  using Acc = AccType;
};
// clang-format off
template <DType kDType> struct Element;
template <> struct Element<DType::kFloat64> : ElementOf<double> {};
template <> struct Element<DType::kFloat32> : ElementOf<float> {};
template <> struct Element<DType::kBFloat16> : ElementOf<uint16_t, float> {};
template <> struct Element<DType::kFloat16> : ElementOf<uint16_t, float> {};
template <> struct Element<DType::kInt64> : ElementOf<int64_t> {};
template <> struct Element<DType::kInt32> : ElementOf<int32_t> {};
template <> struct Element<DType::kUInt8> : ElementOf<uint8_t> {};
// clang-format on
template <DType kDType>
using Stored = typename Element<kDType>::Stored;
template <DType kDType>
using Acc = typename Element<kDType>::Acc;
template <DType kDType, int kLanes>
using Accs = Lanes<Acc<kDType>, kLanes>;

template <typename V>
PYAR_ALWAYS_INLINE V load_bits(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <typename V>
PYAR_ALWAYS_INLINE void store_bits(void* to, V value) {
  __builtin_memcpy(to, &value, sizeof value);
}

// Which of two payloads an addition keeps depends on an operand order that compilers choose: keep
// neither.
template <typename T, typename V>
PYAR_ALWAYS_INLINE V same_nan(V value) {
  return value != value ? V{} + static_cast<T>(__builtin_nan("")) : value;
}

// Of a comparison: true in any lane.
template <typename Mask>
PYAR_ALWAYS_INLINE bool any(Mask mask) {
  if constexpr (std::is_same_v<Mask, bool>) {
    return mask;
  } else {
    const auto words = __builtin_bit_cast(Lanes<uint64_t, sizeof(Mask) / 8>, mask);
    uint64_t all = 0;
    for (size_t k = 0; k < sizeof(Mask) / 8; ++k) all |= words[k];
    return all != 0;
  }
}

// The full vectors of 16-bit elements and their conversions, in the machine's instructions where a
// compiler would need several (g++ 12: five for a zero extension). They agree in every bit with the
// portable ones of dtype.h.
constexpr int kFloatLanes = kVectorBytes / 4;
using Floats = Lanes<float, kFloatLanes>;
using Words = Lanes<uint32_t, kFloatLanes>;
using Halves = Lanes<uint16_t, kFloatLanes>;

#if defined(__AVX512F__)
constexpr __mmask16 kAll = 0xffff;  // the unmasked forms warn about an undefined register in g++ 12
PYAR_ALWAYS_INLINE Words extend(Halves x) {
  return (Words)_mm512_maskz_cvtepu16_epi32(kAll, (__m256i)x);
}
PYAR_ALWAYS_INLINE Halves truncate(Words x) {
  return (Halves)_mm512_maskz_cvtepi32_epi16(kAll, (__m512i)x);
}
PYAR_ALWAYS_INLINE Floats from_float16(Halves x) {
  return (Floats)_mm512_maskz_cvtph_ps(kAll, (__m256i)x);
}
PYAR_ALWAYS_INLINE Halves to_float16(Floats x) {
  return (Halves)_mm512_maskz_cvtps_ph(kAll, (__m512)same_nan<float>(x), _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__AVX2__)
PYAR_ALWAYS_INLINE Words extend(Halves x) { return (Words)_mm256_cvtepu16_epi32((__m128i)x); }
PYAR_ALWAYS_INLINE Halves truncate(Words x) {  // saturates, but no word has a 17th bit
  return (Halves)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)x),
                                  _mm256_extracti128_si256((__m256i)x, 1));
}
PYAR_ALWAYS_INLINE Floats from_float16(Halves x) { return (Floats)_mm256_cvtph_ps((__m128i)x); }
PYAR_ALWAYS_INLINE Halves to_float16(Floats x) {
  return (Halves)_mm256_cvtps_ph((__m256)same_nan<float>(x), _MM_FROUND_TO_NEAREST_INT);
}
#else
PYAR_ALWAYS_INLINE Words extend(Halves x) { return __builtin_convertvector(x, Words); }
PYAR_ALWAYS_INLINE Halves truncate(Words x) { return __builtin_convertvector(x, Halves); }
PYAR_ALWAYS_INLINE Floats from_float16(Halves x) { return float16_to_float<Floats>(extend(x)); }
PYAR_ALWAYS_INLINE Halves to_float16(Floats x) { return truncate(float_to_float16<Words>(x)); }
#endif

// As memory holds the value, and back. Single elements go through the storage types of dtype.h.
template <DType kDType, typename V>
PYAR_ALWAYS_INLINE auto narrow(V value) {
  if constexpr (kDType == DType::kBFloat16 && std::is_same_v<V, Floats>) {
    return truncate(float_to_bfloat16<Words>(value));
  } else if constexpr (kDType == DType::kFloat16 && std::is_same_v<V, Floats>) {
    return to_float16(value);
  } else if constexpr (kDType == DType::kBFloat16) {
    return BFloat16(value).bits;
  } else if constexpr (kDType == DType::kFloat16) {
    return Float16(value).bits;
  } else if constexpr (is_floating(kDType)) {
    return same_nan<Acc<kDType>>(value);
  } else {
    return value;
  }
}

template <DType kDType, typename V>
PYAR_ALWAYS_INLINE auto widen(V stored) {
  if constexpr (kDType == DType::kBFloat16 && std::is_same_v<V, Halves>) {
    return bfloat16_to_float<Floats>(extend(stored));
  } else if constexpr (kDType == DType::kFloat16 && std::is_same_v<V, Halves>) {
    return from_float16(stored);
  } else if constexpr (kDType == DType::kBFloat16) {
    return bfloat16_to_float<float>(uint32_t{stored});
  } else if constexpr (kDType == DType::kFloat16) {
    return float16_to_float<float>(uint32_t{stored});
  } else {
    return stored;
  }
}

template <DType kDType, int kLanes>
PYAR_ALWAYS_INLINE Accs<kDType, kLanes> load(const void* base, size_t index) {
  const void* from = static_cast<const Stored<kDType>*>(base) + index;
  return widen<kDType>(load_bits<Lanes<Stored<kDType>, kLanes>>(from));
}

template <DType kDType, int kLanes>
PYAR_ALWAYS_INLINE void store(void* base, size_t index, Accs<kDType, kLanes> value) {
  store_bits(static_cast<Stored<kDType>*>(base) + index, narrow<kDType>(value));
}

}  // namespace
}  // namespace pyar
