#include "memory/host_link.h"

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <fcntl.h>
#include <numeric>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

namespace pyar {
namespace {

constexpr uint32_t kMagic = 0x70796172;  // "pyar"
constexpr size_t kTokenBytes = 64;
// Connections, beside those of the ranks, that have not said hello. A rank does so at once; of
// strangers that keep silent the oldest makes room for the next. Fewer: a flood could push out a
// rank between its connect and its hello; more: a flood takes more of the descriptors (1024 by
// default).
constexpr size_t kMaxStrangers = 128;
// Local rank 0 waits until the deadline and then says who is missing: the others wait for its word
// a little longer, within the second by which every call may exceed its timeout.
constexpr double kVerdictGraceS = 0.5;
constexpr const char* kNoDescriptor =
    "a descriptor from a rank of this host could not be received: limit of open files (ulimit -n)?";

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

Fd listen_at(const std::string& name, int backlog) {
  const Address address(name);
  Fd listener = open_socket();
  if (bind(listener.get(), address.get(), address.bytes) < 0 || listen(listener.get(), backlog) < 0)
    throw_errno("cannot listen for the ranks of this host");
  return listener;
}

// False when nobody waits at the door.
bool try_accept(const Fd& listener, Fd& accepted) {
  accepted = Fd(accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (accepted) return true;
  if (errno == EAGAIN || errno == EINTR || errno == ECONNABORTED) return false;
  throw_errno("cannot accept the ranks of this host (limit of open files, ulimit -n?)");
}

struct Pipe {
  Fd reading, writing;
};

Pipe open_pipe() {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) < 0)
    throw_errno("cannot open a pipe (limit of open files, ulimit -n?)");
  return {Fd(ends[0]), Fd(ends[1])};
}

bool has_hung_up(const Fd& lifeline) {
  pollfd entry{lifeline.get(), POLLIN, 0};
  return poll(&entry, 1, 0) != 0;
}

void wait_for_any(std::vector<pollfd> entries, double slice_s) {
  poll(entries.data(), entries.size(), static_cast<int>(slice_s * 1e3) + 1);
}

}  // namespace

struct HostLink::Hello {
  uint32_t magic;
  int32_t local_rank, local_size;
  Process process;
  char token[kTokenBytes];

  // Compares the whole token whatever differs, so that timing tells nothing.
  bool is_of_group(const Hello& leader) const {
    unsigned char difference = 0;
    for (size_t i = 0; i < kTokenBytes; ++i)
      difference = static_cast<unsigned char>(difference | (token[i] ^ leader.token[i]));
    return difference == 0 && magic == kMagic && local_size == leader.local_size;
  }
};

struct HostLink::Message {
  Process process{};         // whose lifeline is attached
  uint64_t bytes = 0;        // of the attached segment
  uint32_t has_problem = 0;  // the sender has failed: nothing else will follow
  ErrorReport problem{};
};

struct HostLink::Parcel {
  Message message;
  Fd attached;
};

HostLink::HostLink(int local_rank, std::vector<int> global_ranks, const std::string& name,
                   const std::string& token, const Deadline& deadline)
    : local_rank_(local_rank),
      global_ranks_(std::move(global_ranks)),
      sockets_(global_ranks_.size()),
      watched_(global_ranks_.size()) {
  if (local_size() == 1) return;
  static_assert(std::is_trivially_copyable_v<Hello> && std::is_trivially_copyable_v<Message>);
  if (token.size() > kTokenBytes) throw UsageError("token longer than 64 bytes");
  Hello mine{kMagic, local_rank_, local_size(), this_process(), {}};
  std::memcpy(mine.token, token.data(), token.size());
  Pipe lifeline = open_pipe();
  lifeline_ = std::move(lifeline.writing);

  std::vector<Member> members(global_ranks_.size());
  members[local_rank_] = {mine.process, std::move(lifeline.reading)};
  telling_others([&] {
    if (local_rank_ == 0) {
      admit(mine, name, members, deadline);
      introduce(members, deadline);
    } else {
      connect_to_leader(name, deadline);
      send(0, &mine, sizeof mine, deadline, members[local_rank_].lifeline.get());
      be_introduced(members, deadline);
    }
  });
  for (int l = 0; l < local_size(); ++l)
    if (l != local_rank_) watched_[l] = watch(std::move(members[l]), mine.process);
}

// ---------------------------------------------------------------------------------------------------------------
// Who is here

HostLink::Process HostLink::this_process() {
  struct stat status;
  const bool known = stat("/proc/self/ns/pid", &status) == 0;
  return {getpid(), known ? status.st_ino : 0};
}

