// DeviceSide and its clock over the mock: what comes before, what comes after, and when it was.
#include "engine/device_side.h"

#include <chrono>
#include <thread>

#include "base/clock.h"
#include "mocked.h"
#include "ranks.h"

using namespace pyar;
using namespace pyar::test;

namespace {

void sleep_ms(int milliseconds) {
  std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
}

// One rank as the bindings put it together.
struct Rank {
  Rank(const World& world, int me)
      : control(world.group(me)),
        engine(control, 30, kPatience),
        side(cuda(), me, [this, me](const Call& call) {
          return std::make_unique<NcclGroup>(nccl(), cuda(), me, control, nullptr, call);
        }) {}
  ~Rank() { close(); }
  void close() {
    engine.close([this] { control->interrupt(); }, [this] { side.leave(); });
  }

  std::shared_ptr<Work> all_reduce(std::vector<float>& data,
                                   std::shared_ptr<DeviceTimes> times = nullptr) {
    const Span span{data.data(), data.size(), DType::kFloat32};
    return engine.submit(
        side.task(
            stream.get(),
            [span](NcclGroup& group, const Call& call) { group.all_reduce(span, Op::kSum, call); },
            std::move(times)),
        0);
  }

  std::shared_ptr<SharedMemoryGroup> control;
  Engine engine;
  DeviceSide side;
  Stream stream{cuda()};
};

void on_ranks(int count, const std::function<void(Rank&, int)>& body) {
  mock().reset();
  const World world(count);
  on_threads(count, [&](int me) {
    Rank rank(world, me);
    body(rank, me);
    // A rank that is still needed does not leave.
    rank.engine.run([](Group& group, const Call& call) { group.barrier(call); }, 0, [] {});
  });
  mock().reset();
}

void finish(const std::shared_ptr<Work>& work) {
  while (!work->wait_for(1)) {
  }
}

void a_task_comes_after_what_was_queued_and_before_what_comes() {
  on_ranks(3, [](Rank& rank, int) {
    std::vector<float> data(50, 0.0f), seen(50);
    on_stream(rank.stream.get(), [&] {
      sleep_ms(50);
      data.assign(50, 2.0f);
    });
    const auto work = rank.all_reduce(data);
    finish(work);
    CHECK(!rank.side.has_ended(work->sequence()));
    rank.side.hold_back(rank.stream.get(), work->sequence());
    on_stream(rank.stream.get(), [&] { seen = data; });
    rank.stream.synchronize();
    CHECK(seen[0] == 6 && seen[49] == 6);
    CHECK(rank.side.has_ended(work->sequence()));
  });
}

// The engine is late; what the caller has queued in the meantime is none of the task's business.
void a_late_task_waits_only_for_what_was_there_when_it_was_submitted() {
  on_ranks(2, [](Rank& rank, int) {
    std::vector<float> data(50, 1.0f);
    finish(rank.all_reduce(data));  // connects
    const auto first = rank.engine.submit([](Group&, const Call&) { sleep_ms(60); }, 0);
    const auto times = std::make_shared<DeviceTimes>();
    const auto work = rank.all_reduce(data, times);
    double kernel_ended_s = 0;
    on_stream(rank.stream.get(), [&] {
      sleep_ms(400);
      kernel_ended_s = now_s();
    });
    finish(work);
    rank.stream.synchronize();
    CHECK(times->ended.passed_s() && *times->ended.passed_s() < kernel_ended_s - 0.1);
  });
}

void what_follows_a_collective_is_waited_for_and_counts() {
  on_ranks(2, [](Rank& rank, int) {
    std::vector<float> data(50, 1.0f);
    bool updated = false;
    const auto times = std::make_shared<DeviceTimes>();
    const Span span{data.data(), data.size(), DType::kFloat32};
    const double before_s = now_s();
    const auto work = rank.engine.submit(rank.side.task(
                                             rank.stream.get(),
                                             [&](NcclGroup& group, const Call& call) {
                                               group.all_reduce(span, Op::kSum, call);
                                               on_stream(group.stream(), [&] {
                                                 sleep_ms(80);
                                                 updated = true;
                                               });
                                             },
                                             times),
                                         0);
    finish(work);
    rank.side.hold_back(rank.stream.get());
    on_stream(rank.stream.get(), [&] { CHECK(updated); });
    rank.stream.synchronize();
    const double begun_s = *times->begun.passed_s(), ended_s = *times->ended.passed_s();
    CHECK(before_s < begun_s && begun_s + 0.07 < ended_s && ended_s <= now_s() + 5e-3);
  });
}

void a_mark_has_a_time_once_it_is_passed() {
  on_ranks(1, [](Rank& rank, int) {
    const double before_s = now_s();
    on_stream(rank.stream.get(), [] { sleep_ms(100); });
    const Mark mark = rank.side.mark(rank.stream.get());
    CHECK(!mark.passed_s());
    rank.stream.synchronize();
    CHECK(*mark.passed_s() >= before_s + 0.09 && *mark.passed_s() <= now_s() + 5e-3);
  });
}

// A replay would not repeat what the hosts do: refused before anything is queued, and of no
// consequence.
void a_captured_stream_is_refused() {
  on_ranks(2, [](Rank& rank, int) {
    std::vector<float> data(5, 1.0f);
    finish(rank.all_reduce(data));
    rank.engine.run([](Group& group, const Call& call) { group.barrier(call); }, 0, [] {});
    mock().set_capturing(true);
    const double before_s = now_s();
    error_of<UsageError>([&] { rank.all_reduce(data); });
    const Mark mark = rank.side.mark(rank.stream.get());
    rank.engine.run([](Group& group, const Call& call) { group.barrier(call); }, 0, [] {});
    mock().set_capturing(false);
    CHECK(*mark.passed_s() >= before_s && *mark.passed_s() <= now_s());
    rank.engine.run([](Group& group, const Call& call) { group.barrier(call); }, 0, [] {});
    finish(rank.all_reduce(data));
    rank.side.hold_back(rank.stream.get());
    rank.stream.synchronize();
    CHECK(data == std::vector<float>(5, 4.0f));
  });
}

// What cannot be connected is the first error, for the other ranks too, and nobody waits at the
// end.
void a_device_that_cannot_be_used_is_everyones_error() {
  mock().reset();
  mock().fail("ncclCommInitRankConfig", 1, 1, 2);
  const World world(2);
  on_threads(2, [&](int me) {
    Rank rank(world, me);
    std::vector<float> data(5, 1.0f);
    const auto work = rank.all_reduce(data);
    bool failed = false;
    try {
      finish(work);
    } catch (const Error&) {
      failed = true;
    }
    CHECK(failed && rank.side.has_ended(work->sequence()));
  });
  mock().reset();
}

// NCCL does not return from the call: closing aborts it, and does not wait for ever.
void closing_ends_a_call_that_hangs() {
  mock().reset();
  const World world(2);
  on_threads(2, [&](int me) {
    Rank rank(world, me);
    std::vector<float> data(5, 1.0f);
    finish(rank.all_reduce(data));  // connects
    rank.engine.run([](Group& group, const Call& call) { group.barrier(call); }, 0, [] {});
    if (me == 1) mock().fail("ncclAllReduce", 1, 1, MockControl::kStalls);
    const auto work = rank.all_reduce(data);
    sleep_ms(100);
    const double began_s = now_s();
    rank.close();
    CHECK(now_s() - began_s < 1.5);
    if (me == 1) CHECK(error_of<Error>([&] { finish(work); }).what());
  });
  mock().reset();
}

}  // namespace

int main() {
  give_up_after(120);
  a_task_comes_after_what_was_queued_and_before_what_comes();
  a_late_task_waits_only_for_what_was_there_when_it_was_submitted();
  what_follows_a_collective_is_waited_for_and_counts();
  a_mark_has_a_time_once_it_is_passed();
  a_captured_stream_is_refused();
  a_device_that_cannot_be_used_is_everyones_error();
  closing_ends_a_call_that_hangs();
}
