// The all-reduce algorithms by name. Adding one: a file, its line in algorithms.h, a row in
// registry.cc.
#pragma once

#include <span>
#include <string_view>

#include "schedules/algorithms.h"

namespace pyar {

struct Algorithm {
  const char* name;
  Schedule (*all_reduce)(int rank, int size);
  double (*cost)(int size, double bytes, Link link);  // seconds
};

std::span<const Algorithm> algorithms();

// All of these throw UsageError for a name, rank or size that is not there.
const Algorithm& algorithm(std::string_view name);
Schedule generate(std::string_view name, int rank, int size);
double cost(std::string_view name, int size, double bytes, Link link);

// The cheapest; of equals the first of the table.
const Algorithm& select(int size, double bytes, Link link);

}  // namespace pyar
