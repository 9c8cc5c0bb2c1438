// What groups do with buffers of the host besides reducing them.
#pragma once

#include <cstddef>
#include <memory>

#include "group/group.h"

namespace pyar {

// Grows and never shrinks, so that its pages are mapped once.
class Scratch {
 public:
  // Contents are undefined.
  std::byte* at_least(size_t bytes);

 private:
  std::unique_ptr<std::byte[]> data_;
  size_t bytes_ = 0;
};

// Partial sums of 16-bit floats are float32; the total is rounded once.
constexpr DType accumulator_of(DType dtype) {
  return is_floating(dtype) && size_of(dtype) == 2 ? DType::kFloat32 : dtype;
}

// Copies, and converts between float32 and the 16-bit floats. Onto itself: nothing.
void assign(Span to, ConstSpan from);

}  // namespace pyar
