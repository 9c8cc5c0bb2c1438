#include "schedules/registry.h"

#include <algorithm>
#include <string>

#include "base/error.h"

namespace pyar {
namespace {

// Direct before ring: at equal cost, the one with fewer steps to wait for.
constexpr Algorithm kAlgorithms[] = {
    {"direct", direct, direct_cost},
    {"halving_doubling", halving_doubling, halving_doubling_cost},
    {"ring", ring, ring_cost},
};

void check_size(int size) {
  if (size < 1)
    throw UsageError("schedule for size " + std::to_string(size) + ": size must be at least 1");
}

}  // namespace

std::span<const Algorithm> algorithms() { return kAlgorithms; }

const Algorithm& algorithm(std::string_view name) {
  for (const Algorithm& a : kAlgorithms)
    if (a.name == name) return a;
  std::string known;
  for (const Algorithm& a : kAlgorithms) known += (known.empty() ? "" : ", ") + std::string(a.name);
  throw UsageError("no schedule is called '" + std::string(name) + "'; there are: " + known);
}

Schedule generate(std::string_view name, int rank, int size) {
  const Algorithm& a = algorithm(name);
  check_size(size);
  if (rank < 0 || rank >= size)
    throw UsageError("schedule " + std::string(name) + " for rank " + std::to_string(rank) +
                     " of size " + std::to_string(size) + ": rank must be in 0.." +
                     std::to_string(size - 1));
  return a.all_reduce(rank, size);
}

double cost(std::string_view name, int size, double bytes, Link link) {
  check_size(size);
  return algorithm(name).cost(size, bytes, link);
}

const Algorithm& select(int size, double bytes, Link link) {
  check_size(size);
  return *std::ranges::min_element(kAlgorithms, {},
                                   [&](const Algorithm& a) { return a.cost(size, bytes, link); });
}

}  // namespace pyar
