#include "memory/host_link.h"

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/error.h"

namespace pyar {
namespace {

constexpr uint32_t kMagic = 0x70796172;  // "pyar"
constexpr size_t kTokenBytes = 64;

struct Hello {
  uint32_t magic;
  int32_t local_rank, local_size;
  int32_t pid;
  uint64_t pid_namespace;
  char token[kTokenBytes];
};
static_assert(std::is_trivially_copyable_v<Hello>);

struct Address {
  sockaddr_un un{};
  socklen_t bytes;
  explicit Address(const std::string& name) {
    if (name.size() + 1 >= sizeof un.sun_path) throw UsageError("socket name too long: " + name);
    un.sun_family = AF_UNIX;
    std::memcpy(un.sun_path + 1, name.data(), name.size());  // leading NUL: the abstract namespace
    bytes = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&un); }
};

Fd open_socket() {
  Fd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket) throw_errno("cannot open a unix socket");
  return socket;
}

Hello hello_of(int local_rank, int local_size, const std::string& token) {
  Hello hello{};
  hello.magic = kMagic;
  hello.local_rank = local_rank;
  hello.local_size = local_size;
  hello.pid = getpid();
  struct stat status;
  if (stat("/proc/self/ns/pid", &status) == 0) hello.pid_namespace = status.st_ino;
  if (token.size() > kTokenBytes) throw UsageError("token longer than 64 bytes");
  std::memcpy(hello.token, token.data(), token.size());
  return hello;
}

// Compares all bytes whatever differs, so that timing tells nothing.
bool same_token(const Hello& a, const Hello& b) {
  unsigned char difference = 0;
  for (size_t i = 0; i < kTokenBytes; ++i)
    difference = static_cast<unsigned char>(difference | (a.token[i] ^ b.token[i]));
  return difference == 0;
}

void poll_for_input(const Fd& socket, double slice_s) {
  pollfd entry{socket.get(), POLLIN, 0};
  poll(&entry, 1, static_cast<int>(slice_s * 1e3) + 1);
}

// Receives a message of exactly `bytes`; `from` is the global rank it should come from.
Received receive_from(const Fd& socket, void* message, size_t bytes, const Deadline& deadline,
                      int from, const char* what) {
  Received received{};
  await(
      deadline, kSleepSoon, [&] { return try_receive_message(socket, message, bytes, received); },
      [&](double slice_s) { poll_for_input(socket, slice_s); },
      [&](bool late) {
        if (late)
          throw TimeoutError("no " + std::string(what) + " from rank " + std::to_string(from) +
                                 " within " + seconds(deadline.timeout_s()),
                             {from});
      });
  if (received.bytes == 0)
    throw PeerError("rank " + std::to_string(from) + " ended or gave up before sending its " +
                        std::string(what) + "; see its log",
                    {from});
  if (received.bytes != bytes)
    throw Error("rank " + std::to_string(from) + " sent a " + std::string(what) +
                " of another size; do the versions of pyallreduce differ?");
  return received;
}

}  // namespace

HostLink::HostLink(int local_rank, std::vector<int> global_ranks, const std::string& name,
                   const std::string& token, const Deadline& deadline)
    : local_rank_(local_rank),
      global_ranks_(std::move(global_ranks)),
      sockets_(global_ranks_.size()),
      pidfds_(global_ranks_.size()) {
  if (local_size() == 1) return;
  if (local_rank_ == 0)
    listen_for_all(name, token, deadline);
  else
    join(name, token, deadline);
}

