// The floor of an in-place all-reduce (sum) on one host over memory that the ranks share.
#include "reduce.h"

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
      [&](int) { floors::all_reduce(host, buffers, shard); },
      [&](long round) {
        return pattern.count_wrong(args.count, round,
                                   [&](size_t i, float sum) { return mine[i] == sum; });
      });
}
