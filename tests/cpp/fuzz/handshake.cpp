// Two ranks meet, and somebody between them changes what they say: bytes, lengths, descriptors, the
// order, the end. Strangers knock before. Each rank gets a working group or an error of the family,
// in time, and no descriptor stays open. Knows nothing of the messages' format: they are genuine,
// and changed on their way.
#include <chrono>
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "../ranks.h"
#include "base/clock.h"
#include "fuzz.h"

using namespace pyar;
using namespace pyar::test;

namespace {

// Short, since many handshakes end by it; a slow machine only sees more of them end so.
constexpr double kTimeoutS = 0.05;
constexpr size_t kMaxMessage = 4096, kMaxDescriptors = 4;

struct Address {
  sockaddr_un un{};
  socklen_t bytes;
  explicit Address(const std::string& name) {
    un.sun_family = AF_UNIX;
    std::memcpy(un.sun_path + 1, name.data(), name.size());
    bytes = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&un); }
};

Fd open_socket() {
  Fd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  CHECK(socket);
  return socket;
}

struct Message {
  std::vector<uint8_t> bytes;
  std::vector<Fd> fds;
};

void send(const Fd& to, const Message& message) {
  std::vector<int> fds;
  for (const Fd& fd : message.fds) fds.push_back(fd.get());
  std::vector<char> control(fds.empty() ? 0 : CMSG_SPACE(fds.size() * sizeof(int)));
  iovec part{const_cast<uint8_t*>(message.bytes.data()), message.bytes.size()};
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
  sendmsg(to.get(), &header, MSG_NOSIGNAL | MSG_DONTWAIT);  // if nobody listens, that is an outcome
}

// False at the end of the connection.
bool receive(const Fd& from, Message& message) {
  message.bytes.resize(kMaxMessage);
  alignas(cmsghdr) char control[CMSG_SPACE(kMaxDescriptors * sizeof(int))];
  iovec part{message.bytes.data(), message.bytes.size()};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = control;
  header.msg_controllen = sizeof control;
  const ssize_t got = recvmsg(from.get(), &header, MSG_CMSG_CLOEXEC);
  if (got <= 0) return false;
  message.bytes.resize(static_cast<size_t>(got));
  const cmsghdr* const rights = CMSG_FIRSTHDR(&header);
  if (rights && rights->cmsg_type == SCM_RIGHTS)
    for (size_t i = 0; i < (rights->cmsg_len - CMSG_LEN(0)) / sizeof(int); ++i) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(rights) + i * sizeof fd, sizeof fd);
      message.fds.emplace_back(fd);
    }
  return true;
}

Fd some_descriptor(Input& input) {
  switch (input.below(4)) {
    case 0:
      return Fd(open("/dev/null", O_RDWR | O_CLOEXEC));
    case 1:
      return Fd(open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC));
    case 2:
      return open_socket();
    default: {
      Fd memory(memfd_create("fuzz", MFD_CLOEXEC));
      CHECK(ftruncate(memory.get(), static_cast<off_t>(input.below(1 << 16)) << 6) == 0);
      return memory;
    }
  }
}

// The man in the middle.
class Middleman {
 public:
  Middleman(Input& input, const std::string& leaders, const std::string& members)
      : input_(input), leaders_(leaders), listener_(open_socket()) {
    const Address mine(members);
    CHECK(bind(listener_.get(), mine.get(), mine.bytes) == 0 && listen(listener_.get(), 8) == 0);
  }

  // Ends when one of the two has ended the connection, or nothing has come for a while.
  void play() {
    for (size_t strangers = input_.below(3); strangers > 0; --strangers) {
      Message message;
      const auto bytes = input_.take_bytes(input_.below(120));
      message.bytes.assign(bytes.begin(), bytes.end());
      if (input_.below(3) == 0) message.fds.push_back(some_descriptor(input_));
      const Fd stranger = connect_to_leader();
      if (input_.below(4)) send(stranger, message);
    }
    if (!has_input(listener_)) return;
    const Fd member(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    const Fd leader = connect_to_leader();
    bool open = true;
    while (open) {
      pollfd entries[] = {{member.get(), POLLIN, 0}, {leader.get(), POLLIN, 0}};
      if (poll(entries, 2, kPatienceMs) <= 0) return;
      if (entries[0].revents) open = pass(member, leader);
      if (open && entries[1].revents) open = pass(leader, member);
    }
  }

 private:
  static constexpr int kPatienceMs = 1000;

  static bool has_input(const Fd& socket) {
    pollfd entry{socket.get(), POLLIN, 0};
    return poll(&entry, 1, kPatienceMs) > 0;
  }

  Fd connect_to_leader() {
    const Address address(leaders_);
    Fd socket = open_socket();
    for (const Deadline deadline(kTimeoutS); !deadline.passed(); sched_yield())
      if (connect(socket.get(), address.get(), address.bytes) == 0) break;
    return socket;
  }

  bool pass(const Fd& from, const Fd& to) {
    Message message;
    if (!receive(from, message)) return false;
    switch (input_.below(8)) {  // 0 and what is missing: as it is
      case 1: {                 // other bytes
        for (size_t changes = 1 + input_.below(4); changes > 0; --changes) {
          const size_t at = input_.below(message.bytes.size());
          const auto bytes = input_.take_bytes(
              std::min<size_t>(input_.take<uint8_t>() % 9, message.bytes.size() - at));
          std::copy(bytes.begin(), bytes.end(), message.bytes.begin() + ptrdiff_t(at));
        }
        break;
      }
      case 2:  // shorter or longer
        message.bytes.resize(1 + input_.below(kMaxMessage));
        break;
      case 3:
        message.fds.clear();
        break;
      case 4:
        message.fds.clear();
        [[fallthrough]];
      case 5:
        for (size_t more = 1 + input_.below(3); more > 0; --more)
          message.fds.push_back(some_descriptor(input_));
        break;
      case 6:
        return false;
      case 7:
        send(to, message);  // twice
        break;
      default:
        break;
    }
    send(to, message);
    return true;
  }

  Input& input_;
  std::string leaders_;
  Fd listener_;
};

void meet(int local_rank, const std::string& name) {
  const double start_s = now_s();
  try {
    const Deadline deadline(kTimeoutS);
    SharedMemoryGroup group(HostLink(local_rank, {10, 13}, name, World::token(), deadline),
                            deadline);
    Calls calls;
    group.barrier(calls.next(0.05));
  } catch (const Error& error) {
    for (const int peer : error.peers()) CHECK(peer == 10 || peer == 13);
    CHECK(std::ranges::is_sorted(error.peers()));
  }
  CHECK(now_s() - start_s < kTimeoutS + 1);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t num_bytes) {
  Input input(data, num_bytes);
  const World name_only(2);
  const std::string leaders = name_only.name(), members = leaders + "-middle";
  const long before = num_descriptors();
  {
    Middleman middleman(input, leaders, members);
    std::thread leader([&] { meet(0, leaders); });
    std::thread member([&] { meet(1, members); });
    middleman.play();
    leader.join();
    member.join();
  }
  CHECK(num_descriptors() == before);
  return 0;
}
