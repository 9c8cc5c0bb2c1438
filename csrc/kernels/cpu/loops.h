// The CPU loops, once; baseline.cc, avx2.cc and avx512.cc compile them under different flags.
//
// Note [One table]: an inline function or template with external linkage that is emitted here
// becomes a weak symbol, and the linker may keep the AVX-512 copy for everyone. So all of this has
// internal linkage, helpers from outside are always_inline, and of std:: only types are used.
#pragma once

#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/lanes.h"

namespace pyar {
namespace {

template <DType kDType, Op kOp, int kLanes>
PYAR_ALWAYS_INLINE auto combine(Accs<kDType, kLanes> a, Accs<kDType, kLanes> b) {
  using V = Accs<kDType, kLanes>;
  if constexpr (kOp == Op::kMin || kOp == Op::kMax) {
    // Comparisons with NaN are false: a NaN in b is returned by "else", one in a by the second
    // test.
    const auto keep = kOp == Op::kMin ? a < b : a > b;
    if constexpr (is_floating(kDType))
      return (keep | (a != a)) ? a : b;
    else
      return keep ? a : b;
  } else if constexpr (is_floating(kDType)) {
    return kOp == Op::kProd ? a * b : a + b;
  } else {  // unsigned, which wraps
    using U = Lanes<std::make_unsigned_t<Acc<kDType>>, kLanes>;
    const U x = __builtin_bit_cast(U, a), y = __builtin_bit_cast(U, b);
    return __builtin_bit_cast(V, static_cast<U>(kOp == Op::kProd ? x * y : x + y));
  }
}

// Loops run in blocks of kVectors vectors held in registers, so that each source is read in runs of
// whole cache lines; then vector by vector; then element by element. A pointer of a list is read
// once per block: the compiler must assume that a store changes the list.
template <DType kDType>
constexpr int kLanesOf = kVectorBytes / static_cast<int>(sizeof(Acc<kDType>));
constexpr int kReduceBlock = 4, kConvertBlock = 4, kSgdBlock = 2;

template <DType kDType, int kLanes, int kVectors>
struct Block {
  Accs<kDType, kLanes> vector[kVectors];

