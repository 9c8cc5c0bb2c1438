// From calls to launches: checks, types, order. The same source for both grids: a Grid has
//   template <typename Body> static void run(arguments, num_parts, launch)
// where more blocks than num_parts would have no work.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>

#include "base/error.h"
#include "kernels/cuda/elementwise.cuh"
#include "kernels/cuda/update.cuh"

namespace pyar {

template <typename Grid>
struct Launchers {
  static void copy(const void* source, void* destination, size_t num_bytes, const Launch& launch) {
    if (num_bytes % sizeof(uint32_t) != 0)
      throw UsageError("copy moves whole words of 4 bytes, not " + std::to_string(num_bytes));
    const size_t num_words = num_bytes / sizeof(uint32_t);
    if (num_words == 0) return;
    CommonHead head(kWidthOf<uint32_t>, num_words);
    head.add(bits_of(source), sizeof(uint32_t));
    head.add(bits_of(destination), sizeof(uint32_t));
    Grid::template run<CopyBody>({static_cast<const uint32_t*>(source),
                                  static_cast<uint32_t*>(destination), head.elems(), num_words},
                                 parts_of<uint32_t>(num_words), launch);
  }

  static void reduce(DType dtype, double scale, const ReduceSpans& spans, const Launch& launch) {
    if (spans.num_elems == 0) return;
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      CommonHead head(kWidthOf<T>, spans.num_elems);
      const PointerList sources =
          list_of(const_cast<void* const*>(spans.sources), spans.num_sources, sizeof(T), head);
      const PointerList destinations =
          list_of(spans.destinations, spans.num_destinations, sizeof(T), head);
      Grid::template run<ReduceBody<T>>(
          {sources, destinations, static_cast<AccType<T>>(scale), head.elems(), spans.num_elems},
          parts_of<T>(spans.num_elems), launch);
    });
  }

  static void cast(const SpanTable& table, const CastCall& call, const Launch& launch) {
    if (table.num_chunks() == 0) return;
    check_bases({call.table, call.sources, call.destinations});
    with_cast(table.from(), table.to(), [&](auto from, auto to) {
      using From = decltype(from);
      Grid::template run<CastBody<From, decltype(to)>>(
          {static_cast<const SpanChunk*>(call.table), table.num_chunks(), call.sources,
           call.destinations, static_cast<AccType<From>>(call.scale)},
          table.num_chunks(), launch);
    });
  }

  static void update(const UpdateTable& table, const UpdateCall& call, const Launch& launch) {
    if (table.num_chunks() == 0) return;
    check_rules(call.rules, call.num_rules);
    if (call.num_rules < table.num_groups())
      throw UsageError("an update of " + std::to_string(table.num_groups()) +
                       " groups has rules for " + std::to_string(call.num_rules));
    UpdateArguments arguments = prepare(table, call, launch);
    for (size_t first = 0; first < table.num_groups(); first += kRulesPerLaunch) {
      const size_t count = std::min<size_t>(table.num_groups() - first, kRulesPerLaunch);
      arguments.first_rule = static_cast<uint32_t>(first);
      arguments.num_rules = static_cast<uint32_t>(count);
      std::copy_n(call.rules + first, count, arguments.rules);
      with_update(table, [&](auto gradient, auto weight) {
        using G = decltype(gradient);
        using W = decltype(weight);
        if (arguments.findings)
          Grid::template run<UpdateBody<G, W, true>>(arguments, table.num_chunks(), launch);
        else
          Grid::template run<UpdateBody<G, W, false>>(arguments, table.num_chunks(), launch);
      });
    }
    if (arguments.findings) finish(arguments, call, launch);
  }

  static void inspect(const UpdateTable& table, const UpdateCall& call, const Launch& launch) {
    if (table.num_chunks() == 0) return;
    const UpdateArguments arguments = prepare(table, call, launch);
    if (!arguments.findings) throw UsageError("inspect without a place for what it finds");
    with_update(table, [&](auto gradient, auto weight) {
      Grid::template run<InspectBody<decltype(gradient), decltype(weight)>>(
          arguments, table.num_chunks(), launch);
    });
    finish(arguments, call, launch);
  }

  static void close_step(const UpdateRule* rules, size_t num_rules, const Gate& gate,
                         const Launch& launch) {
    check_rules(rules, num_rules);
    for (size_t first = 0; first < num_rules; first += kRulesPerLaunch) {
      CloseStepBody::Arguments arguments{
          gate, std::min<size_t>(num_rules - first, kRulesPerLaunch), {}};
      std::copy_n(rules + first, arguments.num_rules, arguments.rules);
      Grid::template run<CloseStepBody>(arguments, 1, launch);
    }
  }

  static void clip(const double* sum_squares, double max_norm, double* factor,
                   const Launch& launch) {
    Grid::template run<ClipBody>({sum_squares, max_norm, factor}, 1, launch);
  }

  static constexpr CudaKernels table() {
    return {copy, reduce, cast, update, inspect, close_step, clip};
  }

 private:
  static uint64_t bits_of(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

  template <typename T>
  static size_t parts_of(size_t num_elems) {
    return (num_elems + kSpanChunk<T> - 1) / kSpanChunk<T>;
  }

  static PointerList list_of(void* const* pointers, size_t count, size_t elem_bytes,
                             CommonHead& head) {
    if (count > kMaxCudaSpans)
      throw UsageError("a CUDA kernel takes at most " + std::to_string(kMaxCudaSpans) + " spans");
    PointerList list{};
    list.count = static_cast<int>(count);
    for (size_t i = 0; i < count; ++i) {
      list.at[i] = pointers[i];
      head.add(bits_of(pointers[i]), elem_bytes);
    }
    return list;
  }

  // The tables' heads are those of offsets.
  static void check_bases(std::initializer_list<const void*> bases) {
    for (const void* base : bases)
      if (bits_of(base) % 16 != 0)
        throw UsageError("tables and bases of their offsets must be aligned to 16 bytes");
  }

  static void check_rules(const UpdateRule* rules, size_t num_rules) {
    for (size_t i = 0; i < num_rules; ++i)
      if (rules[i].learning_rate && rules[i].form == SgdForm::kCorrected && !rules[i].momentum_unit)
        throw UsageError(
            "a corrected momentum with its learning rate on the device needs its unit there");
  }

  // Everything but the rules; queues the reading of a host's flag.
  static UpdateArguments prepare(const UpdateTable& table, const UpdateCall& call,
                                 const Launch& launch) {
    check_bases({call.table, call.weights, call.momentum, call.gradients, call.copies});
    char* const image = static_cast<char*>(const_cast<void*>(call.table));
    UpdateArguments a{};
    a.chunks = reinterpret_cast<const UpdateChunk*>(image);
    a.num_chunks = table.num_chunks();
    a.weights = call.weights;
    a.momentum = call.momentum;
    a.gradients = call.gradients;
    a.copies = call.copies;
    a.flags = call.flags;
    a.scale = call.scale;
    a.loss_scale = call.loss_scale;
    a.clip = call.clip;
    a.zero_gradients = call.zero_gradients;
    a.gate = call.gate;
    if (call.findings.found_inf || call.findings.sum_squares)
      a.findings = reinterpret_cast<Finding*>(image + table.findings_begin());
    if (call.gate.aborted) {
      auto* const latched = reinterpret_cast<uint32_t*>(image + table.aborted_begin());
      Grid::template run<LatchBody>({call.gate.aborted, latched}, 1, launch);
      a.gate.aborted = latched;
    }
    return a;
  }

  static void finish(const UpdateArguments& a, const UpdateCall& call, const Launch& launch) {
    Grid::template run<FinishBody>({a.findings, a.num_chunks, a.gate, call.findings}, 1, launch);
  }

  // Calls launch(T{}) with the element type of a floating dtype.
  template <typename Run>
  static void with_type(DType dtype, Run run) {
    switch (dtype) {
      case DType::kFloat64:
        return run(double{});
      case DType::kFloat32:
        return run(float{});
      case DType::kBFloat16:
        return run(BFloat16{});
      case DType::kFloat16:
        return run(Float16{});
      default:
        throw UsageError(std::string("no CUDA kernel for ") + name_of(dtype));
    }
  }

  template <typename Run>
  static void with_half(DType dtype, Run run) {
    if (dtype == DType::kBFloat16) return run(BFloat16{});
    run(Float16{});
  }

  template <typename Run>
  static void with_cast(DType from, DType to, Run run) {
    if (from == to) return with_type(from, [&](auto type) { run(type, type); });
    if (from == DType::kFloat32) return with_half(to, [&](auto half) { run(float{}, half); });
    with_half(from, [&](auto half) { run(half, float{}); });
  }

  template <typename Run>
  static void with_update(const UpdateTable& table, Run run) {
    if (table.gradient() == table.weight())
      return with_type(table.weight(), [&](auto type) { run(type, type); });
    with_half(table.gradient(), [&](auto half) { run(half, float{}); });
  }
};

}  // namespace pyar
