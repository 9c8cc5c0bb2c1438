// The SGD update of one element: the only statement of the formula, for the CPU loops and the CUDA
// kernels. C++17.
#pragma once

#include "base/dtype.h"

namespace pyar {

// The two forms of momentum SGD are instances of one rule; m is the momentum, lr_t the learning
// rate of this update:
//   reference (PyTorch)    history = m                  gain = 1     rate = lr_t
//   absorbed (paper, 10)   history = m lr_t / lr_{t-1}  gain = lr_t  rate = 1      (history = m: no
//   correction)
// and momentum = m in both. Products with 1 are exact, so neither form pays for the other's factors
// in rounding.
struct SgdScalars {
  double decay = 0, history = 0, gain = 1, momentum = 0, rate = 0;
  bool nesterov = false;
};

// How they follow the learning rate; kCorrected is the absorbed form with the paper's correction.
enum class SgdForm : uint32_t { kReference, kAbsorbed, kCorrected };

// One update at learning rate `rate`, where a corrected momentum was kept in units of the learning
// rate `unit` until now (0: there is none yet).
struct SgdStep {
  SgdScalars scalars;
  double unit;        // of the momentum from now on: at rate 0 it stays what it was
  double idle_scale;  // of a momentum that this update does not touch: the change of unit
};

// `fixed`: decay, momentum, nesterov. As scalars_of() in pyallreduce/sgd.py.
PYAR_ALWAYS_INLINE SgdStep step_at(SgdForm form, const SgdScalars& fixed, double rate,
                                   double unit) {
  SgdStep step{fixed, unit, 1};
  step.scalars.history = fixed.momentum;
  step.scalars.gain = form == SgdForm::kReference ? 1 : rate;
  step.scalars.rate = form == SgdForm::kReference ? rate : 1;
  if (form != SgdForm::kCorrected) return step;
  step.unit = rate != 0 ? rate : unit != 0 ? unit : 1;
  step.idle_scale = unit != 0 ? step.unit / unit : 1;
  step.scalars.history = fixed.momentum * step.idle_scale;
  step.scalars.gain = step.unit;
  step.scalars.rate = rate != 0 ? 1 : 0;
  return step;
}

// The scalars as the arithmetic uses them: double for float64, float for everything else.
template <typename Scalar>
struct SgdFactors {
  Scalar decay, history, gain, momentum, rate;

  PYAR_ALWAYS_INLINE explicit SgdFactors(const SgdScalars& s)
      : decay(static_cast<Scalar>(s.decay)),
        history(static_cast<Scalar>(s.history)),
        gain(static_cast<Scalar>(s.gain)),
        momentum(static_cast<Scalar>(s.momentum)),
        rate(static_cast<Scalar>(s.rate)) {}
};

enum class SgdKind { kPlain, kMomentum, kNesterov };

// Returns the new weight and updates the momentum buffer u (not touched, and not needed, by
// kPlain). Value is a Scalar or a vector of them. Every translation unit that includes this is
// compiled without contraction to FMA
// (-ffp-contract=off, nvcc -fmad=false), so that the bits are those of separate roundings
// everywhere.
template <SgdKind kKind, typename Value, typename Scalar>
PYAR_ALWAYS_INLINE Value sgd_rule(Value g, Value w, Value& u, const SgdFactors<Scalar>& s) {
  g = g + s.decay * w;
  const Value step = s.gain * g;
  if (kKind == SgdKind::kPlain) return w - s.rate * step;
  u = s.history * u + step;
  const Value d = kKind == SgdKind::kNesterov ? step + s.momentum * u : u;
  return w - s.rate * d;
}

}  // namespace pyar