// Local rank 0: until all ranks of the host have connected and said hello.
void HostLink::admit(const Hello& mine, const std::string& name, std::vector<Member>& members,
                     const Deadline& deadline) {
  const Fd listener = listen_at(name, local_size());
  const size_t max_visitors = kMaxStrangers + global_ranks_.size();
  std::deque<Fd> visitors;
  const auto absent = [&] {
    std::vector<int> ranks;
    for (int l = 1; l < local_size(); ++l)
      if (!sockets_[l]) ranks.push_back(global_ranks_[l]);
    return ranks;
  };
  await(
      deadline, kSleepSoon,
      [&] {
        for (Fd accepted; visitors.size() < max_visitors && try_accept(listener, accepted);)
          visitors.push_back(std::move(accepted));
        hear(visitors, mine, members);
        if (visitors.size() == max_visitors) visitors.pop_front();
        return absent().empty();
      },
      [&](double slice_s) {
        std::vector<pollfd> entries{{listener.get(), POLLIN, 0}};
        for (const Fd& visitor : visitors) entries.push_back({visitor.get(), POLLIN, 0});
        wait_for_any(entries, slice_s);
      },
      [&](bool late) {
        // Who was here and has gone, or has failed and says why.
        Parcel parcel;
        for (int l = 1; l < local_size(); ++l)
          if (sockets_[l]) try_receive(l, parcel);
        if (late)
          throw TimeoutError("not all ranks of this host connected within " +
                                 seconds(deadline.timeout_s()) + "; do all of them call init()?",
                             absent());
      });
}

// A rank's hello makes it a member; whoever else has spoken, or gone, is forgotten.
void HostLink::hear(std::deque<Fd>& visitors, const Hello& mine, std::vector<Member>& members) {
  for (auto visitor = visitors.begin(); visitor != visitors.end();)
    visitor = has_spoken(*visitor, mine, members) ? visitors.erase(visitor) : visitor + 1;
}

bool HostLink::has_spoken(Fd& visitor, const Hello& mine, std::vector<Member>& members) {
  Hello hello{};
  Received received{};
  try {
    if (!try_receive_message(visitor, &hello, sizeof hello, received)) return false;
  } catch (const Error&) {
    return true;  // too long for a hello
  }
  const bool is_ours = received.bytes == sizeof hello && hello.is_of_group(mine) &&
                       hello.local_rank > 0 && hello.local_rank < local_size() &&
                       !sockets_[hello.local_rank];
  if (!is_ours) return true;
  if (!received.attached) throw Error(kNoDescriptor);
  sockets_[hello.local_rank] = std::move(visitor);
  members[hello.local_rank] = {hello.process, std::move(received.attached)};
  return true;
}

void HostLink::connect_to_leader(const std::string& name, const Deadline& deadline) {
  const Address address(name);
  Fd& socket = sockets_[0];
  socket = open_socket();
  await(
      deadline, kSleepSoon,
      [&] {
        if (connect(socket.get(), address.get(), address.bytes) == 0) return true;
        // Not listening yet, or a queue at the door.
        if (errno == ECONNREFUSED || errno == EAGAIN) return false;
        throw_errno("cannot connect to rank " + std::to_string(global_ranks_[0]) +
                    " of this host by an abstract unix socket");
      },
      [](double) { usleep(1000); },
      [&](bool late) {
        if (late)
          throw TimeoutError("rank " + std::to_string(global_ranks_[0]) +
                                 " opened no socket on this host within " +
                                 seconds(deadline.timeout_s()) +
                                 ": does it call init(), and do both share a host and a network "
                                 "namespace?",
                             {global_ranks_[0]});
      });
}

// Local rank 0 makes the others known to each other. One message to each in turn, so that they read
// while others are served.
void HostLink::introduce(const std::vector<Member>& members, const Deadline& deadline) {
  for (int member = 0; member < local_size(); ++member)
    for (int to = 1; to < local_size(); ++to)
      if (to != member)
        send(to, {.process = members[member].process}, deadline, members[member].lifeline.get());
}

void HostLink::be_introduced(std::vector<Member>& members, const Deadline& deadline) {
  for (int member = 0; member < local_size(); ++member) {
    if (member == local_rank_) continue;
    Parcel parcel = receive(0, "welcome", deadline.plus(kVerdictGraceS));
    if (!parcel.attached) throw Error(kNoDescriptor);
    members[member] = {parcel.message.process, std::move(parcel.attached)};
  }
}

// What becomes readable, or hangs up, when that process ends. A pidfd if the kernel gives one: it
// cannot be held open by children of that process.
Fd HostLink::watch(Member member, const Process& mine) {
  if (mine.pid_namespace == 0 || mine.pid_namespace != member.process.pid_namespace)
    return std::move(member.lifeline);
  Fd pidfd(static_cast<int>(syscall(SYS_pidfd_open, member.process.pid, 0)));
  // While its lifeline holds, the process lives, and the pid is still its own.
  return pidfd && !has_hung_up(member.lifeline) ? std::move(pidfd) : std::move(member.lifeline);
}

std::vector<int> HostLink::dead_ranks() const {
  std::vector<pollfd> entries;
  for (const Fd& fd : watched_) entries.push_back({fd.get(), POLLIN, 0});  // poll() skips -1: me
  std::vector<int> dead;
  if (poll(entries.data(), entries.size(), 0) > 0)
    for (int l = 0; l < local_size(); ++l)
      if (entries[l].revents != 0) dead.push_back(l);
  return dead;
}

// ---------------------------------------------------------------------------------------------------------------
// Segments

