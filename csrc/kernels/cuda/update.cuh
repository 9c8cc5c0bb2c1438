// The SGD step of a bucket, and what it finds among the gradients.
#pragma once

#include <cmath>
#include <type_traits>

#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/pack128.cuh"

namespace pyar {

// Accesses under way per thread and span; with three spans that is 96 bytes. See kElementwiseBatch.
constexpr int kUpdateBatch = 2;

// In the arguments of one launch, which hold 4 KiB; more groups take more launches.
constexpr uint32_t kRulesPerLaunch = 32;

struct UpdateArguments {
  const UpdateChunk* chunks;
  size_t num_chunks;
  char *weights, *momentum, *gradients, *copies;
  const void* flags;
  double scale;
  const float* loss_scale;
  const double* clip;
  bool zero_gradients;
  Gate gate;
  Finding* findings;  // one per chunk; null: not wanted
  uint32_t first_rule, num_rules;
  UpdateRule rules[kRulesPerLaunch];  // of groups [first_rule, first_rule + num_rules)
};
static_assert(sizeof(UpdateArguments) <= 4096);

PYAR_KERNEL_CODE bool is_closed(const Gate& gate) {
  return (gate.found_inf && *gate.found_inf != 0) ||
         (gate.aborted && *static_cast<const volatile uint32_t*>(gate.aborted) != 0);
}

PYAR_KERNEL_CODE double scale_of(const UpdateArguments& a) {
  double scale = a.scale;
  if (a.loss_scale) scale *= 1.0 / static_cast<double>(*a.loss_scale);
  if (a.clip) scale *= *a.clip;
  return scale;
}

PYAR_KERNEL_CODE SgdStep step_of(const UpdateRule& rule) {
  if (!rule.learning_rate) return {rule.scalars, 0, rule.idle_scale};
  return step_at(rule.form, rule.scalars, static_cast<double>(*rule.learning_rate),
                 rule.momentum_unit ? *rule.momentum_unit : 0);
}

// Any bit but those of zero, as SharedMemoryGroup::update.
template <typename G>
PYAR_KERNEL_CODE bool is_used(const void* flags, uint32_t piece) {
  if (!flags) return true;
  const auto* bytes = static_cast<const unsigned char*>(flags) + size_t{piece} * sizeof(G);
  unsigned any = 0;
  for (size_t i = 0; i < sizeof(G); ++i) any |= bytes[i];
  return any != 0;
}

template <typename Acc>
PYAR_KERNEL_CODE void add(Finding& finding, Acc gradient) {
  const auto value = static_cast<double>(gradient);
  finding.sum_squares += value * value;
  finding.nonfinite |= !(gradient - gradient == 0);
}

PYAR_KERNEL_CODE void merge(Finding& finding, const Finding& other) {
  finding.sum_squares += other.sum_squares;
  finding.nonfinite |= other.nonfinite;
}

struct FindingPerThread {
  Finding of[kBlockThreads];
};

// Thread 0's becomes the sum of all, in an order that never changes.
template <typename Block>
PYAR_KERNEL_CODE void sum_up(const Block& block, FindingPerThread& shared) {
  for (unsigned half = kBlockThreads / 2; half > 0; half /= 2) {
    block.barrier();
    block.each_thread([&](unsigned thread) {
      if (thread < half) merge(shared.of[thread], shared.of[thread + half]);
    });
  }
  block.barrier();  // thread 0 has read what others write next
}

// One thread reads a host's flag for the whole update, which then is done or not done: never in
// part.
struct LatchBody {
  struct Arguments {
    const uint32_t* aborted;
    uint32_t* latched;
  };
  using Shared = NothingShared;

