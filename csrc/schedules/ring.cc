// Ring: 2(p-1) steps; every rank sends and receives 2(p-1)/p of the bytes, to the next and from the
// previous rank.
#include "schedules/algorithms.h"

namespace pyar {
namespace {

struct Ring {
  int rank, size;
  int next() const { return (rank + 1) % size; }
  int prev() const { return (rank + size - 1) % size; }
  // The chunk owned by the rank that is `hops` <= p behind mine.
  int chunk(int hops) const { return (rank + size - hops) % size; }
};

}  // namespace

// A chunk starts one rank after its owner and collects a contribution at every hop until it comes
// home.
Schedule ring_reduce_scatter(int rank, int size) {
  const Ring r{rank, size};
  Schedule s{rank, size, size, {}};
  for (int k = 1; k < size; ++k)
    s.steps.push_back({{add(r.next(), r.chunk(k))}, {add(r.prev(), r.chunk(k + 1))}});
  return s;
}

Schedule ring_all_gather(int rank, int size) {
  const Ring r{rank, size};
  Schedule s{rank, size, size, {}};
  for (int k = 1; k < size; ++k)
    s.steps.push_back({{copy(r.next(), r.chunk(k - 1))}, {copy(r.prev(), r.chunk(k))}});
  return s;
}

Schedule ring(int rank, int size) {
  return then(ring_reduce_scatter(rank, size), ring_all_gather(rank, size));
}

double ring_cost(int size, double bytes, Link link) {
  return 2 * (size - 1) * link.time_s(1, bytes / size);
}

}  // namespace pyar
