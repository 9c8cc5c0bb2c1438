// HierarchicalGroup over devices: NcclGroup in the nodes, NcclGroup or host memory between them,
// all over the mock, whose devices come late. Ranks are threads (or, where one dies, processes).
#include <chrono>
#include <csignal>
#include <numeric>

#include "group/device_workbench.h"
#include "group/hierarchical_group.h"
#include "group/nccl_group.h"
#include "group/scheduled_group.h"
#include "group/staged_group.h"
#include "memory/segment.h"
#include "mocked.h"
#include "ranks.h"
#include "transport/inproc.h"

using namespace pyar;
using namespace pyar::test;

namespace {

constexpr size_t kAlwaysSharded = 0, kAlwaysLeaders = ~size_t{0};

void sleep_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

// What goes between nodes: NCCL, or host memory through one of the two groups that have it.
enum class Wire { kNccl, kSharedMemory, kMessages };

// What all ranks of some nodes know. Ranks are numbered node by node; global ranks are 10, 13, ...
class Cluster {
 public:
  explicit Cluster(std::vector<int> sizes, Wire wire = Wire::kNccl)
      : sizes_(std::move(sizes)),
        wire_(wire),
        everyone_(std::accumulate(sizes_.begin(), sizes_.end(), 0)) {
    const bool is_even = std::ranges::count(sizes_, sizes_[0]) == std::ssize(sizes_);
    columns_.resize(is_even ? size_t(sizes_[0]) : 1);
    for (int rank = 0, node = 0; node < std::ssize(sizes_); ++node) {
      std::vector<int> mates;
      for (int local = 0; local < sizes_[size_t(node)]; ++local, ++rank) {
        places_.push_back({node, local});
        mates.push_back(everyone_.global(rank));
        if (local < std::ssize(columns_)) columns_[size_t(local)].ranks.push_back(mates.back());
      }
      nodes_.emplace_back(mates);
    }
    for (Column& column : columns_) {
      column.world = std::make_unique<World>(column.ranks);
      column.messages = std::make_shared<InprocWorld>(column.ranks);
    }
  }
  int size() const { return everyone_.size(); }
  bool is_all_nccl() const { return wire_ == Wire::kNccl; }
  const World& everyone() const { return everyone_; }
  const std::vector<int>& sizes() const { return sizes_; }
  int node_of(int rank) const { return places_[size_t(rank)].node; }
  int local_rank_of(int rank) const { return places_[size_t(rank)].local; }
  std::string name_of(int rank) const { return names_of({everyone_.global(rank)}); }
  bool is_across(int rank) const { return local_rank_of(rank) < std::ssize(columns_); }

  std::unique_ptr<NcclGroup> local(NcclGroup& all, int rank, const Call& call) const {
    return all.split(node_of(rank), nodes_[size_t(node_of(rank))].group(local_rank_of(rank)), call);
  }
  std::unique_ptr<Group> across(NcclGroup& all, NcclGroup& local, int rank,
                                const Call& call) const {
    const Column* const column = is_across(rank) ? &columns_[size_t(local_rank_of(rank))] : nullptr;
    const int node = node_of(rank);
    if (wire_ == Wire::kNccl)
      return column ? all.split(local_rank_of(rank), column->world->group(node), call)
                    : all.split(NcclGroup::kNoColor, nullptr, call);
    if (!column) return nullptr;
    if (wire_ == Wire::kSharedMemory)
      return std::make_unique<StagedGroup>(column->world->group(node), local);
    return std::make_unique<StagedGroup>(
        std::make_unique<ScheduledGroup>(std::make_unique<InprocTransport>(column->messages, node),
                                         "ring"),
        local);
  }

