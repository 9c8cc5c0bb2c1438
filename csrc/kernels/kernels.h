// Pure functions over spans: no allocation, no threads, no waiting. Their bits do not depend on the
// instruction set. Pointers need the alignment of one element only. A destination may be a source
// (the same pointer); otherwise spans do not overlap. NaN results are the positive quiet NaN.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "base/dtype.h"
#include "kernels/sgd_rule.h"

namespace pyar {

// The same kernels, compiled for one instruction set.
struct KernelTable;

// Of this CPU, the best first. "baseline" runs everywhere.
std::vector<std::string_view> isas();
// nullptr: unknown, or this CPU lacks it.
const KernelTable* table_for(std::string_view isa);
std::string_view active_isa();
// Chooses what calls without a table use; at start-up that is isas()[0]. False changes nothing.
bool select_isa(std::string_view isa);

// Where a result first is inf or NaN, and the source that brought it.
struct NonFinite {
  static constexpr size_t kNone = ~size_t{0};
  size_t elem = kNone;
  size_t source = kNone;  // kNone: all sources are finite, their sum is not
};

struct ReduceSpans {
  const void* const* sources;
  size_t num_sources;  // at least 1
  void* const* destinations;
  size_t num_destinations;
  size_t num_elems;
  NonFinite* nonfinite = nullptr;  // or null: do not look. Only sum and avg of floats look.
};

// In one pass: element i of all sources is combined in source order in the accumulator (float for
// the 16-bit floats, else the type itself), multiplied by `scale` if op is kAvg, rounded once,
// written to every destination. Integers wrap and have no kAvg (UsageError); min and max return NaN
// if any source holds one.
void reduce(DType dtype, Op op, double scale, const ReduceSpans& spans,
            const KernelTable* table = nullptr);

// In double precision, in an order that depends on nothing but num_elems. Floating dtypes only.
double sum_squares(DType dtype, const void* data, size_t num_elems,
                   const KernelTable* table = nullptr);

// Of the bytes as they lie in memory, in order; other bytes have another hash but for one case in
// 2^64. Words are little-endian, 8 bytes, zeros after the end. With
//   mix(h, w) = upper half ^ lower half of the 128-bit product (h ^ w) * 0x9e3779b97f4a7c15
// lane k of 8 starts as mix(seed, k + 1) and takes words k, k + 8, k + 16, ... by mix, over whole
// rounds of 8; the hash starts as num_bytes and takes lanes 0 to 7 by mix. Not for keeping secrets.
// One code for all instruction sets: a core multiplies faster than memory delivers.
uint64_t hash(const void* data, size_t num_bytes, uint64_t seed = 0);

// float32 from or to a 16-bit float, else UsageError. The spans do not overlap.
void convert(DType from, const void* source, DType to, void* destination, size_t num_elems,
             const KernelTable* table = nullptr);

struct SgdSpans {
  void* const* gradients;
  size_t num_gradients;  // at least 1
  void* const* weights;  // copies of the same values: read from the first, written to all
  size_t num_weights;
  void* momentum;  // nullptr: SGD without momentum
  size_t num_elems;
  bool zero_gradients;
  NonFinite* nonfinite = nullptr;  // of the scaled sum of the gradients; or null: do not look
};

// In one pass: g = scale * (sum of the gradients in order), rounded to the storage type, then
// sgd_rule.h in the accumulator type. The bits are those of reduce(kAvg) followed by sgd() of the
// result. Floating dtypes only.
void sgd(DType dtype, const SgdScalars& scalars, double scale, const SgdSpans& spans,
         const KernelTable* table = nullptr);

}  // namespace pyar