void HostLink::listen_for_all(const std::string& name, const std::string& token,
                              const Deadline& deadline) {
  const Hello mine = hello_of(0, local_size(), token);
  const Address address(name);
  const Fd listener = open_socket();
  if (bind(listener.get(), address.get(), address.bytes) < 0 ||
      listen(listener.get(), local_size()) < 0)
    throw_errno("cannot listen for the ranks of this host");

  std::vector<Process> processes(global_ranks_.size());
  processes[0] = {mine.pid, mine.pid_namespace};
  for (int missing = local_size() - 1; missing > 0;) {
    Fd accepted;
    await(
        deadline, kSleepSoon,
        [&] {
          accepted = Fd(accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
          return static_cast<bool>(accepted);
        },
        [&](double slice_s) { poll_for_input(listener, slice_s); },
        [&](bool late) {
          if (!late) return;
          std::vector<int> absent;
          for (int l = 1; l < local_size(); ++l)
            if (!sockets_[l]) absent.push_back(global_ranks_[l]);
          throw TimeoutError("not all ranks of this host connected within " +
                                 seconds(deadline.timeout_s()) + "; do all of them call init()?",
                             absent);
        });
    Hello hello{};
    Received received{};
    // A stranger on this address gets one second and is forgotten; a rank says hello at once.
    const Deadline soon(std::min(1.0, deadline.remaining_s()));
    try {
      await(
          soon, kSleepSoon,
          [&] { return try_receive_message(accepted, &hello, sizeof hello, received); },
          [&](double slice_s) { poll_for_input(accepted, slice_s); },
          [&](bool late) {
            if (late) throw Error("no hello");
          });
    } catch (const Error&) {
      continue;
    }
    const bool ours = received.bytes == sizeof hello && hello.magic == kMagic &&
                      same_token(hello, mine) && hello.local_size == local_size() &&
                      hello.local_rank > 0 && hello.local_rank < local_size() &&
                      !sockets_[hello.local_rank];
    if (!ours) continue;
    sockets_[hello.local_rank] = std::move(accepted);
    processes[hello.local_rank] = {hello.pid, static_cast<unsigned long>(hello.pid_namespace)};
    --missing;
  }
  for (int l = 1; l < local_size(); ++l)
    send_message(sockets_[l], processes.data(), processes.size() * sizeof(Process));
  watch(processes);
}

void HostLink::join(const std::string& name, const std::string& token, const Deadline& deadline) {
  const int leader = global_ranks_[0];
  const Hello mine = hello_of(local_rank_, local_size(), token);
  const Address address(name);
  Fd& socket = sockets_[0];
  socket = open_socket();
  await(
      deadline, kSleepSoon,
      [&] { return connect(socket.get(), address.get(), address.bytes) == 0; },
      [](double) { usleep(1000); },
      [&](bool late) {
        if (errno != ECONNREFUSED && errno != EAGAIN) throw_errno("cannot connect to rank 0");
        if (late)
          throw TimeoutError("rank " + std::to_string(leader) +
                                 " of this host did not listen within " +
                                 seconds(deadline.timeout_s()),
                             {leader});
      });
  send_message(socket, &mine, sizeof mine);
  std::vector<Process> processes(global_ranks_.size());
  receive_from(socket, processes.data(), processes.size() * sizeof(Process), deadline, leader,
               "welcome");
  watch(processes);
}

void HostLink::watch(const std::vector<Process>& processes) {
  const auto mine = processes[local_rank_].pid_namespace;
  for (int l = 0; l < local_size(); ++l)
    if (l != local_rank_ && processes[l].pid_namespace == mine)
      pidfds_[l] = Fd(static_cast<int>(syscall(SYS_pidfd_open, processes[l].pid, 0)));
}

void HostLink::give(Segment& segment) {
  const uint64_t bytes = segment.bytes();
  for (int l = 1; l < local_size(); ++l)
    send_message(sockets_[l], &bytes, sizeof bytes, segment.fd());
  segment.close_fd();
}

Segment HostLink::take(size_t bytes, const Deadline& deadline) {
  uint64_t given_bytes = 0;
  Received received = receive_from(sockets_[0], &given_bytes, sizeof given_bytes, deadline,
                                   global_ranks_[0], "shared segment");
  if (!received.attached || given_bytes != bytes)
    throw Error("rank " + std::to_string(global_ranks_[0]) + " handed over a segment of " +
                std::to_string(given_bytes) + " bytes instead of " + std::to_string(bytes) +
                (received.attached ? "" : ", without its descriptor (limit of open files?)"));
  return Segment::map(std::move(received.attached), bytes);
}

std::vector<int> HostLink::dead_ranks() const {
  // A pidfd becomes readable when the process ends. Without one (another pid namespace) the
  // socket's hang-up tells, to rank 0 of all others and to the others of rank 0, who passes the
  // cause on.
  std::vector<pollfd> entries;
  std::vector<int> ranks;
  for (int l = 0; l < local_size(); ++l) {
    if (pidfds_[l])
      entries.push_back({pidfds_[l].get(), POLLIN, 0});
    else if (sockets_[l])
      entries.push_back({sockets_[l].get(), POLLRDHUP, 0});
    else
      continue;
    ranks.push_back(l);
  }
  std::vector<int> dead;
  if (poll(entries.data(), entries.size(), 0) > 0)
    for (size_t i = 0; i < entries.size(); ++i)
      if (entries[i].revents != 0) dead.push_back(ranks[i]);
  return dead;
}

}  // namespace pyar
