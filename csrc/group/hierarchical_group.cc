#include "group/hierarchical_group.h"

#include <algorithm>
#include <numeric>
#include <string>
#include <utility>

#include "base/error.h"
#include "kernels/kernels.h"

namespace pyar {
namespace {

std::vector<int> first_ranks(const std::vector<int>& sizes) {
  std::vector<int> first{0};
  std::partial_sum(sizes.begin(), sizes.end(), std::back_inserter(first));
  return first;
}

// The groups inside only sum; conclude() makes it an average.
Op reduction_of(Op op) { return op == Op::kAvg ? Op::kSum : op; }

template <typename Bytes, typename AnySpan>
AnySpan slice_of(AnySpan data, size_t begin, size_t num_elems) {
  return {static_cast<Bytes*>(data.data) + begin * size_of(data.dtype), num_elems, data.dtype};
}
Span slice(Span data, size_t begin, size_t num_elems) {
  return slice_of<std::byte>(data, begin, num_elems);
}
ConstSpan slice(ConstSpan data, size_t begin, size_t num_elems) {
  return slice_of<const std::byte>(data, begin, num_elems);
}

}  // namespace

void HostWorkbench::scale(Span data, double factor) {
  reduce(data.dtype, Op::kAvg, factor,
         {.sources = &data.data,
          .num_sources = 1,
          .destinations = &data.data,
          .num_destinations = 1,
          .num_elems = data.num_elems});
}

HierarchicalGroup::HierarchicalGroup(std::unique_ptr<Group> local, std::unique_ptr<Group> across,
                                     Nodes nodes, size_t leaders_up_to_bytes,
                                     const Deadline& deadline, std::unique_ptr<Workbench> bench)
    : bench_(std::move(bench)),
      local_(std::move(local)),
      across_(std::move(across)),
      nodes_(std::move(nodes)),
      first_ranks_(first_ranks(nodes_.sizes)),
      is_even_(std::ranges::count(nodes_.sizes, local_->size()) == num_nodes()),
      leaders_up_to_bytes_(leaders_up_to_bytes) {
  check_groups();
  agree_on_plan(deadline);
}

void HierarchicalGroup::check_groups() const {
  const std::string world = std::to_string(num_nodes()) + " nodes";
  if (nodes_.mine < 0 || nodes_.mine >= num_nodes())
    throw UsageError("node " + std::to_string(nodes_.mine) + " of " + world);
  if (local_->size() != nodes_.sizes[nodes_.mine])
    throw UsageError("a local group of " + std::to_string(local_->size()) + " ranks on a node of " +
                     std::to_string(nodes_.sizes[nodes_.mine]));
  if (!is_even_ && !is_leader()) {
    if (across_) throw UsageError("between nodes of unequal sizes only leaders have a group");
  } else if (!across_ || across_->size() != num_nodes() || across_->rank() != nodes_.mine) {
    throw UsageError("node " + std::to_string(nodes_.mine) + " of " + world +
                     " needs that rank and that size in its group across");
  }
}

// Ranks with different plans would make different calls to the groups for what they all take for
// the same collective.
void HierarchicalGroup::agree_on_plan(const Deadline& deadline) {
  std::vector<uint64_t> plan{leaders_up_to_bytes_};
  plan.insert(plan.end(), nodes_.sizes.begin(), nodes_.sizes.end());
  try {
    barrier({.sequence = 0,
             .layout = hash(plan.data(), plan.size() * sizeof plan[0]),
             .deadline = deadline,
             .patience = kSleepSoon,
             .present_patience = kSleepSoon});
  } catch (const MismatchError& e) {
    throw MismatchError("ranks were given different sizes of nodes, or different thresholds: " +
                            std::string(e.what()),
                        e.peers());
  }
}

int HierarchicalGroup::node_of(int rank) const {
  return static_cast<int>(std::ranges::upper_bound(first_ranks_, rank) - first_ranks_.begin()) - 1;
}

HierarchicalGroup::Form HierarchicalGroup::form_for(size_t bytes) const {
  return is_even_ && bytes > leaders_up_to_bytes_ ? Form::kSharded : Form::kLeaders;
}

void HierarchicalGroup::fail(const Error& cause) {
  local_->fail(cause);
  if (across_) across_->fail(cause);
}

void HierarchicalGroup::check_call(Op op, const Call& call) const {
  if (call.findings && call.findings->norm_is_wanted)
    throw UsageError("a norm is taken on one node only");
  bench_->check_op(op);
}

template <typename Body>
void HierarchicalGroup::collective(const Fingerprint& mine, const Call& call, Body body) {
  const auto level = [&](int index) {
    Call part = call;
    part.part_of = &mine;
    part.deadline = call.deadline.plus(index * kGraceS);
    part.ready = nullptr;  // see Note [Phases on a device]
    part.arrivals_s = nullptr;
    part.findings = nullptr;
    return part;
  };
  try {
    bench_->follow(call.ready);
    body(Levels{level(0), level(1), level(2)});
  } catch (const Error& error) {
    fail(error);
    throw;
  } catch (const std::exception& error) {
    fail(Error(error.what()));
    throw;
  }
}

// ---------------------------------------------------------------------------------------------------------------
// See Note [Disagreement between nodes] for why each starts inside the node.

void HierarchicalGroup::all_reduce(Span data, Op op, const Call& call) {
  check_call(op, call);
  const auto mine = fingerprint(Kind::kAllReduce, data.num_elems, data.dtype,
                                static_cast<uint32_t>(op), kNoRoot, call);
  collective(mine, call, [&](const Levels& levels) {
    // A node of one rank has nothing to scatter: in place instead of through a shard.
    const bool by_leaders = local_->size() == 1 || form_for(data.bytes()) == Form::kLeaders;
    const size_t rest = by_leaders ? data.num_elems : data.num_elems % ranks_of(nodes_.mine);
    const size_t sharded = data.num_elems - rest;
    if (sharded > 0) all_reduce_sharded(slice(data, 0, sharded), op, levels);
    if (rest > 0 || by_leaders) all_reduce_by_leaders(slice(data, sharded, rest), op, levels);
  });
}

void HierarchicalGroup::all_reduce_sharded(Span data, Op op, const Levels& levels) {
  const DType dtype = partial_of(data.dtype, op);
  const ConstSpan addends = dtype == data.dtype ? data : wide_copy_of(data, dtype);
  const Span shard = scratch(Workbench::kShard, data.num_elems / ranks_of(nodes_.mine), dtype);
  local_->reduce_scatter(shard, addends, reduction_of(op), levels.inside);
  across_->all_reduce(shard, reduction_of(op), levels.across);
  const Span result =
      dtype == data.dtype ? shard : scratch(Workbench::kNarrow, shard.num_elems, data.dtype);
  conclude(result, shard, op);
  local_->all_gather(data, result, levels.back);
}

void HierarchicalGroup::all_reduce_by_leaders(Span data, Op op, const Levels& levels) {
  const DType dtype = partial_of(data.dtype, op);
  const Span total = dtype == data.dtype ? data : wide_copy_of(data, dtype);
  sum_by_leaders(total, op, levels);
  if (is_leader()) conclude(data, total, op);
  local_->broadcast(data, 0, levels.back);
}

// A group has no reduction to one rank. For what is small an all-reduce takes no longer.
void HierarchicalGroup::sum_by_leaders(Span data, Op op, const Levels& levels) {
  local_->all_reduce(data, reduction_of(op), levels.inside);
  if (is_leader()) across_->all_reduce(data, reduction_of(op), levels.across);
}

void HierarchicalGroup::reduce_scatter(Span output, ConstSpan input, Op op, const Call& call) {
  check_call(op, call);
  const auto mine = fingerprint(Kind::kReduceScatter, output.num_elems, output.dtype,
                                static_cast<uint32_t>(op), kNoRoot, call);
  collective(mine, call, [&](const Levels& levels) {
    if (form_for(input.bytes()) == Form::kSharded)
      reduce_scatter_sharded(output, input, op, levels);
    else
      reduce_scatter_by_leaders(output, input, op, levels);
  });
}

void HierarchicalGroup::reduce_scatter_sharded(Span output, ConstSpan input, Op op,
                                               const Levels& levels) {
  const size_t shard_elems = output.num_elems, block_elems = shard_elems * ranks_of(nodes_.mine);
  const DType dtype = partial_of(output.dtype, op);
  // My node's sums for the ranks that have my local rank, by node.
  const Span shards = scratch(Workbench::kShard, shard_elems * nodes_.sizes.size(), dtype);
  for (size_t node = 0; node < nodes_.sizes.size(); ++node) {
    const ConstSpan block = slice(input, node * block_elems, block_elems);
    local_->reduce_scatter(slice(shards, node * shard_elems, shard_elems),
                           dtype == block.dtype ? block : wide_copy_of(block, dtype),
                           reduction_of(op), levels.inside);
  }
  const Span total = dtype == output.dtype ? output : scratch(Workbench::kWide, shard_elems, dtype);
  across_->reduce_scatter(total, shards, reduction_of(op), levels.across);
  conclude(output, total, op);
}

void HierarchicalGroup::reduce_scatter_by_leaders(Span output, ConstSpan input, Op op,
                                                  const Levels& levels) {
  const Span total = wide_copy_of(input, partial_of(input.dtype, op));
  sum_by_leaders(total, op, levels);
  local_->broadcast(total, 0, levels.back);
  const size_t shard_elems = output.num_elems;
  conclude(output, slice(total, static_cast<size_t>(rank()) * shard_elems, shard_elems), op);
}

void HierarchicalGroup::all_gather(Span output, ConstSpan input, const Call& call) {
  const auto mine =
      fingerprint(Kind::kAllGather, input.num_elems, input.dtype, kNoOp, kNoRoot, call);
  collective(mine, call, [&](const Levels& levels) {
    if (form_for(output.bytes()) == Form::kSharded)
      all_gather_sharded(output, input, levels);
    else
      all_gather_by_leaders(output, input, levels);
  });
}

void HierarchicalGroup::all_gather_sharded(Span output, ConstSpan input, const Levels& levels) {
  const size_t shard_elems = input.num_elems, block_elems = shard_elems * ranks_of(nodes_.mine);
  const auto gather = [&](int node, ConstSpan shard, const Call& call) {
    local_->all_gather(slice(output, static_cast<size_t>(node) * block_elems, block_elems), shard,
                       call);
  };
  gather(nodes_.mine, input, levels.inside);
  // What the ranks that have my local rank contribute, by node.
  const Span shards = scratch(Workbench::kShard, shard_elems * nodes_.sizes.size(), input.dtype);
  across_->all_gather(shards, input, levels.across);
  for (int node = 0; node < num_nodes(); ++node)
    if (node != nodes_.mine)
      gather(node, slice(shards, static_cast<size_t>(node) * shard_elems, shard_elems),
             levels.back);
}

void HierarchicalGroup::all_gather_by_leaders(Span output, ConstSpan input, const Levels& levels) {
  const auto block_of = [&](int node) {
    return slice(output, static_cast<size_t>(first_rank_of(node)) * input.num_elems,
                 ranks_of(node) * input.num_elems);
  };
  local_->all_gather(block_of(nodes_.mine), input, levels.inside);
  if (is_leader())
    for (int node = 0; node < num_nodes(); ++node)  // their blocks need not be equally long
      across_->broadcast(block_of(node), node, levels.across);
  local_->broadcast(output, 0, levels.back);
}

void HierarchicalGroup::broadcast(Span data, int root, const Call& call) {
  const auto mine = fingerprint(Kind::kBroadcast, data.num_elems, data.dtype, kNoOp, root, call);
  collective(mine, call, [&](const Levels& levels) {
    const int home = node_of(root);
    const bool is_home = home == nodes_.mine;
    if (is_home)
      local_->broadcast(data, root - first_rank_of(home), levels.inside);
    else
      local_->barrier(levels.inside);
    if (is_leader()) across_->broadcast(data, home, levels.across);
    if (is_home)
      local_->barrier(levels.back);
    else
      local_->broadcast(data, 0, levels.back);
  });
}

void HierarchicalGroup::barrier(const Call& call) {
  const auto mine = fingerprint(Kind::kBarrier, 0, DType::kUInt8, kNoOp, kNoRoot, call);
  collective(mine, call, [&](const Levels& levels) {
    local_->barrier(levels.inside);
    if (across_) across_->barrier(levels.across);
    if (!is_even_) local_->barrier(levels.back);
  });
}

// ---------------------------------------------------------------------------------------------------------------

// Minimum and maximum need no more bits than the elements have.
DType HierarchicalGroup::partial_of(DType dtype, Op op) const {
  return op == Op::kMin || op == Op::kMax ? dtype : bench_->partial_of(dtype);
}

Span HierarchicalGroup::scratch(Workbench::Use use, size_t num_elems, DType dtype) {
  return {bench_->scratch(use, num_elems * size_of(dtype)), num_elems, dtype};
}

Span HierarchicalGroup::wide_copy_of(ConstSpan data, DType dtype) {
  const Span copy = scratch(Workbench::kWide, data.num_elems, dtype);
  bench_->assign(copy, data);
  return copy;
}

void HierarchicalGroup::conclude(Span result, Span total, Op op) {
  if (op == Op::kAvg) bench_->scale(total, 1.0 / size());
  bench_->assign(result, total);
}

}  // namespace pyar
