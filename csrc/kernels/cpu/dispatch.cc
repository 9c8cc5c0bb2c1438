#include <atomic>
#include <string>

#include "base/error.h"
#include "kernels/cpu/kernel_table.h"

namespace pyar {
namespace {

struct Candidate {
  const KernelTable* table;
  bool (*runs_here)();
};

constexpr Candidate kBestFirst[] = {
#if defined(__x86_64__)
    {&kAvx512Table,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {&kAvx2Table, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }},
#endif
    {&kBaselineTable, [] { return true; }},
};

std::atomic<const KernelTable*>& active() {
  static std::atomic<const KernelTable*> table = [] {
    for (const Candidate& candidate : kBestFirst)
      if (candidate.runs_here()) return candidate.table;
    return &kBaselineTable;
  }();
  return table;
}

// Relaxed: the tables are constants, nothing is published with the pointer.
const KernelTable& chosen(const KernelTable* table) {
  return table ? *table : *active().load(std::memory_order_relaxed);
}

[[noreturn]] void refuse(const std::string& what, DType dtype) {
  throw UsageError("no kernel for " + what + " of " + name_of(dtype));
}

}  // namespace

std::vector<std::string_view> isas() {
  std::vector<std::string_view> names;
  for (const Candidate& candidate : kBestFirst)
    if (candidate.runs_here()) names.push_back(candidate.table->isa);
  return names;
}

const KernelTable* table_for(std::string_view isa) {
  for (const Candidate& candidate : kBestFirst)
    if (candidate.table->isa == isa && candidate.runs_here()) return candidate.table;
  return nullptr;
}

std::string_view active_isa() { return chosen(nullptr).isa; }

bool select_isa(std::string_view isa) {
  const KernelTable* table = table_for(isa);
  if (table) active().store(table, std::memory_order_relaxed);
  return table != nullptr;
}

void reduce(DType dtype, Op op, double scale, const ReduceSpans& spans, const KernelTable* table) {
  const auto kernel = chosen(table).reduce[static_cast<uint32_t>(dtype)][static_cast<uint32_t>(op)];
  if (!kernel) refuse(name_of(op), dtype);
  kernel(scale, spans);
}

double sum_squares(DType dtype, const void* data, size_t num_elems, const KernelTable* table) {
  const auto kernel = chosen(table).sum_squares[static_cast<uint32_t>(dtype)];
  if (!kernel) refuse("sum_squares", dtype);
  return kernel(data, num_elems);
}

void convert(DType from, const void* source, DType to, void* destination, size_t num_elems,
             const KernelTable* table) {
  const KernelTable& kernels = chosen(table);
  const auto kernel = to == DType::kFloat32     ? kernels.to_float32[static_cast<uint32_t>(from)]
                      : from == DType::kFloat32 ? kernels.from_float32[static_cast<uint32_t>(to)]
                                                : nullptr;
  if (!kernel) refuse("conversion", from == DType::kFloat32 ? to : from);
  kernel(source, destination, num_elems);
}

void sgd(DType dtype, const SgdScalars& scalars, double scale, const SgdSpans& spans,
         const KernelTable* table) {
  const auto kernel = chosen(table).sgd[static_cast<uint32_t>(dtype)];
  if (!kernel) refuse("sgd", dtype);
  kernel(scalars, scale, spans);
}

}  // namespace pyar
