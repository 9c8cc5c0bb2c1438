// Coverage-guided fuzzing with g++ alone. A target is a function of bytes, by libFuzzer's name, so
// that clang's libFuzzer can drive it as well; fuzz.cpp is the driver for every compiler that knows
// -fsanitize-coverage=trace-pc. Why an own one: g++ has no libFuzzer, and a second compiler for one
// test is more to install than these two hundred lines are to read.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t num_bytes);

namespace pyar::test {

// The input, taken piece by piece; what is missing is zero.
class Input {
 public:
  Input(const uint8_t* data, size_t num_bytes) : rest_(data, num_bytes) {}
  bool empty() const { return rest_.empty(); }

  template <typename T>
  T take() {
    T value{};
    const std::span<const uint8_t> bytes = take_bytes(sizeof value);
    if (!bytes.empty()) std::memcpy(&value, bytes.data(), bytes.size());
    return value;
  }
  size_t below(size_t limit) { return take<uint16_t>() % limit; }
  std::span<const uint8_t> take_bytes(size_t wanted) {
    const auto taken = rest_.first(std::min(wanted, rest_.size()));
    rest_ = rest_.subspan(taken.size());
    return taken;
  }

 private:
  std::span<const uint8_t> rest_;
};

}  // namespace pyar::test
