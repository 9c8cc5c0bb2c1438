// Ranks as processes: collectives through mappings of their own, and deaths.
#include <csignal>

#include "collectives.h"

using namespace pyar;
using namespace pyar::test;

namespace {

void collectives_between_processes() {
  for (const int ranks : {2, 4}) {
    const World world(ranks);
    for (const int status : in_processes(ranks, [&](int me) {
           random_collectives<float>(*world.group(me), DType::kFloat32, 50000, 100, 5);
         }))
      CHECK(ended_well(status));
  }
}

// A rank dies somewhere among small collectives: before, within or after one. Every survivor names
// it.
void a_death_is_named() {
  constexpr int kRanks = 3;
  for (int round = 0; round < 12; ++round) {
    const World world(kRanks);
    const int victim = round % kRanks;
    const auto statuses = in_processes(kRanks, [&](int me) {
      const auto group = world.group(me);
      Calls calls;
      group->barrier(calls.next());
      std::thread killer;
      if (me == victim)
        killer = std::thread([&] {
          usleep(static_cast<useconds_t>(200 * round));
          kill(getpid(), SIGKILL);
        });
      std::vector<float> data(100000, 1.0f);
      const auto error = error_of<PeerError>([&] {
        for (;;)
          group->all_reduce({data.data(), data.size(), DType::kFloat32}, Op::kMax, calls.next());
      });
      CHECK(error.peers() == std::vector<int>{world.global(victim)});
    });
    for (int r = 0; r < kRanks; ++r) {
      const int status = statuses[size_t(r)];
      CHECK(r == victim ? WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL : ended_well(status));
    }
  }
}

// Ranks that die before they have met.
void a_death_during_the_handshake_is_named() {
  const World world(3);
  const auto statuses = in_processes(3, [&](int me) {
    if (me == 0) {  // says nothing, and leaves
      error_of<TimeoutError>([&] { world.link(0, 0.3); });
      return;
    }
    if (me == 1) _exit(7);
    const auto error = error_of<TimeoutError>([&] { world.link(2, 10); });  // rank 0's
    CHECK(error.peers() == std::vector<int>{world.global(1)});
  });
  CHECK(ended_well(statuses[0]) && WEXITSTATUS(statuses[1]) == 7 && ended_well(statuses[2]));
}

}  // namespace

int main() {
  give_up_after(240);
  collectives_between_processes();
  a_death_is_named();
  a_death_during_the_handshake_is_named();
}
