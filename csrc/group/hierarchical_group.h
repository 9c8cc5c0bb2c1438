// The ranks of several nodes as two groups: those of my node (`local`), and those that have my
// local rank on every node (`across`). Local rank 0 is the leader of its node.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "group/fingerprint.h"
#include "group/group.h"
#include "group/host_memory.h"

namespace pyar {

// Ranks are numbered node by node.
struct Nodes {
  std::vector<int> sizes;  // ranks of each node, at least 1
  int mine;                // index into sizes
};

// What is done to the buffers between the two groups' collectives. It alone knows where they lie:
// on the host, or on a device whose groups only enqueue their work.
class Workbench {
 public:
  enum Use {
    kWide,    // a buffer in partial_of(dtype)
    kShard,   // what local ranks sum for, or gather from, the other nodes
    kNarrow,  // a shard in the caller's dtype again
  };
  static constexpr size_t kNumUses = 3;

  virtual ~Workbench() = default;
  // Throws UsageError for what this bench cannot make of a sum. Before anything is sent.
  virtual void check_op([[maybe_unused]] Op op) const {}
  // What is done from now on comes after `ready` (Call::ready).
  virtual void follow([[maybe_unused]] void* ready) {}
  // Contents are undefined; what was given for another use stays.
  virtual void* scratch(Use use, size_t bytes) = 0;
  // The dtype in which sums leave a group that has only a part of the addends.
  virtual DType partial_of(DType dtype) const = 0;
  // Copies; between dtype and partial_of(dtype) converts.
  virtual void assign(Span to, ConstSpan from) = 0;
  virtual void scale(Span data, double factor) = 0;
};

// Partial sums of 16-bit floats are float32.
class HostWorkbench final : public Workbench {
 public:
  void* scratch(Use use, size_t bytes) override { return scratch_[use].at_least(bytes); }
  DType partial_of(DType dtype) const override { return accumulator_of(dtype); }
  void assign(Span to, ConstSpan from) override { pyar::assign(to, from); }
  void scale(Span data, double factor) override;

 private:
  Scratch scratch_[kNumUses];
};

// Note [Disagreement between nodes]
// A group's collective returns only after all its ranks have made the same call. Here, every one
// starts with one of the whole node, and then the leaders meet. So a node whose ranks disagree
// learns it before any of them waits for another node, and nodes that disagree meet in the leaders'
// group, whatever else their calls would do; two different patterns could wait for each other until
// the deadline. What is compared is the call as the user made it (Call::part_of): shards may be
// equal where buffers are not. Nobody returns before all nodes have been compared.
//
// Note [Errors go through both groups]
// A rank that meets an error in one group ends the other one by it (Group::fail), whose ranks do
// the same: so it reaches everybody, and names who died, not who told. A group that does not
// override fail() leaves its ranks waiting until their deadlines. Of a rank that is silent its own
// node learns first, by kGraceS, and therefore names it to those who wait for that node.
//
// Note [Phases on a device]
// Groups of devices return when a phase has been queued, not when it is over. That is enough: their
// phases and the bench's work follow each other on one stream, and what Call::ready stands for
// comes before the first of them, a copy perhaps; so the bench waits for it and the groups need
// not. Nothing here looks at data. What ranks agree on they agree on their hosts, within the calls:
// Note [Disagreement between nodes] holds unchanged. Errors may come when no call is under way:
// groups of one stream fail together (Note [Groups of one lane fail together]), any other one hears
// of it with the next call. A result is there when the stream has passed all that is queued on it.
//
// Sums of 16-bit floats are rounded once, if the groups sum float32 as they say and the workbench
// has it so; buffers of the node are then float32 copies, not the caller's. avg: sums everywhere,
// then one factor 1 / size. Of Call::findings nothing is filled in, and a norm is refused:
// UsageError; nor of arrivals_s: clocks of different nodes cannot be compared.
class HierarchicalGroup final : public Group {
 public:
  enum class Form : uint32_t {
    // Reduce-scatter in the node, all-reduce of the shards across, all-gather in the node: every
    // rank moves its share between nodes, so that all cores and network cards work.
    kSharded,
    // Reduction in the node, all-reduce among the leaders, broadcast in the node: as many messages
    // between nodes as there are nodes; for buffers that only latency makes slow.
    kLeaders,
  };

