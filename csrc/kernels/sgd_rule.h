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
