// Shared memory in the nodes, messages between them: two groups as one. The ranks of both nodes are
// threads of this process.
#include <array>

#include "collectives.h"
#include "group/hierarchical_group.h"
#include "group/scheduled_group.h"
#include "transport/inproc.h"

using namespace pyar;
using namespace pyar::test;

namespace {

constexpr size_t kAlwaysLeaders = ~size_t{0};

// Tells nobody of errors that it has not met itself.
class MuteGroup final : public Group {
 public:
  explicit MuteGroup(std::unique_ptr<Group> group) : group_(std::move(group)) {}
  int rank() const override { return group_->rank(); }
  int size() const override { return group_->size(); }
  void all_reduce(Span data, Op op, const Call& call) override {
    group_->all_reduce(data, op, call);
  }
  void reduce_scatter(Span output, ConstSpan input, Op op, const Call& call) override {
    group_->reduce_scatter(output, input, op, call);
  }
  void all_gather(Span output, ConstSpan input, const Call& call) override {
    group_->all_gather(output, input, call);
  }
  void broadcast(Span data, int root, const Call& call) override {
    group_->broadcast(data, root, call);
  }
  void barrier(const Call& call) override { group_->barrier(call); }

 private:
  std::unique_ptr<Group> group_;
};

// Two hosts; global ranks 10, 13, ... and 100, 103, ...
class TwoNodes {
 public:
  TwoNodes(int first_size, int second_size, size_t leaders_up_to_bytes)
      : sizes_{first_size, second_size},
        hosts_{World(first_size, 10), World(second_size, 100)},
        leaders_up_to_bytes_(leaders_up_to_bytes) {
    const int columns = first_size == second_size ? first_size : 1;
    for (int column = 0; column < columns; ++column)
      across_.push_back(std::make_shared<InprocWorld>(
          std::vector{hosts_[0].global(column), hosts_[1].global(column)}));
  }
  int size() const { return sizes_[0] + sizes_[1]; }
  int node_of(int rank) const { return rank < sizes_[0] ? 0 : 1; }
  int local_rank_of(int rank) const { return rank - node_of(rank) * sizes_[0]; }
  int global(int rank) const { return hosts_[node_of(rank)].global(local_rank_of(rank)); }

  std::unique_ptr<SharedMemoryGroup> local(int rank) const {
    return hosts_[node_of(rank)].group(local_rank_of(rank));
  }
  std::unique_ptr<HierarchicalGroup> join(int rank, std::unique_ptr<Group> local) const {
    const auto column = static_cast<size_t>(local_rank_of(rank));
    std::unique_ptr<Group> across;
    if (column < across_.size())
      across = std::make_unique<ScheduledGroup>(
          std::make_unique<InprocTransport>(across_[column], node_of(rank)), "ring");
    return std::make_unique<HierarchicalGroup>(std::move(local), std::move(across),
                                               Nodes{sizes_, node_of(rank)}, leaders_up_to_bytes_,
                                               Deadline(30));
  }
  std::unique_ptr<HierarchicalGroup> group(int rank) const { return join(rank, local(rank)); }

