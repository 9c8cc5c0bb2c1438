// NcclGroup over the mock: ranks are threads (or, where one dies, processes), devices are threads
// that come later. What is not waited for shows as a wrong result, and to ThreadSanitizer as a
// race.
#include <chrono>
#include <csignal>
#include <cstring>

#include "group/nccl_group.h"
#include "mocked.h"
#include "ranks.h"

using namespace pyar;
using namespace pyar::test;

namespace {

bool contains(const Error& error, const std::string& words) {
  return std::string(error.what()).find(words) != std::string::npos;
}

Call connecting(double timeout_s = 30) {
  Call call = Calls().next(timeout_s);
  call.sequence = 0;
  return call;
}

// A rank with a stream of its own, as a training has.
struct Rank {
  Rank(const World& world, int me, const NcclLibrary& library = nccl(),
       NcclGroup::Scale scale = scale_floats)
      : stream(cuda()),
        group(library, cuda(), me % 8, world.group(me), std::move(scale), connecting()) {}

  Call next(double timeout_s = 30) {
    Call call = calls.next(timeout_s);
    ready.record(stream.get());
    call.ready = ready.get();
    return call;
  }

  // For collectives that may be aborted: it outlives them.
  std::vector<float> memory = std::vector<float>(100, 1.0f);
  Span span() { return {memory.data(), memory.size(), DType::kFloat32}; }

