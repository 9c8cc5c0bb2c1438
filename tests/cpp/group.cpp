// The ranks of one host, as threads of this process: collectives, and what goes wrong with them.
#include <chrono>
#include <cmath>
#include <functional>

#include "collectives.h"

using namespace pyar;
using namespace pyar::test;

namespace {

void collectives_are_exact() {
  for (const int ranks : {1, 2, 3, 4}) {
    const World world(ranks);
    on_threads(ranks, [&](int me) {
      random_collectives<float>(*world.group(me), DType::kFloat32, 70000, 60, 1);
    });
    const World another(ranks);
    on_threads(ranks, [&](int me) {
      random_collectives<uint8_t>(*another.group(me), DType::kUInt8, 300000, 60, 2);
    });
  }
}

// Many small ones, so that ranks overtake each other wherever they can.
void many_small_collectives() {
  const World world(3);
  on_threads(3, [&](int me) {
    const auto group = world.group(me);
    random_collectives<int32_t>(*group, DType::kInt32, 40, 1500, 3);
  });
}

// Reduction and update in one pass over one copy of the weights: all ranks read and write them.
void updates_are_exact() {
  constexpr size_t kWeights = 5000, kRounds = 10;
  const World world(3);
  on_threads(3, [&](int me) {
    const auto group = world.group(me);
    Calls calls;
    const auto allocate = [&](size_t num_elems, bool one_copy) {
      return group->allocate(num_elems, DType::kFloat32, one_copy, calls.next());
    };
    const auto gradients = allocate(kWeights + 2, false), weights = allocate(kWeights, true),
               momentum = allocate(kWeights, true);
    const std::vector<UpdatePiece> pieces{
        {0, 1000, {.history = 0.5, .momentum = 0.5, .rate = 1}, 1.0},
        {1000, 4000, {.history = 0.5, .momentum = 0.5, .rate = 1}, 1.0}};
    auto* const g = reinterpret_cast<float*>(gradients->part(me));
    const auto* const w = reinterpret_cast<const float*>(weights->part(me));
    double expected_momentum = 0, expected = 0;
    for (size_t round = 0; round < kRounds; ++round) {
      // All ranks have used the first piece, now and then one the second.
      const bool second_is_used = round % 2 != 0 && me == 1;
      for (size_t i = 0; i < kWeights; ++i) g[i] = i < 1000 || second_is_used ? float(me + 1) : 0;
      g[kWeights] = 1;
      g[kWeights + 1] = second_is_used;
      Findings findings{.num_elems = kWeights};
      Call call = calls.next();
      call.findings = &findings;
      group->update({.gradients = {g, kWeights + 2, DType::kFloat32},
                     .weights = {weights->part(me), kWeights, DType::kFloat32},
                     .momentum = momentum->part(me),
                     .pieces = pieces,
                     .flags_begin = kWeights,
                     .is_reduced = false,
                     .scale = 1.0},
                    call);
      CHECK(!findings.has_nonfinite);
      expected_momentum = 0.5 * expected_momentum + 6;
      expected -= expected_momentum;
      for (size_t i = 0; i < 1000; ++i) CHECK(w[i] == float(expected));
      for (size_t i = 0; i < kWeights; ++i) CHECK(g[i] == 0);
      group->barrier(calls.next());  // before the next round's writes
    }
    CHECK(w[1000] < 0 && w[1000] == w[kWeights - 1]);
  });
}

void nonfinite_gradients_are_found() {
  const World world(3);
  on_threads(3, [&](int me) {
    const auto group = world.group(me);
    Calls calls;
    const auto buffer = group->allocate(40000, DType::kFloat32, false, calls.next());
    auto* const g = reinterpret_cast<float*>(buffer->part(me));
    for (size_t i = 0; i < 40000; ++i) g[i] = 2;
    if (me == 1) g[33333] = INFINITY;
    Findings findings{.num_elems = 40000, .norm_is_wanted = true};
    Call call = calls.next();
    call.findings = &findings;
    group->all_reduce({g, 40000, DType::kFloat32}, Op::kSum, call);
    CHECK(findings.has_nonfinite && findings.nonfinite_elem == 33333);
    CHECK(findings.nonfinite_rank == world.global(1) && std::isinf(findings.sum_squares));
    group->barrier(calls.next());
  });
}

// Every rank hears of it, and says who was the odd one.
void a_different_call_is_a_mismatch() {
  for (const int ranks : {2, 3, 4}) {
    const World world(ranks);
    on_threads(ranks, [&](int me) {
      const auto group = world.group(me);
      Calls calls;
      random_collectives<int32_t>(*group, DType::kInt32, 100, 5, 4);
      for (int i = 0; i < 8; ++i) calls.next();
      std::vector<float> data(10);
      const size_t num_elems = me == 1 ? 9 : 10;
      const auto error = error_of<MismatchError>([&] {
        group->all_reduce({data.data(), num_elems, DType::kFloat32}, Op::kSum, calls.next());
      });
      CHECK(error.peers() == std::vector<int>{world.global(1)});
    });
  }
}

void an_absent_rank_is_named() {
  const World world(3);
  std::atomic<int> failed{0};
  on_threads(3, [&](int me) {
    const auto group = world.group(me);
    Calls calls;
    group->barrier(calls.next());
    if (me == 2) {
      while (failed.load() < 2) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      // A late one learns why nobody waits for it.
      CHECK(error_of<TimeoutError>([&] { group->barrier(calls.next()); }).peers() ==
            std::vector<int>{world.global(2)});
      return;
    }
    // The first to give up tells the other.
    CHECK(error_of<TimeoutError>([&] { group->barrier(calls.next(0.2)); }).peers() ==
          std::vector<int>{world.global(2)});
    ++failed;
    while (failed.load() < 2) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  });
}

void an_interrupt_ends_ones_own_wait_and_leaving_that_of_others() {
  for (int round = 0; round < 5; ++round) {
    const World world(3);
    std::atomic<bool> left{false};
    on_threads(3, [&](int me) {
      const auto group = world.group(me);
      Calls calls;
      const auto closed_by_rank_1 = [&](const std::function<void()>& body) {
        CHECK(error_of<PeerError>(body).peers() == std::vector<int>{world.global(1)});
      };
      group->barrier(calls.next());
      if (me == 1) {
        std::thread interrupter([&] { group->interrupt(); });
        closed_by_rank_1([&] { group->barrier(calls.next()); });
        interrupter.join();
        group->leave();
        left = true;
        return;
      }
      if (me == 0)  // Rank 1 waits for it, in vain.
        while (!left) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      group->barrier(calls.next());  // to which rank 1 had come
      closed_by_rank_1([&] { group->barrier(calls.next()); });
    });
  }
}

void a_rank_that_leaves_is_missed_only_when_needed() {
  const World world(3);
  on_threads(3, [&](int me) {
    const auto group = world.group(me);
    Calls calls;
    group->barrier(calls.next());
    if (me == 0) return group->leave();
    CHECK(error_of<PeerError>([&] { group->barrier(calls.next()); }).peers() ==
          std::vector<int>{world.global(0)});
  });
}

// More than the machine has: rank 0 says so, and all hear it.
void memory_that_is_not_there_is_everyones_error() {
  const World world(2);
  on_threads(2, [&](int me) {
    const auto group = world.group(me);
    Calls calls;
    error_of<Error>([&] { group->allocate(size_t{1} << 44, DType::kUInt8, false, calls.next()); });
  });
}

void buffers_outlive_the_group_and_each_other() {
  const World world(2);
  on_threads(2, [&](int me) {
    std::shared_ptr<SymmetricBuffer> kept;
    {
      const auto group = world.group(me);
      Calls calls;
      for (int i = 0; i < 20; ++i) {
        const auto fleeting = group->allocate(1000, DType::kInt32, false, calls.next());
        auto* const data = reinterpret_cast<int32_t*>(fleeting->part(me));
        data[999] = me + 1;
        group->all_reduce({data, 1000, DType::kInt32}, Op::kSum, calls.next());
        CHECK(data[999] == 3);
        kept = i == 10 ? fleeting : std::move(kept);
      }
      group->barrier(calls.next());
    }
    reinterpret_cast<int32_t*>(kept->part(me))[0] = 1;
  });
}

}  // namespace

int main() {
  give_up_after(240);
  collectives_are_exact();
  many_small_collectives();
  updates_are_exact();
  nonfinite_gradients_are_found();
  a_different_call_is_a_mismatch();
  an_absent_rank_is_named();
  an_interrupt_ends_ones_own_wait_and_leaving_that_of_others();
  a_rank_that_leaves_is_missed_only_when_needed();
  memory_that_is_not_there_is_everyones_error();
  buffers_outlive_the_group_and_each_other();
}
