// The CUDA kernels, for code that does not see CUDA's headers; and their twin on the host, the same
// source run by one thread (Note [Twin] in grid.cuh). Addresses are of memory that the kernels can
// reach: the current device's (for the twin: the host's) if nothing else is said. Work is queued on
// a stream of the current device; nothing waits or allocates. Bits are those of the CPU kernels
// (kernels.h), whatever the device and the grid. C++17.
#pragma once

#include "kernels/cuda/chunk_table.h"
#include "kernels/kernels.h"

namespace pyar {

inline constexpr size_t kMaxCudaSpans = 16;

// Where and how wide a kernel runs.
struct Launch {
  void* stream = nullptr;   // a cudaStream_t
  unsigned max_blocks = 0;  // 0: as many as the device holds at once
};

// Of a param group.
struct UpdateRule {
  // If learning_rate is null, used as they are; else only decay, momentum and nesterov.
  SgdScalars scalars;
  double idle_scale = 1;  // as BucketUpdate's: of a momentum whose parameter no rank has used
  SgdForm form = SgdForm::kReference;
  // Read when the kernel runs: a scheduler, or a replayed CUDA graph, changes it in place.
  const float* learning_rate = nullptr;
  double* momentum_unit = nullptr;  // of kCorrected with learning_rate, see step_at(); 0 at first
};

// A flag that is set when it is found_inf != 0 or *aborted != 0: then nothing changes. Null: clear.
struct Gate {
  const float* found_inf = nullptr;
  const uint32_t* aborted = nullptr;  // may be host-mapped memory, of whatever host sets it
};

// Both are added to what is there, so that the buckets of an iteration add up in their order; set
// them to 0 at its beginning. A kernel that its gate has held back adds nothing.
struct UpdateFindings {
  float* found_inf = nullptr;     // 1 if a gradient, scaled, is inf or NaN
  double* sum_squares = nullptr;  // of the scaled gradients; null with found_inf null: do not look
};

struct UpdateCall {
  const void* table;  // the image of an UpdateTable, where the kernels can reach it
  // Multiples of 16 bytes, to which the table's offsets are added; null: those are addresses.
  char* weights = nullptr;
  char* momentum = nullptr;
  char* gradients = nullptr;
  char* copies = nullptr;
  // One element of the gradients' type per piece, zero where no rank has used the parameter: it
  // keeps weight and copy, and its momentum is multiplied by idle_scale. Null: all are used.
  const void* flags = nullptr;
  const UpdateRule* rules = nullptr;  // one per group, in host memory
  size_t num_rules = 0;
  // Gradients are multiplied by scale / *loss_scale * *clip; null: 1.
  double scale = 1;
  const float* loss_scale = nullptr;
  const double* clip = nullptr;
  bool zero_gradients = false;  // of used pieces; the others' are zero already
  Gate gate = {};
  UpdateFindings findings = {};
};

struct CastCall {
  const void* table;  // the image of a SpanTable
  const char* sources = nullptr;
  char* destinations = nullptr;
  double scale = 1;
};

// One implementation of all kernels.
struct CudaKernels {
  // Whole 4-byte words.
  void (*copy)(const void* source, void* destination, size_t num_bytes, const Launch&);
  // Sum in source order times scale, of floating dtypes, as reduce(kAvg). Lists of pointers lie in
  // host memory, at most kMaxCudaSpans each; spans.nonfinite is not looked at.
  void (*reduce)(DType, double scale, const ReduceSpans& spans, const Launch&);
  // Every span of the table, one launch: pack, unpack, cast, scale in place.
  void (*cast)(const SpanTable&, const CastCall&, const Launch&);
  // The SGD step of every piece of the table: one launch, before it one thread that reads a
  // host's `aborted` for all, after it one block that sums up findings, if these are wanted.
  // Gradients are rounded to the weights' type after scaling. Of 16-bit gradients with float32
  // weights, `copies` receives the new weights, rounded.
  void (*update)(const UpdateTable&, const UpdateCall&, const Launch&);
  // Only the findings of the same gradients.
  void (*inspect)(const UpdateTable&, const UpdateCall&, const Launch&);
  // After the last update of an iteration: the rules' momentum units become those that it has used.
  void (*close_step)(const UpdateRule* rules, size_t num_rules, const Gate&, const Launch&);
  // *factor = min(1, max_norm / (sqrt(*sum_squares) + 1e-6)), as clipping.py's coefficient().
  void (*clip)(const double* sum_squares, double max_norm, double* factor, const Launch&);
};

const CudaKernels& cuda_twin();

// Only where CUDA is compiled in:
const CudaKernels& cuda_kernels();
// 0 also where there is no driver or it is too old; other failures throw.
int device_count();

}  // namespace pyar
