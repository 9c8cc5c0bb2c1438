// The engine under threads that call, submit, wait and close at once.
#include "engine/engine.h"

#include <atomic>
#include <chrono>
#include <deque>

#include "collectives.h"

using namespace pyar;
using namespace pyar::test;

namespace {

const std::function<void()> kNothing = [] {};

// An engine with its group, and how a communicator ends.
class Rank {
 public:
  Rank(const World& world, int me, double timeout_s = 60) {
    auto group = world.group(me);
    group_ = group.get();
    engine_ = std::make_unique<Engine>(std::move(group), timeout_s, kPatience);
  }
  ~Rank() { close(); }
  Engine& engine() { return *engine_; }
  void close() {
    engine_->close([this] { group_->interrupt(); });
    group_->leave();
  }

 private:
  std::unique_ptr<Engine> engine_;
  SharedMemoryGroup* group_;
};

// All ranks' calls are alike, so that any order among a rank's threads is the others' order too.
struct Sum {
  float value = 1;
  void operator()(Group& group, const Call& call) {
    group.all_reduce({&value, 1, DType::kFloat32}, Op::kSum, call);
  }
};

bool finish(Work& work) {
  while (!work.wait_for(kWatchSliceS)) {
  }
  return true;
}

void one_order_whoever_calls() {
  constexpr int kRanks = 3, kCallers = 3, kCalls = 500;
  const World world(kRanks);
  on_threads(kRanks, [&](int me) {
    Rank rank(world, me);
    on_threads(kCallers, [&](int caller) {
      for (int i = 0; i < kCalls; ++i) {
        Sum sum;
        if (caller == 0) {
          rank.engine().run(std::ref(sum), 0, kNothing);
        } else {
          const auto work = rank.engine().submit(std::ref(sum), 0);
          CHECK(finish(*work) && work->done());
          const Work::Times& times = work->times();
          CHECK(times.enqueued_s <= times.start_s && times.start_s <= times.end_s);
          CHECK(times.arrivals_s.size() == kRanks);
        }
        CHECK(sum.value == kRanks);
      }
    });
  });
}

// Many on their way at once, waited for in another order and by another thread.
void works_are_waited_for_elsewhere() {
  constexpr int kRanks = 2, kWorks = 1000;
  const World world(kRanks);
  on_threads(kRanks, [&](int me) {
    Rank rank(world, me);
    std::deque<Sum> sums(kWorks);
    std::vector<std::shared_ptr<Work>> works;
    for (Sum& sum : sums) works.push_back(rank.engine().submit(std::ref(sum), 0));
    on_threads(2, [&](int half) {
      for (int i = kWorks - 1 - half; i >= 0; i -= 2) {
        CHECK(finish(*works[size_t(i)]));
        CHECK(sums[size_t(i)].value == kRanks);
      }
    });
  });
}

void a_work_under_way_is_not_done() {
  const World world(2);
  std::atomic<bool> is_inside{false}, was_seen{false};
  on_threads(2, [&](int me) {
    Rank rank(world, me);
    Sum sum;
    if (me == 1)
      while (!was_seen.load()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    const auto work = rank.engine().submit(
        [&](Group& group, const Call& call) {
          is_inside = true;
          sum(group, call);
        },
        0);
    if (me == 0) {
      while (!is_inside.load()) std::this_thread::yield();
      CHECK(!work->done() && !work->wait_for(0));
      was_seen = true;
    }
    CHECK(finish(*work) && sum.value == 2);
  });
}

// What is under way when a rank closes ends with an error there and with its peer's name elsewhere.
void a_close_ends_what_is_under_way() {
  constexpr int kRanks = 2;
  for (int round = 0; round < 40; ++round) {
    const World world(kRanks);
    // Rank 0 closes; of its own calls, one may also come too late.
    const auto ends = [&](int me, const std::function<void()>& body) {
      try {
        body();
      } catch (const Error& error) {
        if (error.cause() == Cause::kUsage) return me == 0;
        return error.cause() == Cause::kPeer && error.peers() == std::vector<int>{world.global(0)};
      }
      return false;
    };
    on_threads(kRanks, [&](int me) {
      Rank rank(world, me);
      std::atomic<int> calls{0};
      const auto call_on = [&](int caller) {
        for (;; ++calls) {
          Sum sum;
          if (caller == 0)
            rank.engine().run(std::ref(sum), 0, kNothing);
          else
            finish(*rank.engine().submit(std::ref(sum), 0));
        }
      };
      std::vector<std::thread> threads;
      for (int caller = 0; caller < 2; ++caller)
        threads.emplace_back([&, caller] { CHECK(ends(me, [&] { call_on(caller); })); });
      if (me == 0) {
        while (calls.load() < 20) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        rank.close();
      }
      for (std::thread& thread : threads) thread.join();
      CHECK(ends(me, [&] { rank.engine().submit(Sum(), 0); }));
    });
  }
}

// The group goes when close() has returned.
void a_close_waits_for_callers() {
  const World world(2);
  std::atomic<bool> over{false};
  on_threads(2, [&](int me) {
    Rank rank(world, me);
    if (me == 0) {
      std::atomic<bool> is_inside{false};
      const auto wait_for_rank_1 = [&](Group& group, const Call& call) {
        is_inside = true;
        try {
          group.barrier(call);
        } catch (...) {
          is_inside = false;
          throw;
        }
      };
      std::thread caller(
          [&] { error_of<PeerError>([&] { rank.engine().run(wait_for_rank_1, 0, kNothing); }); });
      while (!is_inside.load()) std::this_thread::yield();
      rank.close();
      CHECK(!is_inside.load());
      caller.join();
      over = true;
    }
    while (!over.load()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  });
}

void several_threads_may_close() {
  for (int round = 0; round < 100; ++round) {
    const World world(2);
    on_threads(2, [&](int me) {
      Rank rank(world, me);
      Sum sum;
      finish(*rank.engine().submit(std::ref(sum), 0));
      on_threads(2, [&](int) { rank.close(); });
    });
  }
}

// The first cause is everyone's, for what is queued and for what comes later.
void the_first_error_wins() {
  const World world(2);
  on_threads(2, [&](int me) {
    Rank rank(world, me);
    float data[4] = {};
    std::atomic<bool> is_queued{false};
    const auto wrong = rank.engine().submit(
        [&](Group& group, const Call& call) {
          while (!is_queued.load()) std::this_thread::yield();
          group.all_reduce({data, size_t(3 + me), DType::kFloat32}, Op::kSum, call);
        },
        0);
    Sum sum;
    const auto queued = rank.engine().submit(std::ref(sum), 0);
    is_queued = true;
    const std::string first = error_of<MismatchError>([&] { finish(*wrong); }).what();
    CHECK(error_of<MismatchError>([&] { finish(*queued); }).what() == first);
    const auto later = [&] { rank.engine().run(std::ref(sum), 0, kNothing); };
    CHECK(error_of<MismatchError>(later).what() == first);
  });
}

// on_slice runs on the caller's thread while it waits; what it throws ends the wait, here or behind
// a work that the worker is in.
void a_slice_may_throw() {
  for (const bool is_behind_work : {false, true}) {
    const World world(2);
    std::atomic<bool> over{false};
    on_threads(2, [&](int me) {
      Rank rank(world, me);
      if (me == 0) {
        Sum sum, before;
        std::shared_ptr<Work> work;
        if (is_behind_work) work = rank.engine().submit(std::ref(before), 0);
        const std::string ctrl_c = "ctrl-c";
        const std::function<void()> interrupted = [&] { throw Error(ctrl_c); };
        CHECK(error_of<Error>([&] { rank.engine().run(std::ref(sum), 0, interrupted); }).what() ==
              ctrl_c);
        if (work) {
          CHECK(work->done());  // else the worker might still be in `sum`
          CHECK(error_of<Error>([&] { finish(*work); }).what() == ctrl_c);
        }
        over = true;
      }
      while (!over.load()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    });
  }
}

}  // namespace

int main() {
  give_up_after(240);
  one_order_whoever_calls();
  works_are_waited_for_elsewhere();
  a_work_under_way_is_not_done();
  a_close_ends_what_is_under_way();
  a_close_waits_for_callers();
  several_threads_may_close();
  the_first_error_wins();
  a_slice_may_throw();
}
