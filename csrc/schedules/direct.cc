// Direct: 2 steps of p-1 messages each; every rank sends and receives 2(p-1)/p of the bytes. The
// only schedule that adds all contributions to a chunk in one place, hence in rank order without
// partial sums on the wire.
#include "schedules/algorithms.h"

namespace pyar {

// Chunk j goes straight to rank j. Everyone starts with another peer, so that no rank is sent to by
// all at once.
Schedule direct_reduce_scatter(int rank, int size) {
  Step step;
  for (int hops = 1; hops < size; ++hops) {
    const int to = (rank + hops) % size, from = (rank + size - hops) % size;
    step.sends.push_back(add(to, to));
    step.recvs.push_back(add(from, rank));
  }
  Schedule s{rank, size, size, {}};
  if (size > 1) s.steps.push_back(step);
  return s;
}

Schedule direct(int rank, int size) {
  const Schedule reduce_scatter = direct_reduce_scatter(rank, size);
  return then(reduce_scatter, mirrored(reduce_scatter));
}

// As the ring's. It saves waiting for one message before sending the next, which alpha-beta does
// not see.
double direct_cost(int size, double bytes, Link link) {
  return 2 * (size - 1) * link.time_s(1, bytes / size);
}

}  // namespace pyar
