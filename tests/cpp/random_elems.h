// Inputs for kernels: random bits of any dtype.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "base/dtype.h"

namespace pyar::test {

// Any bits are a value: SplitMix64, Steele et al. 2014.
class Bits {
 public:
  explicit Bits(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

 private:
  uint64_t state_;
};

using Bytes = std::vector<unsigned char>;

// Values of middling size in every second run, so that rounding matters and not only infinities.
Bytes random_elems(DType dtype, size_t num_elems, Bits& bits, bool tame) {
  Bytes bytes(num_elems * size_of(dtype));
  for (size_t i = 0; i < num_elems; ++i) {
    uint64_t word = bits.next();
    if (tame && is_floating(dtype)) {
      const double value = double(int64_t(word) >> 32) * 0x1p-28;
      const float narrow = float(value);
      if (dtype == DType::kFloat64)
        std::memcpy(&word, &value, 8);
      else if (dtype == DType::kFloat32)
        std::memcpy(&word, &narrow, 4);
      else if (dtype == DType::kBFloat16)
        word = BFloat16(narrow).bits;
      else
        word = Float16(narrow).bits;
    }
    std::memcpy(&bytes[i * size_of(dtype)], &word, size_of(dtype));  // both machines: little-endian
  }
  return bytes;
}

}  // namespace pyar::test
