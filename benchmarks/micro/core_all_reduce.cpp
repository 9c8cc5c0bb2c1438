// An all-reduce of the core without Python: the engine's synchronous call on symmetric memory,
// protocol and checks included; and the floor on the same memory, by the same processes. Pages lie
// where they lie, in one program better than in another: only this pair says what the core adds.
// Measures on command, like a floor (../floors/host.h).
#include <string>

#include "../floors/reduce.h"
#include "engine/engine.h"
#include "group/shared_memory_group.h"

int main(int argc, char** argv) {
  const floors::Arguments args(argc, argv, "symmetric");
  if (!args.is("symmetric")) return args.refuse();
  floors::Host host(args.ranks);
  const floors::Pattern pattern(args.ranks);
  const std::string name = "pyallreduce-benchmark-" + std::to_string(getpid());
  host.fork_ranks();

  const pyar::Deadline deadline(60.0);
  std::vector<int> ranks;
  for (int r = 0; r < args.ranks; ++r) ranks.push_back(r);
  auto owned = std::make_unique<pyar::SharedMemoryGroup>(
      pyar::HostLink(host.rank(), ranks, name, "benchmark", deadline), deadline);
  pyar::SharedMemoryGroup& group = *owned;
  const bool crowded = args.ranks > sysconf(_SC_NPROCESSORS_ONLN);
  pyar::Engine engine(std::move(owned), 60.0, crowded ? pyar::kYieldFirst : pyar::kSpinFirst);

  std::shared_ptr<pyar::SymmetricBuffer> buffer;
  const std::function<void()> on_slice = [] {};
  engine.run(
      [&](pyar::Group&, const pyar::Call& call) {
        buffer = group.allocate(args.count, pyar::DType::kFloat32, /*one_copy=*/false, call);
      },
      0, on_slice);
  auto* mine = reinterpret_cast<float*>(buffer->part(host.rank()));
  const pyar::Span span{mine, args.count, pyar::DType::kFloat32};
  const pyar::Engine::Task task = [&](pyar::Group& any, const pyar::Call& call) {
    any.all_reduce(span, pyar::Op::kSum, call);
  };
  std::vector<float*> buffers;
  for (int r = 0; r < args.ranks; ++r) buffers.push_back(reinterpret_cast<float*>(buffer->part(r)));
  const floors::Shard shard = floors::shard_of(args.count, host.rank(), args.ranks);
  return host.serve(
      args.evict_bytes, [&](long round) { pattern.write(mine, args.count, host.rank(), round); },
      [&](int method) {
        if (method == 0)
          engine.run(task, 0, on_slice);
        else
          floors::all_reduce(host, buffers, shard);
      },
      [&](long round) {
        return pattern.count_wrong(args.count, round,
                                   [&](size_t i, float sum) { return mine[i] == sum; });
      });
}