  PYAR_ALWAYS_INLINE static constexpr size_t offset(int v) { return size_t(v) * kLanes; }
  PYAR_ALWAYS_INLINE void load_from(const void* base, size_t i) {
    for (int v = 0; v < kVectors; ++v) vector[v] = load<kDType, kLanes>(base, i + offset(v));
  }
  template <Op kOp>
  PYAR_ALWAYS_INLINE void combine_with(const void* base, size_t i) {
    for (int v = 0; v < kVectors; ++v)
      vector[v] =
          combine<kDType, kOp, kLanes>(vector[v], load<kDType, kLanes>(base, i + offset(v)));
  }
  // As stored: a 16-bit float may overflow only in rounding.
  PYAR_ALWAYS_INLINE bool is_finite() const {
    Accs<kDType, kLanes> poison{};  // 0, or NaN from the first inf or NaN on
    for (const auto& value : vector) {
      const auto stored = widen<kDType>(narrow<kDType>(value));
      poison += stored - stored;
    }
    return !any(poison != poison);
  }
  PYAR_ALWAYS_INLINE void store_to(void* base, size_t i) const {
    for (int v = 0; v < kVectors; ++v) store<kDType, kLanes>(base, i + offset(v), vector[v]);
  }
};

// Finds out who brought the inf or NaN among elements [begin, end) of a sum, before the sources are
// overwritten. Never in a loop that matters.
template <DType kDType>
[[gnu::cold, gnu::noinline]] void blame(NonFinite& nonfinite, const void* const* sources,
                                        size_t num_sources, Acc<kDType> scale, size_t begin,
                                        size_t end) {
  if (nonfinite.elem != NonFinite::kNone) return;
  for (size_t i = begin; i < end; ++i) {
    Block<kDType, 1, 1> sum{};
    size_t culprit = NonFinite::kNone;
    for (size_t k = num_sources; k-- > 0;) {
      Block<kDType, 1, 1> one;
      one.load_from(sources[k], i);
      if (!one.is_finite()) culprit = k;
    }
    for (size_t k = 0; k < num_sources; ++k) sum.template combine_with<Op::kSum>(sources[k], i);
    sum.vector[0] *= scale;
    if (sum.is_finite()) continue;
    nonfinite = {i, culprit};
    return;
  }
}

template <DType kDType, Op kOp, int kLanes, int kVectors>
PYAR_ALWAYS_INLINE size_t reduce_blocks(size_t i, Acc<kDType> scale, const ReduceSpans& spans) {
  constexpr size_t kStep = size_t{kLanes} * kVectors;
  for (; i + kStep <= spans.num_elems; i += kStep) {
    Block<kDType, kLanes, kVectors> acc;
    acc.load_from(spans.sources[0], i);
    for (size_t k = 1; k < spans.num_sources; ++k)
      acc.template combine_with<kOp>(spans.sources[k], i);
    if constexpr (kOp == Op::kAvg)
      for (auto& value : acc.vector) value *= scale;
    if constexpr (is_floating(kDType) && (kOp == Op::kSum || kOp == Op::kAvg))
      if (spans.nonfinite && !acc.is_finite()) [[unlikely]]
        blame<kDType>(*spans.nonfinite, spans.sources, spans.num_sources, scale, i, i + kStep);
    for (size_t k = 0; k < spans.num_destinations; ++k) acc.store_to(spans.destinations[k], i);
  }
  return i;
}

template <DType kDType, Op kOp>
void reduce_loop(double scale, const ReduceSpans& spans_in) {
  const ReduceSpans spans = spans_in;  // out of reach of the stores
  const auto factor = static_cast<Acc<kDType>>(kOp == Op::kAvg ? scale : 1.0);
  size_t i = reduce_blocks<kDType, kOp, kLanesOf<kDType>, kReduceBlock>(0, factor, spans);
  i = reduce_blocks<kDType, kOp, kLanesOf<kDType>, 1>(i, factor, spans);
  reduce_blocks<kDType, kOp, 1, 1>(i, factor, spans);
}

// Element i is added in lane i % kSquareLanes, whatever the width of the machine's vectors.
constexpr int kSquareLanes = 8;

template <DType kDType>
double sum_squares_loop(const void* data, size_t num_elems) {
  Lanes<double, kSquareLanes> sums{};
  size_t i = 0;
  for (; i + kSquareLanes <= num_elems; i += kSquareLanes) {
    Lanes<double, kSquareLanes> values;
    if constexpr (size_of(kDType) >= 4) {
      using V = Lanes<Stored<kDType>, kSquareLanes>;
      const V stored = load_bits<V>(static_cast<const Stored<kDType>*>(data) + i);
      values = __builtin_convertvector(stored, Lanes<double, kSquareLanes>);
    } else {
      for (int k = 0; k < kSquareLanes; ++k) values[k] = load<kDType, 1>(data, i + size_t(k));
    }
    sums += values * values;
  }
  for (; i < num_elems; ++i) {
    const double value = load<kDType, 1>(data, i);
    sums[i % kSquareLanes] += value * value;
  }
  double total = 0;
  for (int k = 0; k < kSquareLanes; ++k) total += sums[k];
  return total;
}

template <DType kFrom, DType kTo, int kLanes, int kVectors>
PYAR_ALWAYS_INLINE size_t convert_blocks(size_t i, const void* source, void* destination,
                                         size_t num_elems) {
  constexpr size_t kStep = size_t{kLanes} * kVectors;
  for (; i + kStep <= num_elems; i += kStep) {
    Block<DType::kFloat32, kLanes, kVectors> block;
    for (int v = 0; v < kVectors; ++v)
      block.vector[v] = load<kFrom, kLanes>(source, i + block.offset(v));
    for (int v = 0; v < kVectors; ++v)
      store<kTo, kLanes>(destination, i + block.offset(v), block.vector[v]);
  }
  return i;
}

template <DType kFrom, DType kTo>
void convert_loop(const void* source, void* destination, size_t num_elems) {
  constexpr int kLanes = kLanesOf<DType::kFloat32>;
  const size_t i =
      convert_blocks<kFrom, kTo, kLanes, kConvertBlock>(0, source, destination, num_elems);
  convert_blocks<kFrom, kTo, 1, 1>(i, source, destination, num_elems);
}

template <DType kDType, SgdKind kKind, int kLanes, int kVectors>
PYAR_ALWAYS_INLINE size_t sgd_blocks(size_t i, Acc<kDType> scale,
                                     const SgdFactors<Acc<kDType>>& factors,
                                     const SgdSpans& spans) {
  constexpr size_t kStep = size_t{kLanes} * kVectors;
  for (; i + kStep <= spans.num_elems; i += kStep) {
    Block<kDType, kLanes, kVectors> g, w, u{};
    g.load_from(spans.gradients[0], i);
    for (size_t k = 1; k < spans.num_gradients; ++k)
      g.template combine_with<Op::kSum>(spans.gradients[k], i);
    w.load_from(spans.weights[0], i);
    if constexpr (kKind != SgdKind::kPlain) u.load_from(spans.momentum, i);
    for (auto& value : g.vector)  // a scale of 1 multiplies exactly
      value *= scale;
    if (spans.nonfinite && !g.is_finite()) [[unlikely]]
      blame<kDType>(*spans.nonfinite, spans.gradients, spans.num_gradients, scale, i, i + kStep);
    for (int v = 0; v < kVectors; ++v) {
      // Through the storage type, as if reduce() had stored it.
      const auto mean = widen<kDType>(narrow<kDType>(g.vector[v]));
      w.vector[v] = sgd_rule<kKind>(mean, w.vector[v], u.vector[v], factors);
    }
    if constexpr (kKind != SgdKind::kPlain) u.store_to(spans.momentum, i);
    for (size_t k = 0; k < spans.num_weights; ++k) w.store_to(spans.weights[k], i);
    if (spans.zero_gradients)
      for (size_t k = 0; k < spans.num_gradients; ++k)
        Block<kDType, kLanes, kVectors>{}.store_to(spans.gradients[k], i);
  }
  return i;
}

template <DType kDType, SgdKind kKind>
void sgd_kind(const SgdScalars& scalars, double scale, const SgdSpans& spans_in) {
  const SgdSpans spans = spans_in;  // out of reach of the stores
  const SgdFactors<Acc<kDType>> factors(scalars);
  const auto factor = static_cast<Acc<kDType>>(scale);
  constexpr int kLanes = kLanesOf<kDType>;
  const size_t i = sgd_blocks<kDType, kKind, kLanes, kSgdBlock>(0, factor, factors, spans);
  sgd_blocks<kDType, kKind, 1, 1>(i, factor, factors, spans);
}

template <DType kDType>
void sgd_loop(const SgdScalars& scalars, double scale, const SgdSpans& spans) {
  if (spans.momentum == nullptr) return sgd_kind<kDType, SgdKind::kPlain>(scalars, scale, spans);
  if (scalars.nesterov) return sgd_kind<kDType, SgdKind::kNesterov>(scalars, scale, spans);
  sgd_kind<kDType, SgdKind::kMomentum>(scalars, scale, spans);
}

template <DType kDType>
constexpr void fill(KernelTable& table) {
  constexpr auto kRow = static_cast<uint32_t>(kDType);
  auto& reduce = table.reduce[kRow];
  reduce[static_cast<uint32_t>(Op::kSum)] = reduce_loop<kDType, Op::kSum>;
  reduce[static_cast<uint32_t>(Op::kProd)] = reduce_loop<kDType, Op::kProd>;
  reduce[static_cast<uint32_t>(Op::kMin)] = reduce_loop<kDType, Op::kMin>;
  reduce[static_cast<uint32_t>(Op::kMax)] = reduce_loop<kDType, Op::kMax>;
  if constexpr (is_floating(kDType)) {
    reduce[static_cast<uint32_t>(Op::kAvg)] = reduce_loop<kDType, Op::kAvg>;
    table.sgd[kRow] = sgd_loop<kDType>;
    table.sum_squares[kRow] = sum_squares_loop<kDType>;
  }
  if constexpr (size_of(kDType) == 2) {
    table.to_float32[kRow] = convert_loop<kDType, DType::kFloat32>;
    table.from_float32[kRow] = convert_loop<DType::kFloat32, kDType>;
  }
}

constexpr KernelTable table_of_this_file(const char* isa) {
  KernelTable table{};
  table.isa = isa;
  fill<DType::kFloat64>(table);
  fill<DType::kFloat32>(table);
  fill<DType::kBFloat16>(table);
  fill<DType::kFloat16>(table);
  fill<DType::kInt64>(table);
  fill<DType::kInt32>(table);
  fill<DType::kUInt8>(table);
  return table;
}

}  // namespace
}  // namespace pyar