 private:
  struct Place {
    int node, local;
  };
  struct Column {  // one rank of each node
    std::vector<int> ranks;
    std::unique_ptr<World> world;
    std::shared_ptr<InprocWorld> messages;
  };
  std::vector<int> sizes_;
  Wire wire_;
  World everyone_;
  std::vector<Place> places_;
  std::vector<World> nodes_;
  std::vector<Column> columns_;
};

// Before its nth call something is queued on the group's stream.
class Obstructed final : public Group {
 public:
  Obstructed(std::unique_ptr<Group> group, CudaStream stream, int nth, std::function<void()> work)
      : group_(std::move(group)), stream_(stream), calls_left_(nth), work_(std::move(work)) {}
  int rank() const override { return group_->rank(); }
  int size() const override { return group_->size(); }
  void all_reduce(Span data, Op op, const Call& call) override {
    obstruct();
    group_->all_reduce(data, op, call);
  }
  void reduce_scatter(Span output, ConstSpan input, Op op, const Call& call) override {
    obstruct();
    group_->reduce_scatter(output, input, op, call);
  }
  void all_gather(Span output, ConstSpan input, const Call& call) override {
    obstruct();
    group_->all_gather(output, input, call);
  }
  void broadcast(Span data, int root, const Call& call) override {
    obstruct();
    group_->broadcast(data, root, call);
  }
  void barrier(const Call& call) override { group_->barrier(call); }
  void fail(const Error& cause) override { group_->fail(cause); }

 private:
  void obstruct() {
    if (--calls_left_ == 0) on_stream(stream_, work_);
  }
  std::unique_ptr<Group> group_;
  CudaStream stream_;
  int calls_left_;
  std::function<void()> work_;
};

// Of the calls that make up a rank's collective, one before which its device is busy.
struct Obstacle {
  enum Where { kNowhere, kLocal, kAcross } where = kNowhere;
  int nth = 0;
  std::function<void()> work = {};
};

// A rank with a stream of its own, as a training has.
struct Rank {
  Rank(const Cluster& cluster, int me, size_t leaders_up_to_bytes,
       NcclGroup::Scale scale = scale_floats, const Obstacle& obstacle = {})
      : stream(cuda()) {
    Call connecting = calls.next();
    NcclGroup all(nccl(), cuda(), me % 8, cluster.everyone().group(me), std::move(scale),
                  connecting);
    std::unique_ptr<Group> inside = cluster.local(all, me, calls.next());
    local = static_cast<NcclGroup*>(inside.get());
    std::unique_ptr<Group> across = cluster.across(all, *local, me, calls.next());
    if (obstacle.where == Obstacle::kLocal)
      inside = std::make_unique<Obstructed>(std::move(inside), local->stream(), obstacle.nth,
                                            obstacle.work);
    if (obstacle.where == Obstacle::kAcross && across)
      across = std::make_unique<Obstructed>(std::move(across), local->stream(), obstacle.nth,
                                            obstacle.work);
    group = std::make_unique<HierarchicalGroup>(
        std::move(inside), std::move(across), Nodes{cluster.sizes(), cluster.node_of(me)},
        leaders_up_to_bytes, Deadline(60), std::make_unique<DeviceWorkbench>(*local));
    // Nobody closes what others still need to make their groups. From here on without `all`.
    all.barrier(calls.next());
  }

  Call next(double timeout_s = 60) {
    Call call = calls.next(timeout_s);
    ready.record(stream.get());
    call.ready = ready.get();
    return call;
  }
  // What is queued on my stream from now on comes after the collectives.
  void follow() {
    done.record(local->stream());
    done.hold_back(stream.get());
  }
  void synchronize() {
    follow();
    stream.synchronize();
  }

  // For collectives that may be aborted: it outlives them.
  std::vector<float> memory = std::vector<float>(1000);
  Span span() { return {memory.data(), memory.size(), DType::kFloat32}; }