Segment HostLink::share(size_t bytes, const Deadline& deadline) {
  return telling_others([&] {
    const Deadline later = deadline.plus(kVerdictGraceS);
    if (local_rank_ != 0) {
      Segment taken = take(bytes, later);
      send(0, {}, deadline);  // I have mapped it
      receive(0, "word that all ranks have mapped the shared segment", later);
      return taken;
    }
    Segment created = Segment::create(bytes);
    give(created, deadline);
    hear_from_all(deadline);
    for (int l = 1; l < local_size(); ++l) send(l, {}, deadline);
    return created;
  });
}

void HostLink::give(Segment& segment, const Deadline& deadline) {
  for (int l = 1; l < local_size(); ++l)
    send(l, {.bytes = segment.bytes()}, deadline, segment.fd());
  segment.close_fd();
}

Segment HostLink::take(size_t bytes, const Deadline& deadline) {
  Parcel parcel = receive(0, "shared segment", deadline);
  if (!parcel.attached) throw Error(kNoDescriptor);
  if (parcel.message.bytes != bytes)
    throw Error("rank " + std::to_string(global_ranks_[0]) + " handed over a segment of " +
                std::to_string(parcel.message.bytes) + " bytes instead of " +
                std::to_string(bytes));
  return Segment::map(std::move(parcel.attached), bytes);
}

// ---------------------------------------------------------------------------------------------------------------
// Messages

// If `body` fails, those who wait for this rank learn why: all of them from local rank 0, and it
// from the others.
template <typename Body>
std::invoke_result_t<Body> HostLink::telling_others(Body body) {
  try {
    return body();
  } catch (const Error& error) {
    const Message last{.has_problem = 1, .problem = report_of(error, global_ranks_[local_rank_])};
    // As far as it goes: who cannot be told sees the connection end.
    for (const Fd& socket : sockets_)
      if (socket) try_send_message(socket, &last, sizeof last);
    throw;
  }
}

void HostLink::send(int to, const Message& message, const Deadline& deadline, int attached) {
  send(to, &message, sizeof message, deadline, attached);
}

void HostLink::send(int to, const void* message, size_t bytes, const Deadline& deadline,
                    int attached) {
  await(
      deadline, kSleepSoon,
      [&] {
        const Sent sent = try_send_message(sockets_[to], message, bytes, attached);
        Parcel last;
        while (sent == Sent::kClosed) try_receive(to, last);  // throws what that rank said last
        return sent == Sent::kYes;
      },
      [](double) { usleep(1000); },  // not poll(): room may lack for descriptors, not for bytes
      [&](bool late) {
        if (late)
          throw TimeoutError("rank " + std::to_string(global_ranks_[to]) +
                                 " of this host read nothing for " + seconds(deadline.timeout_s()),
                             {global_ranks_[to]});
      });
}

// False when nothing has arrived. Throws PeerError if that rank has gone, and its error if it has
// failed.
bool HostLink::try_receive(int from, Parcel& parcel) {
  const int rank = global_ranks_[from];
  Received received{};
  if (!try_receive_message(sockets_[from], &parcel.message, sizeof parcel.message, received))
    return false;
  if (received.bytes == 0)
    throw PeerError("rank " + std::to_string(rank) +
                        " ended or gave up while the ranks of this host met; see its log",
                    {rank});
  if (received.bytes != sizeof parcel.message)
    throw Error("rank " + std::to_string(rank) +
                " sent a message of another size; do the versions of pyallreduce differ?");
  if (parcel.message.has_problem) throw_reported(parcel.message.problem, global_ranks_, rank);
  parcel.attached = std::move(received.attached);
  return true;
}

HostLink::Parcel HostLink::receive(int from, const char* what, const Deadline& deadline) {
  Parcel parcel;
  await(
      deadline, kSleepSoon, [&] { return try_receive(from, parcel); },
      [&](double slice_s) { wait_for_any({{sockets_[from].get(), POLLIN, 0}}, slice_s); },
      [&](bool late) {
        if (late)
          throw TimeoutError("no " + std::string(what) + " from rank " +
                                 std::to_string(global_ranks_[from]) + " within " +
                                 seconds(deadline.timeout_s()),
                             {global_ranks_[from]});
      });
  return parcel;
}

// Local rank 0: until every other rank has sent a message.
void HostLink::hear_from_all(const Deadline& deadline) {
  std::vector<int> silent(global_ranks_.size() - 1);
  std::iota(silent.begin(), silent.end(), 1);
  Parcel parcel;
  await(
      deadline, kSleepSoon,
      [&] {
        std::erase_if(silent, [&](int l) { return try_receive(l, parcel); });
        return silent.empty();
      },
      [&](double slice_s) {
        std::vector<pollfd> entries;
        for (const int l : silent) entries.push_back({sockets_[l].get(), POLLIN, 0});
        wait_for_any(entries, slice_s);
      },
      [&](bool late) {
        if (!late) return;
        std::vector<int> absent;
        for (const int l : silent) absent.push_back(global_ranks_[l]);
        throw TimeoutError(names_of(absent) + " had not mapped the shared segment within " +
                               seconds(deadline.timeout_s()),
                           absent);
      });
}

}  // namespace pyar