  template <typename Block>
  PYAR_KERNEL_CODE static void run(const Block& block, const Arguments& a, Shared&) {
    block.each_thread([&](unsigned thread) {
      if (thread == 0) *a.latched = *static_cast<const volatile uint32_t*>(a.aborted);
    });
  }
};

// The gradients' values as the update sees them: scaled, rounded to the weights' type W.
template <typename W, typename Acc>
PYAR_KERNEL_CODE Acc mean_of(Acc gradient, Acc scale) {
  return static_cast<Acc>(narrow<W>(gradient * scale));
}

template <typename G, typename W, bool kFinds>
struct UpdateBody {
  using Acc = AccType<W>;
  using Arguments = UpdateArguments;
  using Shared = std::conditional_t<kFinds, FindingPerThread, NothingShared>;

  template <typename Block>
  PYAR_KERNEL_CODE static void run(const Block& block, const Arguments& a, Shared& shared) {
    if (is_closed(a.gate)) return;
    const auto scale = static_cast<Acc>(scale_of(a));
    for (size_t i = block.index(); i < a.num_chunks; i += block.count()) {
      const UpdateChunk chunk = a.chunks[i];
      if (chunk.group - a.first_rule >= a.num_rules) continue;  // of another launch
      const SgdStep step = step_of(a.rules[chunk.group - a.first_rule]);
      const bool used = is_used<G>(a.flags, chunk.piece);
      block.each_thread([&](unsigned thread) {
        Finding found{};
        if (used)
          update(a, chunk, step.scalars, scale, thread, found);
        else
          rest(a, chunk, static_cast<Acc>(step.idle_scale), thread);
        if constexpr (kFinds) shared.of[thread] = found;
      });
      if constexpr (kFinds) {
        sum_up(block, shared);
        block.each_thread([&](unsigned thread) {
          if (thread == 0) a.findings[i] = shared.of[0];
        });
      }
    }
  }

 private:
  static constexpr int kWidth = kWidthOf<G, W>;

  PYAR_KERNEL_CODE static void update(const Arguments& a, const UpdateChunk& chunk,
                                      const SgdScalars& scalars, Acc scale, unsigned thread,
                                      Finding& found) {
    if (chunk.momentum == kNoSpan)
      return walk<SgdKind::kPlain>(a, chunk, scalars, scale, thread, found);
    if (scalars.nesterov) return walk<SgdKind::kNesterov>(a, chunk, scalars, scale, thread, found);
    walk<SgdKind::kMomentum>(a, chunk, scalars, scale, thread, found);
  }

  template <SgdKind kKind>
  PYAR_KERNEL_CODE static void walk(const Arguments& a, const UpdateChunk& chunk,
                                    const SgdScalars& scalars, Acc scale, unsigned thread,
                                    Finding& found) {
    const SgdFactors<Acc> factors(scalars);
    auto* const gradient = span_at<G>(a.gradients, chunk.gradient);
    auto* const weight = span_at<W>(a.weights, chunk.weight);
    auto* const momentum = span_at<W>(a.momentum, chunk.momentum);
    each_element<kWidth, kUpdateBatch>(
        thread, chunk.head, chunk.num_elems, [&](const auto& access) {
          using A = std::decay_t<decltype(access)>;
          Tile<Acc, A> g, w, u{};
          g.load(gradient, access);
          w.load(weight, access);
          if constexpr (kKind != SgdKind::kPlain) u.load(momentum, access);
          w.each([&](Acc& value, int k, int j) {
            const Acc mean = mean_of<W>(g.at[k][j], scale);
            if constexpr (kFinds) add(found, mean);
            value = sgd_rule<kKind>(mean, value, u.at[k][j], factors);
          });
          if constexpr (kKind != SgdKind::kPlain) u.store(momentum, access);
          w.store(weight, access);
          if constexpr (!std::is_same_v<G, W>)
            if (chunk.copy != kNoSpan) w.store(span_at<G>(a.copies, chunk.copy), access);
          if (a.zero_gradients) Tile<Acc, A>{}.store(gradient, access);
        });
  }