  Stream stream;
  Event ready{cuda(), Event::Timing::kNo};
  NcclGroup group;
  Calls calls;
};

int input_of(int rank, size_t elem) {
  return static_cast<int>((elem * 7 + static_cast<size_t>(rank) * 5) % 4) + 1;
}

int reduced(Op op, int ranks, size_t elem) {
  int result = input_of(0, elem);
  for (int r = 1; r < ranks; ++r) {
    const int value = input_of(r, elem);
    result = op == Op::kSum    ? result + value
             : op == Op::kProd ? result * value
             : op == Op::kMin  ? std::min(result, value)
                               : std::max(result, value);
  }
  return result;
}

// A kernel that fills, as a backward does, and one that reads, as an update does.
template <typename T, typename Value>
void fill(Rank& rank, T* data, size_t num_elems, Value value) {
  on_stream(rank.stream.get(), [=] {
    for (size_t i = 0; i < num_elems; ++i) data[i] = T(value(i));
  });
}

template <typename T, typename Value>
void check_next(Rank& rank, const T* data, size_t num_elems, Value value) {
  rank.group.wait_on(rank.stream.get());
  on_stream(rank.stream.get(), [=] {
    for (size_t i = 0; i < num_elems; ++i) CHECK(float(data[i]) == float(T(value(i))));
  });
}

template <typename T>
void all_collectives(Rank& rank, DType dtype, size_t num_elems) {
  const int me = rank.group.rank(), ranks = rank.group.size();
  const auto shards = static_cast<size_t>(ranks);
  std::vector<T> data(num_elems), many(num_elems * shards);
  const auto mine = [=](size_t i) { return input_of(me, i); };
  for (const Op op : {Op::kSum, Op::kProd, Op::kMin, Op::kMax}) {
    fill(rank, data.data(), num_elems, mine);
    rank.group.all_reduce({data.data(), num_elems, dtype}, op, rank.next());
    check_next(rank, data.data(), num_elems, [=](size_t i) { return reduced(op, ranks, i); });
    fill(rank, many.data(), num_elems * shards, mine);
    rank.group.reduce_scatter({data.data(), num_elems, dtype},
                              {many.data(), num_elems * shards, dtype}, op, rank.next());
    check_next(rank, data.data(), num_elems, [=](size_t i) {
      return reduced(op, ranks, i + static_cast<size_t>(me) * num_elems);
    });
  }
  fill(rank, data.data(), num_elems, mine);
  rank.group.all_gather({many.data(), num_elems * shards, dtype}, {data.data(), num_elems, dtype},
                        rank.next());
  check_next(rank, many.data(), num_elems * shards,
             [=](size_t i) { return input_of(static_cast<int>(i / num_elems), i % num_elems); });
  for (int root = 0; root < ranks; ++root) {
    fill(rank, data.data(), num_elems, mine);
    rank.group.broadcast({data.data(), num_elems, dtype}, root, rank.next());
    check_next(rank, data.data(), num_elems, [=](size_t i) { return input_of(root, i); });
  }
  rank.stream.synchronize();
  rank.group.barrier(rank.next());
  rank.group.all_reduce({nullptr, 0, dtype}, Op::kSum, rank.next());
}

void on_ranks(int count, const std::function<void(const World&, int)>& body) {
  const World world(count);
  on_threads(count, [&](int me) { body(world, me); });
}

// Everything in the order of the streams: kernels and collectives are slow, the host is not.
void collectives_are_exact_and_in_order() {
  for (const int ranks : {1, 2, 3, 4}) {
    mock().reset();
    mock().set_delay(5e-4);
    on_ranks(ranks, [](const World& world, int me) {
      Rank rank(world, me);
      all_collectives<float>(rank, DType::kFloat32, 20011);  // more than a slot of the mock
      all_collectives<int32_t>(rank, DType::kInt32, 7);
      all_collectives<int64_t>(rank, DType::kInt64, 3);
      all_collectives<double>(rank, DType::kFloat64, 5);
      all_collectives<uint8_t>(rank, DType::kUInt8, 9);
      all_collectives<BFloat16>(rank, DType::kBFloat16, 11);
      all_collectives<Float16>(rank, DType::kFloat16, 13);
    });
  }
}

void the_host_does_not_wait_for_the_device() {
  mock().reset();
  std::atomic<int> held_back{0};
  std::atomic<bool> go{false};
  on_ranks(2, [&](const World& world, int me) {
    Rank rank(world, me);
    std::vector<float> data(10);
    on_stream(rank.stream.get(), [&] {
      while (!go) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    });
    for (int i = 0; i < 5; ++i)
      rank.group.all_reduce({data.data(), 10, DType::kFloat32}, Op::kSum, rank.next());
    // Both ranks have launched everything before any device could begin.
    if (++held_back == 2) go = true;
    rank.group.wait_on(rank.stream.get());
    rank.stream.synchronize();
  });
}

// A stream may wait for some calls, and not for later ones.
void a_call_knows_whether_it_has_ended() {
  on_ranks(2, [](const World& world, int me) {
    Rank rank(world, me);
    mock().set_delay(0.05);
    const Call call = rank.next();
    rank.group.all_reduce(rank.span(), Op::kSum, call);
    CHECK(!rank.group.has_ended(call.sequence));
    CHECK(rank.group.has_ended(call.sequence - 1));
    CHECK(!rank.group.latest().ended->has_passed());
    rank.group.wait_on(rank.stream.get());
    rank.stream.synchronize();
    CHECK(rank.group.has_ended(call.sequence));
    const FlightMarks marks = rank.group.latest();
    CHECK(marks.ended->seconds_since(*marks.begun) > 0.04);
    rank.group.barrier(rank.next());
    mock().set_delay(0);
  });
}

void an_error_from_elsewhere_ends_the_group() {
  on_ranks(3, [](const World& world, int me) {
    Rank rank(world, me);
    if (me == 1) {
      rank.group.barrier(rank.next());  // all have connected
      rank.group.fail(PeerError("rank 99 died", {99}));
    }
    const auto error = error_of<PeerError>([&] {
      for (;;) rank.group.barrier(rank.next());
    });
    CHECK(me != 1 || error.peers() == std::vector<int>{99});
    CHECK(contains(error, "rank 99 died"));
  });
}

void a_wait_ends_with_its_call() {
  mock().reset();
  on_ranks(2, [](const World& world, int me) {
    Rank rank(world, me);
    Stream reader(cuda());
    std::atomic<bool> go{false};
    std::vector<float> first(10, 1.0f), second(10, 1.0f);
    const Call call = rank.next();
    rank.group.all_reduce({first.data(), 10, DType::kFloat32}, Op::kSum, call);
    on_stream(rank.stream.get(), [&] {
      while (!go) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    });
    rank.group.all_reduce({second.data(), 10, DType::kFloat32}, Op::kSum, rank.next());
    rank.group.wait_on(reader.get(), call.sequence);
    reader.synchronize();  // for ever, if it waited for the second
    CHECK(first[9] == 2.0f);
    go = true;
    rank.group.wait_on(reader.get());
    reader.synchronize();
    CHECK(second[9] == 2.0f);
  });
}

// NCCL connects when a collective needs it: its function returns before the work is queued.
void work_that_is_queued_late_is_waited_for() {
  mock().reset();
  mock().set_lazy(true);
  on_ranks(3, [](const World& world, int me) {
    Rank rank(world, me);
    all_collectives<float>(rank, DType::kFloat32, 100);
  });
}

void averages_are_scaled_or_refused() {
  mock().reset();
  mock().set_delay(1e-3);
  on_ranks(2, [](const World& world, int me) {
    Rank rank(world, me);
    std::vector<float> data(10), shards(20);
    fill(rank, data.data(), 10, [=](size_t) { return me + 1; });
    fill(rank, shards.data(), 20, [=](size_t) { return me + 3; });
    rank.group.all_reduce({data.data(), 10, DType::kFloat32}, Op::kAvg, rank.next());
    check_next(rank, data.data(), 10, [](size_t) { return 1.5; });
    rank.group.reduce_scatter({data.data(), 10, DType::kFloat32},
                              {shards.data(), 20, DType::kFloat32}, Op::kAvg, rank.next());
    check_next(rank, data.data(), 10, [](size_t) { return 3.5; });
    rank.stream.synchronize();
  });
  on_ranks(2, [](const World& world, int me) {
    Rank rank(world, me, nccl(), nullptr);
    std::vector<float> data(10, 1.0f);
    const Span span{data.data(), 10, DType::kFloat32};
    error_of<UsageError>([&] { rank.group.all_reduce(span, Op::kAvg, rank.next()); });
    error_of<UsageError>([&] { rank.group.reduce_scatter(span, span, Op::kAvg, rank.next()); });
    rank.group.all_reduce(span, Op::kSum, rank.next());  // it is none the worse for it
    rank.group.wait_on(rank.stream.get());
    rank.stream.synchronize();
    CHECK(data[0] == 2.0f);
  });
}

// Before anything is launched.
void a_mismatch_is_everyones_error() {
  mock().reset();
  on_ranks(3, [](const World& world, int me) {
    Rank rank(world, me);
    std::vector<float> data(10);
    const auto call = [&] {
      rank.group.all_reduce({data.data(), me == 1 ? size_t{9} : size_t{10}, DType::kFloat32},
                            Op::kSum, rank.next());
    };
    const std::vector<int> odd{world.global(1)};
    CHECK(error_of<MismatchError>(call).peers() == odd);
    CHECK(error_of<MismatchError>(call).peers() == odd);  // the first cause again
    CHECK(error_of<MismatchError>([&] { rank.group.check(); }).peers() == odd);
    CHECK(error_of<MismatchError>([&] { rank.group.wait_on(nullptr); }).peers() == odd);
    CHECK(rank.group.aborted() != 0);
  });
  CHECK(mock().num_calls("ncclAllReduce") == 0 && mock().num_calls("ncclCommAbort") == 3);
}

void an_absent_rank_is_named() {
  mock().reset();
  std::atomic<int> failed{0};
  on_ranks(3, [&](const World& world, int me) {
    Rank rank(world, me);
    if (me != 2) {
      const auto error = error_of<TimeoutError>([&] { rank.group.barrier(rank.next(0.3)); });
      CHECK(error.peers() == std::vector<int>{world.global(2)});
      ++failed;
    }
    while (failed < 2) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  });
}

// Launches until the group fails; at most a minute.
template <typename Expected>
Expected error_of_training(Rank& rank, double timeout_s = 30) {
  const Deadline deadline(60);
  return error_of<Expected>([&] {
    while (!deadline.passed()) {
      rank.group.all_reduce(rank.span(), Op::kSum, rank.next(timeout_s));
      rank.group.wait_on(rank.stream.get());
      rank.stream.synchronize();
      rank.group.check();
    }
  });
}

void a_refused_call_ends_the_wait_of_the_others() {
  mock().reset();
  mock().fail("ncclAllReduce", 1, 3, 3);
  on_ranks(3, [](const World& world, int me) {
    Rank rank(world, me);
    const auto error = error_of_training<Error>(rank);
    CHECK(contains(error, "ncclAllReduce: a mocked NCCL error: the mock's last words (status 3)"));
    CHECK(me == 1 ? error.peers().empty() : error.peers() == std::vector<int>{world.global(1)});
  });
  CHECK(mock().num_calls("ncclCommAbort") == 3);
}

// On the device of one rank the collective never ends, so on none.
void a_hanging_collective_is_aborted() {
  mock().reset();
  mock().hang(1, 2);
  on_ranks(3, [](const World& world, int me) {
    Rank rank(world, me);
    const auto error = error_of_training<TimeoutError>(rank, 0.5);
    CHECK(contains(error, "all devices had begun, and not ended, all_reduce(sum, float32, 100"));
    CHECK(error.peers().size() <= 1);  // who reported it; nobody is to blame
  });
}

// A device that is busy with something else is as good as absent, and known by name.
void a_device_that_does_not_begin_is_named() {
  mock().reset();
  std::atomic<int> failed{0};
  on_ranks(3, [&](const World& world, int me) {
    Rank rank(world, me);
    if (me == 2)
      on_stream(rank.stream.get(), [&] {
        while (failed < 3) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      });
    rank.group.all_reduce(rank.span(), Op::kSum, rank.next(0.5));
    const Deadline deadline(30);
    const auto error = error_of<TimeoutError>([&] {
      for (; !deadline.passed(); std::this_thread::sleep_for(std::chrono::milliseconds(1)))
        rank.group.check();
    });
    CHECK(error.peers() == std::vector<int>{world.global(2)});
    ++failed;
    rank.stream.synchronize();
  });
}

void what_is_queued_behind_an_abort_knows_it() {
  mock().reset();
  mock().hang(0, 1);
  on_ranks(2, [](const World& world, int me) {
    Rank rank(world, me);
    uint32_t seen = 0;
    rank.group.all_reduce(rank.span(), Op::kSum, rank.next(0.3));
    rank.group.wait_on(rank.stream.get());
    on_stream(rank.stream.get(), [&] { seen = rank.group.aborted(); });
    rank.stream.synchronize();
    CHECK(seen == 1);
  });
}

void an_error_of_nccl_itself_is_noticed() {
  mock().reset();
  mock().hang(0, 4);
  std::atomic<int> launched{0};
  on_ranks(2, [&](const World& world, int me) {
    Rank rank(world, me);
    for (int i = 0; i < 4; ++i) rank.group.all_reduce(rank.span(), Op::kSum, rank.next());
    if (++launched == 2) mock().set_async_error(0, 6);
    const Deadline deadline(30);
    const auto error = error_of<Error>([&] {
      for (; !deadline.passed(); std::this_thread::sleep_for(std::chrono::milliseconds(1)))
        rank.group.check();
    });
    CHECK(contains(error, "NCCL, during all_reduce") && contains(error, "remote process exited"));
    CHECK(me == 0 ? error.peers().empty() : error.peers() == std::vector<int>{world.global(0)});
  });
}

void watching_breaks_no_capture() {
  mock().reset();
  on_ranks(2, [](const World& world, int me) {
    Rank rank(world, me);
    mock().set_delay(0.03);  // several looks of the watching thread
    mock().set_capturing(true);
    rank.group.all_reduce(rank.span(), Op::kSum, rank.next());
    rank.group.barrier(rank.next());
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    rank.group.check();
    rank.group.barrier(rank.next());
    mock().set_capturing(false);
    rank.group.wait_on(rank.stream.get());
    rank.stream.synchronize();
    CHECK(rank.memory[0] == 2);
  });
  mock().reset();
}

void a_broken_device_is_noticed() {
  mock().reset();
  on_ranks(2, [&](const World& world, int me) {
    Rank rank(world, me);
    rank.group.barrier(rank.next());
    if (me == 1) mock().fail("cudaEventQuery", MockControl::kAnyRank, 5, 719);
    rank.group.barrier(rank.next());
    const auto error = error_of_training<Error>(rank);
    CHECK(contains(error, "cudaEventQuery: a mocked error (status 719)"));
  });
}

// What all have launched ends well on all of them, although the first leaves at once.
void leaving_disturbs_nothing_that_was_launched() {
  mock().reset();
  mock().set_delay(0.02);
  on_ranks(4, [](const World& world, int me) {
    Rank rank(world, me);
    std::vector<float> data(20000, 1.0f);
    rank.group.all_reduce({data.data(), data.size(), DType::kFloat32}, Op::kSum, rank.next());
    if (me == 0) rank.group.leave();
    rank.group.leave();
    CHECK(data[0] == 4.0f && data[19999] == 4.0f);
    rank.group.check();
    CHECK(rank.group.aborted() == 0);
  });
  CHECK(mock().num_calls("ncclCommAbort") == 4);
}

void a_rank_that_leaves_is_missed_only_when_needed() {
  mock().reset();
  on_ranks(3, [](const World& world, int me) {
    Rank rank(world, me);
    std::vector<float> data(10, 1.0f);
    rank.group.all_reduce({data.data(), 10, DType::kFloat32}, Op::kSum, rank.next());
    if (me == 0) return rank.group.leave();
    rank.group.wait_on(rank.stream.get());
    rank.stream.synchronize();
    CHECK(data[9] == 3.0f);
    CHECK(error_of<PeerError>([&] { rank.group.barrier(rank.next()); }).peers() ==
          std::vector<int>{world.global(0)});
  });
}

// Also while something hangs.
void leaving_takes_a_second_at_most() {
  mock().reset();
  mock().hang(0, 1);
  on_ranks(2, [](const World& world, int me) {
    Rank rank(world, me);
    rank.group.all_reduce(rank.span(), Op::kSum, rank.next());
    const double begin_s = now_s();
    rank.group.leave();
    CHECK(now_s() - begin_s < 3);  // of which 1 is promised
    CHECK(rank.group.aborted() == 1);
    error_of<PeerError>([&] { rank.group.check(); });
  });
}

// NCCL need not come back from an abort. The memory goes with the thread that waits for it.
void an_abort_that_hangs_is_left_behind() {
  mock().reset();
  mock().set_abort_delay(4);
  on_ranks(2, [](const World& world, int me) {
    Rank rank(world, me);
    rank.group.all_reduce(rank.span(), Op::kSum, rank.next());
    rank.group.wait_on(rank.stream.get());
    rank.stream.synchronize();
    const double begin_s = now_s();
    rank.group.leave();
    CHECK(now_s() - begin_s < 3);  // of which 1 is promised
    rank.group.leave();
  });
}

void a_refused_communicator_is_everyones_error() {
  mock().reset();
  mock().fail("ncclCommInitRankConfig", 1, 1, 5);
  on_ranks(3, [&](const World& world, int me) {
    const Error error = error_of<Error>([&] { const Rank rank(world, me); });
    CHECK(contains(error, "ncclCommInitRankConfig: a mocked NCCL error"));
    CHECK(me == 1 ? error.peers().empty() : error.peers() == std::vector<int>{world.global(1)});
  });
}

// One of them has no memory, before it has met the others.
void a_refused_device_is_everyones_error() {
  mock().reset();
  mock().fail("cudaHostAlloc", MockControl::kAnyRank, 1, 2);
  std::atomic<int> num_blameless{0};
  on_ranks(3, [&](const World& world, int me) {
    const Error error = error_of<Error>([&] { const Rank rank(world, me); });
    CHECK(contains(error, "cudaHostAlloc: a mocked error"));
    num_blameless += error.peers().size() == 1;
  });
  CHECK(num_blameless == 2);
}

void ranks_with_different_versions_are_told() {
  mock().reset();
  const DynamicLibrary plain({.name = "",
                              .variable = "",
                              .path = mock_path("nccl_plain"),
                              .sonames = {},
                              .folders = {},
                              .remedy = ""});
  control_of(plain).set_version(22809);
  const NcclLibrary& other = NcclLibrary::load(mock_path("nccl_plain"));
  CHECK(other.version() == 22809);
  on_ranks(3, [&](const World& world, int me) {
    const auto error =
        error_of<MismatchError>([&] { const Rank rank(world, me, me == 2 ? other : nccl()); });
    CHECK(error.peers() == std::vector<int>{world.global(2)});
    CHECK(contains(error, "NCCL 2.28.9") && contains(error, "NCCL 2.30.7"));
  });
}

// Ranks 0, 2, 3 | 1, 4; then the smaller groups work, each by itself, and so does the large one.
void a_group_splits_by_color() {
  mock().reset();
  const World world(5), of_color_0(3), of_color_1(2);
  on_threads(5, [&](int me) {
    Rank rank(world, me);
    const int color = me == 1 || me == 4;
    const World& part = color == 0 ? of_color_0 : of_color_1;
    const int my_part = color == 0 ? std::max(me - 1, 0) : me / 4;
    const std::unique_ptr<NcclGroup> group =
        rank.group.split(color, part.group(my_part), rank.next());
    CHECK(group->rank() == my_part && group->size() == (color == 0 ? 3 : 2));
    std::vector<float> data(100, float(1 << me));
    Calls calls;
    Call call = calls.next();
    rank.ready.record(rank.stream.get());
    call.ready = rank.ready.get();
    group->all_reduce({data.data(), 100, DType::kFloat32}, Op::kSum, call);
    group->wait_on(rank.stream.get());
    rank.group.all_reduce({data.data(), 100, DType::kFloat32}, Op::kSum, rank.next());
    rank.group.wait_on(rank.stream.get());
    rank.stream.synchronize();
    CHECK(data[99] == 3 * 13 + 2 * 18);
    rank.group.barrier(rank.next());
  });
}

void a_rank_may_stay_out_of_a_split() {
  mock().reset();
  const World world(3), pair(2);
  on_threads(3, [&](int me) {
    Rank rank(world, me);
    const auto group = me == 2 ? rank.group.split(NcclGroup::kNoColor, nullptr, rank.next())
                               : rank.group.split(0, pair.group(me), rank.next());
    CHECK((group == nullptr) == (me == 2));
    rank.group.barrier(rank.next());
  });
}

void without_split_there_is_an_error() {
  const NcclLibrary& plain = NcclLibrary::load(mock_path("nccl_plain"));
  on_ranks(2, [&](const World& world, int me) {
    Rank rank(world, me, plain);
    CHECK(contains(error_of<Error>([&] { rank.group.allocate(10); }), "ncclMemAlloc"));
    const World part(1);
    const Error error = error_of<Error>([&] { rank.group.split(0, part.group(0), rank.next()); });
    CHECK(contains(error, "ncclCommSplit"));
  });
}

void buffers_are_registered_and_outlive_the_group() {
  mock().reset();
  on_ranks(2, [](const World& world, int me) {
    std::shared_ptr<NcclBuffer> kept;
    {
      Rank rank(world, me);
      const auto fleeting = rank.group.allocate(1000);
      kept = rank.group.allocate(4000);
      CHECK(kept->bytes() == 4000);
      auto* const data = static_cast<float*>(kept->data());
      fill(rank, data, 1000, [=](size_t) { return me + 1; });
      rank.group.all_reduce({data, 1000, DType::kFloat32}, Op::kSum, rank.next());
      check_next(rank, data, 1000, [](size_t) { return 3; });
      rank.stream.synchronize();
    }
    static_cast<float*>(kept->data())[999] = 1;
  });
  CHECK(mock().num_calls("ncclCommRegister") == 4 && mock().num_calls("ncclCommDeregister") == 2);
  CHECK(mock().num_calls("ncclMemAlloc") == 4 && mock().num_calls("ncclMemFree") == 4);
}

#if !defined(__SANITIZE_THREAD__)  // which sees the threads of one process only

// The others have launched, and would wait for ever. A death is known within a second.
void a_death_is_named() {
  for (const int victim : {0, 2}) {
    const World world(3);
    const auto live = [&](int me) {
      Rank rank(world, me);
      rank.group.barrier(rank.next());
      if (me == victim) {
        mock().hang(me, 1);
        rank.group.all_reduce(rank.span(), Op::kSum, rank.next());
        usleep(100'000);
        kill(getpid(), SIGKILL);
      }
      const double begin_s = now_s();
      const auto error = error_of_training<PeerError>(rank);
      CHECK(error.peers() == std::vector<int>{world.global(victim)});
      CHECK(now_s() - begin_s < 5);  // of which 1 after the death, on an idle machine
    };
    const auto statuses = in_processes(3, [&](int me) {
      live(me);
      _exit(0);  // without the leak checker's look, which crashes on threads that are just ending
    });
    for (int r = 0; r < 3; ++r)
      CHECK(r == victim ? WIFSIGNALED(statuses[size_t(r)]) : ended_well(statuses[size_t(r)]));
  }
}

void a_forked_child_leaves_the_group_alone() {
  const auto statuses = in_processes(1, [](int) {
    const World world(1);
    std::unique_ptr<Rank, DeleteByOwner> rank(new Rank(world, 0));
    const pid_t child = fork();
    if (child == 0) {
      rank->group.leave();
      rank.reset();
      _exit(7);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 7);
    std::vector<float> data(10, 2.0f);
    rank->group.all_reduce({data.data(), 10, DType::kFloat32}, Op::kSum, rank->next());
    rank->group.wait_on(rank->stream.get());
    rank->stream.synchronize();
    rank->group.check();
  });
  CHECK(ended_well(statuses[0]));
}

#endif

}  // namespace

int main() {
  give_up_after(240);
#if !defined(__SANITIZE_THREAD__)
  a_death_is_named();
  a_forked_child_leaves_the_group_alone();
#endif
  collectives_are_exact_and_in_order();
  the_host_does_not_wait_for_the_device();
  a_call_knows_whether_it_has_ended();
  an_error_from_elsewhere_ends_the_group();
  a_wait_ends_with_its_call();
  work_that_is_queued_late_is_waited_for();
  averages_are_scaled_or_refused();
  a_mismatch_is_everyones_error();
  an_absent_rank_is_named();
  a_refused_call_ends_the_wait_of_the_others();
  a_hanging_collective_is_aborted();
  a_device_that_does_not_begin_is_named();
  what_is_queued_behind_an_abort_knows_it();
  an_error_of_nccl_itself_is_noticed();
  watching_breaks_no_capture();
  a_broken_device_is_noticed();
  leaving_disturbs_nothing_that_was_launched();
  a_rank_that_leaves_is_missed_only_when_needed();
  leaving_takes_a_second_at_most();
  an_abort_that_hangs_is_left_behind();
  a_refused_communicator_is_everyones_error();
  a_refused_device_is_everyones_error();
  ranks_with_different_versions_are_told();
  a_group_splits_by_color();
  a_rank_may_stay_out_of_a_split();
  without_split_there_is_an_error();
  buffers_are_registered_and_outlive_the_group();
}
