// Element types and operations of the collectives, and the one place where 16-bit floats are
// converted.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyar {

enum class DType : uint32_t { kFloat64, kFloat32, kBFloat16, kFloat16, kInt64, kInt32, kUInt8 };
inline constexpr int kNumDTypes = 7;

enum class Op : uint32_t { kSum, kAvg, kProd, kMin, kMax };
inline constexpr int kNumOps = 5;

constexpr size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kUInt8:
      return 1;
  }
  return 0;
}

constexpr bool is_floating(DType dtype) {
  return dtype == DType::kFloat64 || dtype == DType::kFloat32 || dtype == DType::kBFloat16 ||
         dtype == DType::kFloat16;
}

constexpr const char* name_of(DType dtype) {
  constexpr const char* kNames[] = {"float64", "float32", "bfloat16", "float16",
                                    "int64",   "int32",   "uint8"};
  return static_cast<uint32_t>(dtype) < kNumDTypes ? kNames[static_cast<uint32_t>(dtype)] : "?";
}

constexpr const char* name_of(Op op) {
  constexpr const char* kNames[] = {"sum", "avg", "prod", "min", "max"};
  return static_cast<uint32_t>(op) < kNumOps ? kNames[static_cast<uint32_t>(op)] : "?";
}

// The kernels are compiled for several instruction sets. A helper emitted as a function of its own
// could be replaced by the linker with its copy for a newer CPU; what is always inlined leaves
// nothing to replace. Under nvcc: for the device too.
#if defined(__CUDACC__)
#define PYAR_ALWAYS_INLINE __host__ __device__ __forceinline__
#else
#define PYAR_ALWAYS_INLINE [[gnu::always_inline]] inline
#endif

// The 16-bit floats, stated once for a single value (Word uint32_t, Float float) and for vectors of
// them; a Word holds the 16 bits zero-extended. Rounding is to nearest even. Every NaN becomes the
// one positive quiet NaN: which payload survives arithmetic depends on an operand order that
// compilers choose.
template <typename Float, typename Word>
PYAR_ALWAYS_INLINE Float bfloat16_to_float(Word bits) {
  return __builtin_bit_cast(Float, bits << 16);
}

template <typename Word, typename Float>
PYAR_ALWAYS_INLINE Word float_to_bfloat16(Float value) {
  const Word bits = __builtin_bit_cast(Word, value);
  const Word wide = value != value ? Word{} + 0x7fc00000u : bits;
  // A carry may reach the exponent: that is how the largest values become infinity.
  return (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
}

template <typename Float, typename Word>
PYAR_ALWAYS_INLINE Float words_to_floats(Word values) {
#if !defined(__CUDACC__)  // which does not know the builtin, and has no vectors to convert
  if constexpr (sizeof(Word) != sizeof(uint32_t))
    return __builtin_convertvector(values, Float);
  else
#endif
    return static_cast<Float>(values);
}

template <typename Float, typename Word>
PYAR_ALWAYS_INLINE Float float16_to_float(Word bits) {
  const Word magnitude = bits & 0x7fffu;
  const Word normal = (magnitude << 13) + (112u << 23);  // the exponent's bias: 15 -> 127
  const Word infinite_or_nan = (magnitude << 13) | 0x7f800000u;
  // Through an integer, because a thread may flush subnormal floats to zero; this one is never
  // subnormal.
  const Word subnormal = __builtin_bit_cast(Word, words_to_floats<Float>(magnitude) * 0x1p-24f);
  const Word finite = magnitude < 0x400u ? subnormal : normal;
  const Word wide = magnitude >= 0x7c00u ? infinite_or_nan : finite;
  return __builtin_bit_cast(Float, wide | ((bits & 0x8000u) << 16));
}

template <typename Word, typename Float>
PYAR_ALWAYS_INLINE Word float_to_float16(Float value) {
  const Word bits = __builtin_bit_cast(Word, value);
  const Word magnitude = bits & 0x7fffffffu;
  // Adding 0.5 puts the half's subnormal unit (2^-24) at the lowest mantissa bit: the float unit
  // rounds.
  const Word subnormal =
      __builtin_bit_cast(Word, __builtin_bit_cast(Float, magnitude) + 0.5f) - 0x3f000000u;
  const Word normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Word finite = magnitude < 0x38800000u ? subnormal : normal;           // 2^-14
  const Word bounded = magnitude >= 0x477ff000u ? Word{} + 0x7c00u : finite;  // 65520
  const Word half = ((bits >> 16) & 0x8000u) | bounded;
  return value != value ? Word{} + 0x7e00u : half;
}

// Storage types.
struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  PYAR_ALWAYS_INLINE explicit BFloat16(float value)
      : bits(static_cast<uint16_t>(float_to_bfloat16<uint32_t>(value))) {}
  PYAR_ALWAYS_INLINE explicit operator float() const {
    return bfloat16_to_float<float>(uint32_t{bits});
  }
};

struct Float16 {
  uint16_t bits;

  Float16() = default;
  PYAR_ALWAYS_INLINE explicit Float16(float value)
      : bits(static_cast<uint16_t>(float_to_float16<uint32_t>(value))) {}
  PYAR_ALWAYS_INLINE explicit operator float() const {
    return float16_to_float<float>(uint32_t{bits});
  }
};
static_assert(sizeof(BFloat16) == 2 && sizeof(Float16) == 2);

}  // namespace pyar
