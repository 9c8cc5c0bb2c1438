// The floor of an in-place all-reduce (sum) on one host over memory that the ranks share: each rank
// sums its shard of all buffers in rank order and writes it to all of them. The bytes that must
// move, moved by a plain loop, between the two waits that there must be; no protocol, no checks.
#include "host.h"

namespace {

// The number of buffers is known to the compiler: a third faster at 4 ranks in the caches.
template <int kRanks>
void reduce(const std::vector<float*>& buffers, floors::Shard shard) {
  float* at[kRanks];
  std::copy_n(buffers.begin(), kRanks, at);
  for (size_t i = shard.begin; i < shard.end; i += floors::kElemsPerVector) {
    floors::Vector sum = floors::vector_at(at[0] + i);
    for (int r = 1; r < kRanks; ++r) sum += floors::vector_at(at[r] + i);
    for (int r = 0; r < kRanks; ++r) floors::vector_at(at[r] + i) = sum;
  }
}

}  // namespace

int main(int argc, char** argv) {
  const floors::Arguments args(argc, argv, "shared");
  floors::Host host(args.ranks);
  const floors::Pattern pattern(args.ranks);
  std::vector<float*> buffers;
  for (int r = 0; r < args.ranks; ++r) buffers.push_back(floors::map_floats(args.count, true));
  host.fork_ranks();
  const floors::Shard shard = floors::shard_of(args.count, host.rank(), args.ranks);
  float* mine = buffers[static_cast<size_t>(host.rank())];
  return host.serve(
      args.evict_bytes, [&](long round) { pattern.write(mine, args.count, host.rank(), round); },
      [&] {
        host.barrier();  // all data are there
        if (args.ranks == 2) reduce<2>(buffers, shard);
        if (args.ranks == 3) reduce<3>(buffers, shard);
        if (args.ranks == 4) reduce<4>(buffers, shard);
        host.barrier();  // all results are there
      },
      [&](long round) {
        return pattern.count_wrong(args.count, round,
                                   [&](size_t i, float sum) { return mine[i] == sum; });
      });
}