 private:
  std::vector<int> sizes_;
  std::array<World, 2> hosts_;
  size_t leaders_up_to_bytes_;
  std::vector<std::shared_ptr<InprocWorld>> across_;
};

// Sizes on both sides of where SharedMemoryGroup changes its path; ordinary and symmetric memory.
void collectives_are_exact(const TwoNodes& nodes) {
  constexpr DType kInt32 = DType::kInt32;
  on_threads(nodes.size(), [&](int me) {
    const int size = nodes.size();
    const auto ranks = static_cast<size_t>(size);
    constexpr size_t kMaxElems = 40001;
    auto local = nodes.local(me);
    Calls calls;
    const auto symmetric = local->allocate(kMaxElems * ranks, kInt32, false, calls.next());
    std::vector<int32_t> ordinary(kMaxElems * ranks), other(kMaxElems * ranks);
    void* const places[] = {ordinary.data(), symmetric->part(nodes.local_rank_of(me))};
    const auto group = nodes.join(me, std::move(local));
    CHECK(group->rank() == me && group->size() == size);

    for (void* const place : places)
      for (const size_t num_elems : {size_t{0}, size_t{1}, size_t{2000}, kMaxElems}) {
        const Span data{place, num_elems, kInt32}, whole{place, num_elems * ranks, kInt32};
        const Span shard{other.data(), num_elems, kInt32};
        Call call = calls.next();
        const auto mine = [&](size_t i) { return input_of(me, i, call.sequence); };
        const auto total = [&](size_t i) { return reduced(Op::kSum, size, i, call.sequence); };
        fill<int32_t>(data, mine);
        group->all_reduce(data, Op::kSum, call);
        check<int32_t>(data, total);

        call = calls.next();
        fill<int32_t>(whole, mine);
        group->reduce_scatter(shard, whole, Op::kSum, call);
        check<int32_t>(shard, [&](size_t i) { return total(i + num_elems * size_t(me)); });

        group->all_gather(whole, shard, calls.next());
        check<int32_t>(whole, total);

        call = calls.next();
        const int root = static_cast<int>(call.sequence % ranks);
        fill<int32_t>(data, mine);
        group->broadcast(data, root, call);
        check<int32_t>(data, [&](size_t i) { return input_of(root, i, call.sequence); });
        group->barrier(calls.next());
      }
  });
}

// Met between the leaders, told through shared memory.
void a_mismatch_between_nodes_is_everyones() {
  const TwoNodes nodes(3, 3, kAlwaysLeaders);
  on_threads(nodes.size(), [&](int me) {
    const auto group = nodes.group(me);
    Calls calls;
    std::vector<float> data(10);
    const Op op = nodes.node_of(me) == 0 ? Op::kSum : Op::kMax;
    const auto error = error_of<MismatchError>(
        [&] { group->all_reduce({data.data(), 10, DType::kFloat32}, op, calls.next()); });
    const std::string what = error.what();
    CHECK(what.find("all_reduce(sum, float32, 10 elements)") != what.npos);
    CHECK(what.find("all_reduce(max, float32, 10 elements)") != what.npos);
  });
}

// Met in the node, told to the other one.
void a_rank_that_leaves_is_named_on_both_nodes() {
  const TwoNodes nodes(2, 3, 0);
  on_threads(nodes.size(), [&](int me) {
    auto local = nodes.local(me);
    SharedMemoryGroup& shared_memory = *local;
    const auto group = nodes.join(me, std::move(local));
    Calls calls;
    group->barrier(calls.next());
    if (me == 4) return shared_memory.leave();
    const auto error = error_of<PeerError>([&] { group->barrier(calls.next()); });
    const std::string what = error.what();
    CHECK(what.find("rank 106 closed the communicator") != what.npos);
  });
}

void where_nobody_is_told_the_deadline_ends_the_wait() {
  const TwoNodes nodes(2, 2, kAlwaysLeaders);
  std::atomic<int> failed{0};
  on_threads(nodes.size(), [&](int me) {
    const auto group = nodes.join(me, std::make_unique<MuteGroup>(nodes.local(me)));
    Calls calls;
    std::vector<float> data(10 + size_t(nodes.node_of(me)));
    const auto differ = [&] {
      group->all_reduce({data.data(), data.size(), DType::kFloat32}, Op::kSum, calls.next(0.2));
    };
    if (nodes.local_rank_of(me) == 0)
      error_of<MismatchError>(differ);
    else
      CHECK(error_of<TimeoutError>(differ).peers() == std::vector<int>{nodes.global(me - 1)});
    ++failed;  // nobody leaves while another still waits
    while (failed.load() < nodes.size()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  });
}

}  // namespace

int main() {
  give_up_after(240);
  for (const size_t leaders_up_to_bytes : {size_t{0}, kAlwaysLeaders}) {
    collectives_are_exact({2, 2, leaders_up_to_bytes});
    collectives_are_exact({3, 3, leaders_up_to_bytes});
  }
  collectives_are_exact({3, 1, 0});
  a_mismatch_between_nodes_is_everyones();
  a_rank_that_leaves_is_named_on_both_nodes();
  where_nobody_is_told_the_deadline_ends_the_wait();
}