  // Collective over all ranks; MismatchError if they were given different sizes or thresholds.
  // Nodes of equal sizes: `across` has one rank per node, in the order of the nodes, and buffers of
  // more than `leaders_up_to_bytes` are sharded. Else every collective is the leaders', and the
  // other ranks' `across` is null. UsageError if the groups do not fit that.
  HierarchicalGroup(std::unique_ptr<Group> local, std::unique_ptr<Group> across, Nodes nodes,
                    size_t leaders_up_to_bytes, const Deadline& deadline,
                    std::unique_ptr<Workbench> bench = std::make_unique<HostWorkbench>());

  int rank() const override { return first_rank_of(nodes_.mine) + local_->rank(); }
  int size() const override { return first_rank_of(num_nodes()); }

  // Sharded: elements beyond a multiple of the local size, fewer than that, are the leaders' in a
  // second round; a buffer padded to such a multiple saves its latency.
  void all_reduce(Span data, Op op, const Call& call) override;
  // Sharded: a local collective per node, so that nothing has to be put in another order first.
  void reduce_scatter(Span output, ConstSpan input, Op op, const Call& call) override;
  void all_gather(Span output, ConstSpan input, const Call& call) override;
  // Always the leaders'.
  void broadcast(Span data, int root, const Call& call) override;
  void barrier(const Call& call) override;
  void fail(const Error& cause) override;

  // Of a collective whose buffer over all ranks (of an all_reduce: over one) has so many bytes.
  Form form_for(size_t bytes) const;

 private:
  // An error takes a watch slice (20 ms) to be passed on. Every level waits this much longer than
  // the one before it: a call ends twice as much after its timeout, at the latest.
  static constexpr double kGraceS = 0.25;
  // The calls to the groups that make up one collective, in this order.
  struct Levels {
    Call inside, across, back;
  };

  int num_nodes() const { return static_cast<int>(nodes_.sizes.size()); }
  int first_rank_of(int node) const { return first_ranks_[static_cast<size_t>(node)]; }
  int node_of(int rank) const;
  size_t ranks_of(int node) const { return static_cast<size_t>(nodes_.sizes[node]); }
  bool is_leader() const { return local_->rank() == 0; }
  void check_groups() const;
  void agree_on_plan(const Deadline& deadline);

  // Throws UsageError; before anything is sent.
  void check_call(Op op, const Call& call) const;
  // Runs a collective; if it fails, everybody learns why.
  template <typename Body>
  void collective(const Fingerprint& mine, const Call& call, Body body);
  void all_reduce_sharded(Span data, Op op, const Levels& levels);
  void all_reduce_by_leaders(Span data, Op op, const Levels& levels);
  void reduce_scatter_sharded(Span output, ConstSpan input, Op op, const Levels& levels);
  void reduce_scatter_by_leaders(Span output, ConstSpan input, Op op, const Levels& levels);
  void all_gather_sharded(Span output, ConstSpan input, const Levels& levels);
  void all_gather_by_leaders(Span output, ConstSpan input, const Levels& levels);
  // Leaders have the result; the others' data are sums of their nodes.
  void sum_by_leaders(Span data, Op op, const Levels& levels);

  DType partial_of(DType dtype, Op op) const;
  Span scratch(Workbench::Use use, size_t num_elems, DType dtype);
  Span wide_copy_of(ConstSpan data, DType dtype);
  // From the sum over all ranks to what the op asks for.
  void conclude(Span result, Span total, Op op);

  std::unique_ptr<Workbench> bench_;  // its memory outlives what the groups do with it
  std::unique_ptr<Group> local_, across_;
  const Nodes nodes_;
  const std::vector<int> first_ranks_;  // by node, and the size at the end
  const bool is_even_;
  const size_t leaders_up_to_bytes_;
};

}  // namespace pyar
