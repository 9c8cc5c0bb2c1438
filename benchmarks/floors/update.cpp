// The floor of "sum of all ranks' gradients, mean, weight decay, Nesterov momentum, update" on one
// host. Three ways, MODE:
//   two-pass  all-reduce in place; then every rank updates its own copy of the parameters
//   one-pass  each rank reduces and updates its shard and writes it to every rank's parameters
//   shared    the same with one copy of the parameters per host
// Momentum: one copy per rank in two-pass, one per host otherwise.
#include "host.h"

namespace {

using floors::Shard;
using floors::Vector;
using floors::vector_at;

constexpr float kMomentum = 0.9f, kDecay = 1e-4f, kRate = 1e-3f;

// The rule, for a line or a single float.
template <typename T>
T updated(T gradient, T weight, T& momentum) {
  const T g = gradient + kDecay * weight;
  momentum = kMomentum * momentum + g;
  return weight - kRate * (g + kMomentum * momentum);
}

// Arrays in memory that the ranks share.
struct Arrays {
  std::vector<float*> gradients, weights, momenta;  // by rank; of `shared` all the same
};

template <int kRanks>
class Update {
 public:
  Update(floors::Host& host, const Arrays& arrays) : host_(host) {
    std::copy_n(arrays.gradients.begin(), kRanks, g_);
    std::copy_n(arrays.weights.begin(), kRanks, w_);
    std::copy_n(arrays.momenta.begin(), kRanks, m_);
  }

  void two_pass(Shard shard, size_t count) const {
    for (size_t i = shard.begin; i < shard.end; i += floors::kElemsPerVector) {
      const Vector mean = mean_at(i);
      for (int r = 0; r < kRanks; ++r) vector_at(g_[r] + i) = mean;
    }
    host_.barrier();
    float *g = g_[host_.rank()], *w = w_[host_.rank()], *m = m_[host_.rank()];
    for (size_t i = 0; i < count; i += floors::kElemsPerVector)
      vector_at(w + i) = updated(vector_at(g + i), vector_at(w + i), vector_at(m + i));
  }

  template <int kCopies>  // of the parameters
  void one_pass(Shard shard) const {
    for (size_t i = shard.begin; i < shard.end; i += floors::kElemsPerVector) {
      const Vector w = updated(mean_at(i), vector_at(w_[0] + i), vector_at(m_[0] + i));
      for (int r = 0; r < kCopies; ++r) vector_at(w_[r] + i) = w;
    }
  }

 private:
  Vector mean_at(size_t i) const {
    Vector sum = vector_at(g_[0] + i);
    for (int r = 1; r < kRanks; ++r) sum += vector_at(g_[r] + i);
    return sum * (1.0f / kRanks);
  }

  floors::Host& host_;
  float *g_[kRanks], *w_[kRanks], *m_[kRanks];
};

template <int kRanks>
int serve(floors::Host& host, const floors::Arguments& args, const Arrays& arrays) {
  const floors::Pattern pattern(kRanks);
  const auto own = static_cast<size_t>(host.rank());
  const Shard shard = floors::shard_of(args.count, host.rank(), kRanks);
  const Update<kRanks> update(host, arrays);
  // What weights and momenta hold before each round: something that depends on the place.
  const auto weight_before = [](size_t i) { return static_cast<float>(i % 1009); };
  const auto momentum_before = [](size_t i) { return static_cast<float>(i % 1013); };
  return host.serve(
      args.evict_bytes,
      [&](long round) {
        for (size_t i = 0; i < args.count; ++i) arrays.weights[own][i] = weight_before(i);
        for (size_t i = 0; i < args.count; ++i) arrays.momenta[own][i] = momentum_before(i);
        pattern.write(arrays.gradients[own], args.count, host.rank(),
                      round);  // last, as backward does
      },
      [&](int) {
        host.barrier();
        if (args.is("two-pass")) update.two_pass(shard, args.count);
        if (args.is("one-pass")) update.template one_pass<kRanks>(shard);
        if (args.is("shared")) update.template one_pass<1>(shard);
        host.barrier();
      },
      [&](long round) {
        return pattern.count_wrong(args.count, round, [&](size_t i, float sum) {
          float momentum = momentum_before(i);
          return arrays.weights[own][i] ==
                 updated(sum * (1.0f / kRanks), weight_before(i), momentum);
        });
      });
}

}  // namespace

int main(int argc, char** argv) {
  const floors::Arguments args(argc, argv, "two-pass, one-pass, shared");
  if (!args.is("two-pass") && !args.is("one-pass") && !args.is("shared")) return args.refuse();
  floors::Host host(args.ranks);
  const auto one_per_rank = [&] {
    std::vector<float*> arrays;
    for (int r = 0; r < args.ranks; ++r) arrays.push_back(floors::map_floats(args.count, true));
    return arrays;
  };
  const auto one = [&] {
    return std::vector(static_cast<size_t>(args.ranks), floors::map_floats(args.count, true));
  };
  const Arrays arrays{one_per_rank(), args.is("shared") ? one() : one_per_rank(),
                      args.is("two-pass") ? one_per_rank() : one()};
  host.fork_ranks();
  if (args.ranks == 2) return serve<2>(host, args, arrays);
  if (args.ranks == 3) return serve<3>(host, args, arrays);
  return serve<4>(host, args, arrays);
}
