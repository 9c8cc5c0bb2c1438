// Segments, flags, futex waits and messages with descriptors.
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "memory/futex.h"
#include "memory/segment.h"
#include "ranks.h"

using namespace pyar;
using namespace pyar::test;

namespace {

std::pair<Fd, Fd> socket_pair() {
  int ends[2];
  CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
  return {Fd(ends[0]), Fd(ends[1])};
}

// Flags in one segment, mapped by every rank: each phase publishes a plain word that the others
// then read. Without the release and the acquire this is a data race.
void flags_publish_what_was_written_before(int ranks, uint32_t rounds, Patience patience) {
  struct Slot {
    PhaseFlag flag;
    uint64_t payload[2][8];  // by parity of the phase: a neighbour may still read the one before
  };
  const auto slots = static_cast<size_t>(ranks);
  Segment original = Segment::create(slots * sizeof(Slot));
  on_threads(ranks, [&](int me) {
    const Segment mine = Segment::map(Fd(dup(original.fd())), slots * sizeof(Slot));
    auto* const slot = reinterpret_cast<Slot*>(mine.data());
    for (uint32_t phase = 1; phase <= rounds; ++phase) {
      for (uint64_t& word : slot[me].payload[phase % 2]) word = phase * 100 + uint64_t(me);
      slot[me].flag.publish(phase);
      for (int r = 0; r < ranks; ++r) {
        PhaseFlag& theirs = slot[r].flag;
        await(
            Deadline(60), patience, [&] { return theirs.reached(phase); },
            [&](double slice_s) { theirs.sleep_until(phase, slice_s); },
            [&](bool late) { CHECK(!late); });
        for (const uint64_t word : slot[r].payload[phase % 2])
          CHECK(word == phase * 100 + uint64_t(r));
      }
    }
  });
  for (size_t r = 0; r < slots; ++r)  // every sleeper has taken itself off the list
    CHECK(reinterpret_cast<Slot*>(original.data())[r].flag.sleepers.load() == 0);
}

void phases_wrap_around() {
  PhaseFlag flag{};
  flag.publish(0xffffffffu);
  CHECK(flag.reached(0xfffffffeu) && flag.reached(0xffffffffu) && !flag.reached(0));
  flag.publish(0);
  CHECK(flag.reached(0xffffffffu) && flag.reached(0) && !flag.reached(1));
}

// A wait for a whole minute, so that only the wake-up can end it in time.
void a_sleeper_is_woken() {
  for (int round = 0; round < 50; ++round) {
    PhaseFlag flag{};
    std::thread sleeper([&] {
      while (!flag.reached(1)) flag.sleep_until(1, 60.0);
    });
    if (round % 2)  // sometimes it is asleep already, sometimes on its way
      while (flag.sleepers.load() == 0) sched_yield();
    flag.publish(1);
    sleeper.join();
  }
}

void a_futex_wait_ends_by_itself() {
  std::atomic<uint32_t> word{7};
  futex_wait(word, 7, 0.01);  // nobody wakes it
  futex_wait(word, 8, 60.0);  // not what the word holds: returns at once
}

void segments() {
  CHECK(Segment::create(0).data() == nullptr);
  constexpr size_t kBytes = (size_t{1} << 16) + 1;
  Segment mine = Segment::create(kBytes);
  for (size_t i = 0; i < kBytes; i += 4096) CHECK(mine.data()[i] == 0);
  std::strcpy(mine.data() + kBytes - 6, "hello");

  error_of<Error>([&] { Segment::map(Fd(dup(mine.fd())), 1 << 20); });  // it is smaller
  CHECK(ftruncate(mine.fd(), 1) < 0 && errno == EPERM);                 // and stays as it is
  error_of<Error>([] { Segment::create(size_t{1} << 60); });
  error_of<Error>([] { Segment::map(Fd(), 1); });

  const Segment theirs = Segment::map(Fd(dup(mine.fd())), kBytes);
  mine.close_fd();
  CHECK(mine.fd() < 0 && std::strcmp(theirs.data() + kBytes - 6, "hello") == 0);
  Segment moved = std::move(mine);
  CHECK(mine.data() == nullptr && moved.bytes() == kBytes);
}

// As any process could send it: with any number of descriptors.
void send_raw(const Fd& socket, const void* message, size_t bytes, const std::vector<int>& fds) {
  std::vector<char> control(fds.empty() ? 0 : CMSG_SPACE(fds.size() * sizeof(int)));
  iovec part{const_cast<void*>(message), bytes};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = control.data();
  header.msg_controllen = control.size();
  if (!fds.empty()) {
    cmsghdr* const rights = CMSG_FIRSTHDR(&header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
    std::memcpy(CMSG_DATA(rights), fds.data(), fds.size() * sizeof(int));
  }
  CHECK(sendmsg(socket.get(), &header, MSG_NOSIGNAL) == static_cast<ssize_t>(bytes));
}

void messages_carry_descriptors() {
  auto [left, right] = socket_pair();
  const int word = 42;
  int answer = 0;
  Received received{};
  CHECK(!try_receive_message(right, &answer, sizeof answer, received));
  send_raw(left, &word, sizeof word, {left.get()});
  send_raw(left, &word, sizeof word, {});
  CHECK(try_receive_message(right, &answer, sizeof answer, received));
  CHECK(answer == 42 && received.bytes == sizeof answer && received.attached);
  CHECK(try_receive_message(right, &answer, sizeof answer, received) && !received.attached);
  const char too_long[16] = {};
  send_raw(left, too_long, sizeof too_long, {left.get()});
  error_of<Error>(
      [&, &from = right] { try_receive_message(from, &answer, sizeof answer, received); });
  received = {};
  left = Fd();
  CHECK(try_receive_message(right, &answer, sizeof answer, received) && received.bytes == 0);
}

// More descriptors than a message may carry: whether it is refused or not, none stays open.
void surplus_descriptors_are_closed() {
  for (size_t count = 2; count <= 5; ++count) {
    const auto [left, right] = socket_pair();
    int word = 1;
    send_raw(left, &word, sizeof word, std::vector<int>(count, left.get()));
    Received received{};
    try {
      CHECK(try_receive_message(right, &word, sizeof word, received));
    } catch (const Error&) {
    }
  }
}

}  // namespace

int main() {
  give_up_after(120);
  for (const int ranks : {2, 3, 5}) {
    flags_publish_what_was_written_before(ranks, 2000, kYieldFirst);
    flags_publish_what_was_written_before(ranks, 300, kSleepSoon);
  }
  phases_wrap_around();
  a_sleeper_is_woken();
  a_futex_wait_ends_by_itself();
  std::vector<void (*)()> tests{segments, messages_carry_descriptors};
  // Under qemu-user they stay open, which they do not on the machine itself.
  if (!std::getenv("EMULATED"))
    tests.push_back(surplus_descriptors_are_closed);
  else
    std::puts("SKIPPED under emulation: surplus descriptors");
  for (const auto test : tests) {
    const long before = num_descriptors();
    test();
    CHECK(num_descriptors() == before);
  }
}
