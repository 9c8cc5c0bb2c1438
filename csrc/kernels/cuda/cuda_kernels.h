// Launchers of the CUDA kernels, for code that does not see CUDA's headers. Spans point to memory
// of the current device (or that it can reach), lists of pointers to host memory. Work is queued on
// `stream` (a cudaStream_t); nothing waits or allocates. Results have the bits of the CPU kernels
// (kernels.h).
#pragma once

#include "kernels/kernels.h"

namespace pyar {

inline constexpr size_t kMaxCudaSpans = 16;

// 0 also where there is no driver or it is too old; other failures throw.
int device_count();

// Sum in source order times `scale`. Floating dtypes.
void launch_reduce(DType dtype, double scale, const ReduceSpans& spans, void* stream);

void launch_sgd(DType dtype, const SgdScalars& scalars, double scale, const SgdSpans& spans,
                void* stream);

}  // namespace pyar