  Calls calls;
  Stream stream;
  Event ready{cuda(), Event::Timing::kNo}, done{cuda(), Event::Timing::kNo};
  std::unique_ptr<HierarchicalGroup> group;
  NcclGroup* local;  // of `group`
};

void on_ranks(const Cluster& cluster, const std::function<void(int)>& body) {
  on_threads(cluster.size(), body);
}

// What mostly waits: all at the same time, each in a process of its own, for a process has one
// mock. Only from a process without threads.
void at_once(const std::vector<std::function<void()>>& scenarios) {
#if defined(__SANITIZE_THREAD__)  // which sees the threads of one process only
  for (const auto& scenario : scenarios) scenario();
#else
  const auto statuses = in_processes(static_cast<int>(scenarios.size()), [&](int i) {
    give_up_after(120);
    scenarios[size_t(i)]();
  });
  for (const int status : statuses) CHECK(ended_well(status));
#endif
}

// Small integers: the sum over 32 ranks is exact in 8 bits.
int input_of(int rank, size_t elem, uint64_t call) {
  return static_cast<int>((elem * 7 + static_cast<size_t>(rank) * 5 + call * 3) % 8);
}

float reduced(Op op, int ranks, size_t elem, uint64_t call) {
  int result = input_of(0, elem, call);
  for (int r = 1; r < ranks; ++r) {
    const int value = input_of(r, elem, call);
    result = op == Op::kMin   ? std::min(result, value)
             : op == Op::kMax ? std::max(result, value)
                              : result + value;
  }
  return op == Op::kAvg ? float(result) * float(1.0 / ranks) : float(result);
}

// A kernel that fills, as a backward does, and one that reads, as an update does.
template <typename T, typename Value>
void fill(Rank& rank, T* data, size_t num_elems, Value value) {
  on_stream(rank.stream.get(), [=] {
    for (size_t i = 0; i < num_elems; ++i) data[i] = T(float(value(i)));
  });
}
template <typename T, typename Value>
void check_next(Rank& rank, const T* data, size_t num_elems, Value value) {
  rank.follow();
  on_stream(rank.stream.get(), [=] {
    for (size_t i = 0; i < num_elems; ++i) CHECK(float(data[i]) == float(T(float(value(i)))));
  });
}

// Nothing waits on the host until the end.
template <typename T>
void all_collectives(Rank& rank, DType dtype, size_t num_elems) {
  HierarchicalGroup& group = *rank.group;
  const int me = group.rank(), ranks = group.size();
  const auto shards = static_cast<size_t>(ranks);
  std::vector<T> data(num_elems), many(num_elems * shards);
  const Span one{data.data(), num_elems, dtype}, all{many.data(), num_elems * shards, dtype};
  std::vector<Op> ops{Op::kSum, Op::kMin, Op::kMax};
  if (dtype == DType::kFloat32) ops.push_back(Op::kAvg);
  for (const Op op : ops) {
    const auto tag = static_cast<uint64_t>(op);
    const auto mine = [=](size_t i) { return input_of(me, i, tag); };
    fill(rank, data.data(), num_elems, mine);
    group.all_reduce(one, op, rank.next());
    check_next(rank, data.data(), num_elems, [=](size_t i) { return reduced(op, ranks, i, tag); });
    fill(rank, many.data(), all.num_elems, mine);
    group.reduce_scatter(one, all, op, rank.next());
    check_next(rank, data.data(), num_elems, [=](size_t i) {
      return reduced(op, ranks, i + static_cast<size_t>(me) * num_elems, tag);
    });
  }
  fill(rank, data.data(), num_elems, [=](size_t i) { return input_of(me, i, 0); });
  group.all_gather(all, one, rank.next());
  check_next(rank, many.data(), all.num_elems,
             [=](size_t i) { return input_of(static_cast<int>(i / num_elems), i % num_elems, 0); });
  for (const int root : {0, ranks / 2, ranks - 1}) {
    fill(rank, data.data(), num_elems, [=](size_t i) { return input_of(me, i, 0); });
    group.broadcast(one, root, rank.next());
    check_next(rank, data.data(), num_elems, [=](size_t i) { return input_of(root, i, 0); });
  }
  rank.synchronize();
  group.barrier(rank.next());
}

void collectives_are_exact(const Cluster& cluster, size_t leaders_up_to_bytes,
                           std::vector<size_t> sizes, double delay_s = 0) {
  mock().reset();
  mock().set_delay(delay_s);
  on_ranks(cluster, [&](int me) {
    Rank rank(cluster, me, leaders_up_to_bytes);
    CHECK(rank.group->rank() == me && rank.group->size() == cluster.size());
    for (const size_t num_elems : sizes) {
      all_collectives<float>(rank, DType::kFloat32, num_elems);
      all_collectives<BFloat16>(rank, DType::kBFloat16, num_elems);
    }
  });
  CHECK(mock().num_calls("ncclMemAlloc") == mock().num_calls("ncclMemFree"));
  CHECK(mock().num_calls("cudaHostAlloc") == mock().num_calls("cudaFreeHost"));
}

void every_shape_is_exact() {
  for (int nodes = 1; nodes <= 4; ++nodes)
    for (int ranks = 1; ranks <= 8; ++ranks) {
      const Cluster cluster(std::vector<int>(size_t(nodes), ranks));
      collectives_are_exact(cluster, kAlwaysSharded, {13});
      if (ranks % 3 == 0) collectives_are_exact(cluster, kAlwaysLeaders, {13});
    }
}

// Several pieces in every phase; late devices.
void every_size_is_exact(Wire wire) {
  for (const size_t leaders_up_to_bytes : {kAlwaysSharded, kAlwaysLeaders})
    collectives_are_exact(Cluster({2, 2}, wire), leaders_up_to_bytes, {0, 1, 7, 70001}, 3e-4);
  collectives_are_exact(Cluster({3, 1, 2}, wire), 0, {0, 1, 7, 20011}, 3e-4);
  collectives_are_exact(Cluster({1, 2}, wire), 0, {5}, 1e-3);
}

void every_size_is_exact() {
  at_once({[] { every_size_is_exact(Wire::kNccl); },
           [] { every_size_is_exact(Wire::kSharedMemory); },
           [] { every_size_is_exact(Wire::kMessages); }});
}

// The device is far behind the host when a larger collective needs more scratch.
void scratch_is_kept_until_the_device_has_passed_it() {
  mock().reset();
  const Cluster cluster({2, 2});
  std::atomic<int> launched{0};
  std::atomic<bool> go{false};
  on_ranks(cluster, [&](int me) {
    Rank rank(cluster, me, kAlwaysSharded);
    std::vector<float> small(100), large(10000);
    on_stream(rank.stream.get(), [&] {
      while (!go) sleep_ms(1);
    });
    for (std::vector<float>* data : {&small, &large}) {
      fill(rank, data->data(), data->size(), [=](size_t i) { return input_of(me, i, 0); });
      rank.group->all_reduce({data->data(), data->size(), DType::kFloat32}, Op::kSum, rank.next());
      check_next(rank, data->data(), data->size(),
                 [](size_t i) { return reduced(Op::kSum, 4, i, 0); });
    }
    if (++launched == 4) {
      CHECK(mock().num_calls("ncclMemAlloc") == 8 && mock().num_calls("ncclMemFree") == 0);
      go = true;
    }
    rank.synchronize();
    rank.group->barrier(rank.next());
  });
  CHECK(mock().num_calls("ncclMemFree") == 8);
}

void averages_are_refused_before_anything_is_sent() {
  mock().reset();
  const Cluster cluster({2, 2});
  on_ranks(cluster, [&](int me) {
    Rank rank(cluster, me, kAlwaysSharded, nullptr);
    error_of<UsageError>([&] { rank.group->all_reduce(rank.span(), Op::kAvg, rank.next()); });
    error_of<UsageError>([&] {
      rank.group->reduce_scatter({rank.memory.data(), 250, DType::kFloat32}, rank.span(), Op::kAvg,
                                 rank.next());
    });
    rank.group->barrier(rank.next());  // it is none the worse for it
  });
}

// ---------------------------------------------------------------------------------------------------------------
// Errors

// Nobody leaves while another still waits.
struct Meeting {
  explicit Meeting(int size) : missing(size) {}
  void meet() {
    --missing;
    while (missing > 0) sleep_ms(1);
  }
  std::atomic<int> missing;
};

bool contains(const Error& error, const std::string& words) {
  return std::string(error.what()).find(words) != std::string::npos;
}

// One that the watching threads meet; where all has ended well, the next call tells it.
template <typename Expected>
Expected error_of_device(Rank& rank) {
  const Deadline deadline(30);
  return error_of<Expected>([&] {
    for (; !deadline.passed(); sleep_ms(1)) rank.group->barrier(rank.next());
  });
}

void a_mismatch_is_everyones(const Cluster& cluster, size_t leaders_up_to_bytes,
                             const std::function<bool(int)>& is_odd, const std::string& names) {
  mock().reset();
  Meeting end(cluster.size());
  on_ranks(cluster, [&](int me) {
    Rank rank(cluster, me, leaders_up_to_bytes);
    rank.group->all_reduce(rank.span(), Op::kSum, rank.next());
    rank.synchronize();
    const auto differ = [&] {
      rank.group->all_reduce(rank.span(), is_odd(me) ? Op::kMax : Op::kSum, rank.next());
    };
    const auto error = error_of<MismatchError>(differ);
    CHECK(contains(error, names + " called all_reduce(max"));
    error_of<MismatchError>(differ);  // the first cause again
    error_of<MismatchError>([&] { rank.local->check(); });
    CHECK(rank.local->aborted() != 0);
    end.meet();
  });
}

void mismatches_are_everyones(Wire wire) {
  for (const size_t leaders_up_to_bytes : {kAlwaysSharded, kAlwaysLeaders}) {
    const Cluster cluster({3, 3}, wire);
    a_mismatch_is_everyones(
        cluster, leaders_up_to_bytes, [](int me) { return me == 4; }, cluster.name_of(4));
    // Which of the leaders' groups, or columns, meets it first is not known.
    a_mismatch_is_everyones(
        cluster, leaders_up_to_bytes, [&](int me) { return cluster.node_of(me) == 1; }, "");
  }
}

// A device that is busy with something else: its rank is named by all.
void a_late_device_is_named(const Cluster& cluster, size_t leaders_up_to_bytes, int late,
                            Obstacle obstacle) {
  mock().reset();
  Meeting end(cluster.size());
  obstacle.work = [&] {
    while (end.missing > 0) sleep_ms(1);
  };
  on_ranks(cluster, [&](int me) {
    Rank rank(cluster, me, leaders_up_to_bytes, scale_floats, me == late ? obstacle : Obstacle{});
    try {
      rank.group->all_reduce(rank.span(), Op::kSum, rank.next(0.5));
    } catch (const TimeoutError&) {  // of the wire, which waits on the host
    }
    const auto error = error_of_device<TimeoutError>(rank);
    CHECK(contains(error, cluster.name_of(late)));
    CHECK(rank.local->aborted() != 0);
    end.meet();
  });
}

void late_devices_are_named() {
  const auto late_in = [](std::vector<int> sizes, size_t leaders_up_to_bytes, int late,
                          Obstacle obstacle) -> std::function<void()> {
    return [=] { a_late_device_is_named(Cluster(sizes), leaders_up_to_bytes, late, obstacle); };
  };
  for (const int late : {0, 3})  // a leader, and none
    at_once({late_in({2, 2}, kAlwaysSharded, late, {Obstacle::kLocal, 1}),
             late_in({2, 2}, kAlwaysSharded, late, {Obstacle::kAcross, 1}),
             late_in({2, 2}, kAlwaysSharded, late, {Obstacle::kLocal, 2}),
             late_in({1, 2, 2}, kAlwaysLeaders, late, {Obstacle::kLocal, 1}),
             late_in({1, 2, 2}, kAlwaysLeaders, late, {Obstacle::kLocal, 2})});
  at_once({late_in({2, 3}, kAlwaysLeaders, 0, {Obstacle::kAcross, 1})});
}

#if !defined(__SANITIZE_THREAD__)  // which sees the threads of one process only

// Its device hangs in the nth phase of a collective, then the process dies. The others name it
// within two seconds; until a rank knows, what it gets is right.
void a_death_is_named(const Cluster& cluster, size_t leaders_up_to_bytes, int victim, int phase) {
  const Segment shared = Segment::create(sizeof(Meeting));
  auto* const end = new (shared.data()) Meeting(cluster.size() - 1);
  const auto live = [&](int me) {
    Rank rank(cluster, me, leaders_up_to_bytes);
    const auto train = [&](int iteration) {
      float* const data = rank.memory.data();
      fill(rank, data, rank.memory.size(), [=](size_t i) { return input_of(me, i, iteration); });
      rank.group->all_reduce(rank.span(), Op::kSum, rank.next());
      rank.follow();
      on_stream(rank.stream.get(), [&rank, &cluster, data, iteration] {
        if (rank.local->aborted()) return;
        for (size_t i = 0; i < rank.memory.size(); ++i)
          CHECK(data[i] == reduced(Op::kSum, cluster.size(), i, iteration));
      });
    };
    train(1);
    if (me == victim) {
      rank.synchronize();
      mock().hang(MockControl::kAnyRank, phase);
      std::thread([] {  // the rank itself may wait for its device
        usleep(200'000);
        kill(getpid(), SIGKILL);
      })
          .detach();
      train(2);
      pause();
    }
    const double begin_s = now_s();
    const auto error = error_of<PeerError>([&] {
      for (int iteration = 2; now_s() < begin_s + 60; ++iteration) {
        train(iteration);
        rank.stream.synchronize();
        rank.local->check();
      }
    });
    if (!contains(error, cluster.name_of(victim) + " died"))
      fail(__FILE__, __LINE__, std::string("names somebody else: ") + error.what());
    CHECK(now_s() - begin_s < 8);  // of which 2 after the death, on an idle machine
    rank.stream.synchronize();
    // check() is no call of the whole group: only the lane has heard.
    if (!cluster.is_all_nccl()) rank.group->fail(error);
    end->meet();
  };
  const auto statuses = in_processes(cluster.size(), [&](int me) {
    live(me);
    _exit(0);  // without the leak checker's look, which crashes on threads that are just ending
  });
  for (int r = 0; r < cluster.size(); ++r)
    CHECK(r == victim ? WIFSIGNALED(statuses[size_t(r)]) : ended_well(statuses[size_t(r)]));
}

void deaths_are_named() {
  const auto death_in = [](std::vector<int> sizes, Wire wire, size_t leaders_up_to_bytes,
                           int victim, int phase) -> std::function<void()> {
    return [=] { a_death_is_named(Cluster(sizes, wire), leaders_up_to_bytes, victim, phase); };
  };
  for (const int phase : {1, 2, 3})
    at_once({death_in({2, 2}, Wire::kNccl, kAlwaysSharded, 0, phase),
             death_in({2, 2}, Wire::kNccl, kAlwaysSharded, 3, phase),
             death_in({2, 3}, Wire::kNccl, kAlwaysLeaders, 2, phase)});
  for (const int phase : {1, 2})
    at_once({death_in({2, 3}, Wire::kNccl, kAlwaysLeaders, 4, phase),
             death_in({2, 2}, Wire::kSharedMemory, kAlwaysSharded, 3, phase),
             death_in({2, 3}, Wire::kSharedMemory, kAlwaysLeaders, 0, phase)});
}

#endif

}  // namespace

int main() {
  give_up_after(240);
#if !defined(__SANITIZE_THREAD__)
  deaths_are_named();
#endif
  late_devices_are_named();
  every_size_is_exact();
  // From here on with threads of its own: the mock's.
  every_shape_is_exact();
  scratch_is_kept_until_the_device_has_passed_it();
  averages_are_refused_before_anything_is_sent();
  for (const Wire wire : {Wire::kNccl, Wire::kSharedMemory}) mismatches_are_everyones(wire);
}
