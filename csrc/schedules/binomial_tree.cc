// Binomial tree: ceil(log2 p) steps; the root sends the bytes that many times, every other rank
// receives them once.
#include "schedules/algorithms.h"

namespace pyar {

// Seen from the root, ranks [0, reach) have the data; each tells the one `reach` further on.
Schedule binomial_tree(int rank, int size, int root) {
  const int distance = (rank - root + size) % size;
  const auto at = [=](int from_root) { return (root + from_root) % size; };
  Schedule s{rank, size, 1, {}};
  for (int reach = 1; reach < size; reach *= 2) {
    Step step;
    if (distance < reach && distance + reach < size)
      step.sends = {copy(at(distance + reach), 0)};
    else if (reach <= distance && distance < 2 * reach)
      step.recvs = {copy(at(distance - reach), 0)};
    s.steps.push_back(step);
  }
  return s;
}

}  // namespace pyar
