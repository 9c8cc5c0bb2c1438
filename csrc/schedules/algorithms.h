// The algorithms, and the parts they are composed of. p = size, b = bytes of the buffer.
#pragma once

#include "schedules/schedule.h"

namespace pyar {

// A message of m bytes takes alpha_s + m * beta_s_per_byte; a rank sends one at a time and receives
// one at a time.
struct Link {
  double alpha_s, beta_s_per_byte;
  double time_s(double messages, double bytes) const {
    return messages * alpha_s + bytes * beta_s_per_byte;
  }
};

// p chunks; rank r ends with the sum of chunk r / starts with chunk r.
Schedule ring_reduce_scatter(int rank, int size);
Schedule ring_all_gather(int rank, int size);
Schedule ring(int rank, int size);
double ring_cost(int size, double bytes, Link link);

// Chunks: the largest power of two <= p. The ranks of the largest block end with one summed chunk
// each, in bit-reversed order.
Schedule halving_reduce_scatter(int rank, int size);
Schedule doubling_all_gather(int rank, int size);
Schedule halving_doubling(int rank, int size);
double halving_doubling_cost(int size, double bytes, Link link);

// p chunks; rank r ends with the sum of chunk r.
Schedule direct_reduce_scatter(int rank, int size);
Schedule direct(int rank, int size);
double direct_cost(int size, double bytes, Link link);

// One chunk, from root to all.
Schedule binomial_tree(int rank, int size, int root);

}  // namespace pyar