  PYAR_KERNEL_CODE static void rest(const Arguments& a, const UpdateChunk& chunk, Acc idle_scale,
                                    unsigned thread) {
    if (chunk.momentum == kNoSpan || idle_scale == 1) return;
    auto* const momentum = span_at<W>(a.momentum, chunk.momentum);
    each_element<kWidth, kUpdateBatch>(thread, chunk.head, chunk.num_elems,
                                       [&](const auto& access) {
                                         Tile<Acc, std::decay_t<decltype(access)>> u;
                                         u.load(momentum, access);
                                         u.each([&](Acc& value, int, int) { value *= idle_scale; });
                                         u.store(momentum, access);
                                       });
  }
};

// Of the update's gradients, without the update.
template <typename G, typename W>
struct InspectBody {
  using Acc = AccType<W>;
  using Arguments = UpdateArguments;
  using Shared = FindingPerThread;

  template <typename Block>
  PYAR_KERNEL_CODE static void run(const Block& block, const Arguments& a, Shared& shared) {
    if (is_closed(a.gate)) return;
    const auto scale = static_cast<Acc>(scale_of(a));
    for (size_t i = block.index(); i < a.num_chunks; i += block.count()) {
      const UpdateChunk chunk = a.chunks[i];
      const bool used = is_used<G>(a.flags, chunk.piece);
      const auto* gradient = span_at<const G>(a.gradients, chunk.gradient);
      block.each_thread([&](unsigned thread) {
        Finding found{};
        if (used)
          each_element<kWidthOf<G, W>, kBatch>(
              thread, chunk.head, chunk.num_elems, [&](const auto& access) {
                Tile<Acc, std::decay_t<decltype(access)>> g;
                g.load(gradient, access);
                g.each([&](Acc& value, int, int) { add(found, mean_of<W>(value, scale)); });
              });
        shared.of[thread] = found;
      });
      sum_up(block, shared);
      block.each_thread([&](unsigned thread) {
        if (thread == 0) a.findings[i] = shared.of[0];
      });
    }
  }

 private:
  static constexpr int kBatch = 4;  // one span is read, where the update reads three
};

// One block: the findings of all chunks, in the table's order for each thread.
struct FinishBody {
  struct Arguments {
    const Finding* findings;
    size_t num_chunks;
    Gate gate;
    UpdateFindings result;
  };
  using Shared = FindingPerThread;

  template <typename Block>
  PYAR_KERNEL_CODE static void run(const Block& block, const Arguments& a, Shared& shared) {
    if (is_closed(a.gate)) return;
    block.each_thread([&](unsigned thread) {
      Finding found{};
      for (size_t i = thread; i < a.num_chunks; i += kBlockThreads) merge(found, a.findings[i]);
      shared.of[thread] = found;
    });
    sum_up(block, shared);
    block.each_thread([&](unsigned thread) {
      if (thread != 0) return;
      if (a.result.sum_squares) *a.result.sum_squares += shared.of[0].sum_squares;
      if (a.result.found_inf && shared.of[0].nonfinite) *a.result.found_inf = 1;
    });
  }
};

struct CloseStepBody {
  struct Arguments {
    Gate gate;
    size_t num_rules;
    UpdateRule rules[kRulesPerLaunch];
  };
  using Shared = NothingShared;

  template <typename Block>
  PYAR_KERNEL_CODE static void run(const Block& block, const Arguments& a, Shared&) {
    if (is_closed(a.gate)) return;
    block.each_thread([&](unsigned thread) {
      if (thread >= a.num_rules) return;
      const UpdateRule& rule = a.rules[thread];
      if (rule.learning_rate && rule.momentum_unit) *rule.momentum_unit = step_of(rule).unit;
    });
  }
};

struct ClipBody {
  struct Arguments {
    const double* sum_squares;
    double max_norm;
    double* factor;
  };
  using Shared = NothingShared;

  template <typename Block>
  PYAR_KERNEL_CODE static void run(const Block& block, const Arguments& a, Shared&) {
    block.each_thread([&](unsigned thread) {
      if (thread != 0) return;
      const double factor = a.max_norm / (sqrt(*a.sum_squares) + 1e-6);
      *a.factor = factor < 1 ? factor : 1;
    });
  }
};

}  // namespace pyar
