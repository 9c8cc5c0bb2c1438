#include <bit>
#include <cstring>

#include "kernels/kernels.h"

namespace pyar {
namespace {

static_assert(std::endian::native == std::endian::little, "hash() reads words as memory has them");

// Independent chains: a multiplication takes 3 or 4 cycles, and one can start in each.
constexpr size_t kLanes = 8;
__extension__ using Product = unsigned __int128;

// Both halves of the product: the lower one alone carries a change of a high bit (a sign) nowhere
// else, where the change of one other bit in the lane's next word could cancel it.
inline uint64_t mix(uint64_t hash, uint64_t word) {
  const Product product = Product{hash ^ word} * 0x9e3779b97f4a7c15u;
  return static_cast<uint64_t>(product >> 64) ^ static_cast<uint64_t>(product);
}

struct Lanes {
  uint64_t lane[kLanes];

  explicit Lanes(uint64_t seed) {
    for (size_t k = 0; k < kLanes; ++k) lane[k] = mix(seed, k + 1);
  }
  void add(const char* block) {
    for (size_t k = 0; k < kLanes; ++k) {
      uint64_t word;
      std::memcpy(&word, block + k * sizeof word, sizeof word);
      lane[k] = mix(lane[k], word);
    }
  }
};

}  // namespace

uint64_t hash(const void* data, size_t num_bytes, uint64_t seed) {
  constexpr size_t kBlock = sizeof(Lanes);
  const char* bytes = static_cast<const char*>(data);
  Lanes lanes(seed);
  size_t i = 0;
  for (; i + kBlock <= num_bytes; i += kBlock) lanes.add(bytes + i);
  if (i < num_bytes) {
    char rest[kBlock] = {};
    std::memcpy(rest, bytes + i, num_bytes - i);
    lanes.add(rest);
  }
  uint64_t result = num_bytes;
  for (const uint64_t lane : lanes.lane) result = mix(result, lane);
  return result;
}

}  // namespace pyar
