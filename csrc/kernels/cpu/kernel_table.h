// What one instruction set exports: a table of functions, and nothing else (see loops.h).
#pragma once

#include "kernels/kernels.h"

namespace pyar {

// nullptr where there is no such kernel: kAvg, sum_squares and sgd of integers, conversions from
// float32 to itself.
struct KernelTable {
  const char* isa;
  void (*reduce[kNumDTypes][kNumOps])(double scale, const ReduceSpans& spans);
  double (*sum_squares[kNumDTypes])(const void* data, size_t num_elems);
  void (*to_float32[kNumDTypes])(const void* source, void* destination, size_t num_elems);
  void (*from_float32[kNumDTypes])(const void* source, void* destination, size_t num_elems);
  void (*sgd[kNumDTypes])(const SgdScalars& scalars, double scale, const SgdSpans& spans);
};

extern const KernelTable kBaselineTable;
#if defined(__x86_64__)
extern const KernelTable kAvx2Table, kAvx512Table;
#endif

}  // namespace pyar
