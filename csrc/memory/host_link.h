// The ranks of one host, connected as a star of unix sockets around local rank 0: how shared
// segments are handed over, and how a death is noticed. That the hand-over works is the proof that
// the ranks share a host. Ranks may live in different pid, mount and user namespaces, but must
// share a network namespace, to which abstract sockets belong.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <type_traits>
#include <vector>

#include "base/error.h"
#include "base/wait.h"
#include "memory/fd.h"
#include "memory/segment.h"

namespace pyar {

class HostLink {
 public:
  // Collective. `name` is an abstract socket address (nothing in the file system), `token` a secret
  // of this communicator; both equal on all ranks. global_ranks[l] is the rank, for messages, of
  // local rank l. Throws TimeoutError, PeerError, or Error when a socket or descriptor cannot be
  // had; whichever rank fails, local rank 0 tells the others why.
  HostLink(int local_rank, std::vector<int> global_ranks, const std::string& name,
           const std::string& token, const Deadline& deadline);

  int local_rank() const { return local_rank_; }
  int local_size() const { return static_cast<int>(global_ranks_.size()); }
  const std::vector<int>& global_ranks() const { return global_ranks_; }

  // Collective: a segment that local rank 0 creates and all ranks have mapped. If one of them
  // cannot, all of them throw its error.
  Segment share(size_t bytes, const Deadline& deadline);
  // Its halves, for ranks that tell each other of their failures by other means. Local rank 0 gives
  // its segment to all others; the descriptor is closed afterwards.
  void give(Segment& segment, const Deadline& deadline);
  // The others receive it.
  Segment take(size_t bytes, const Deadline& deadline);

  // Local ranks whose process has ended. Costs one poll() without waiting.
  std::vector<int> dead_ranks() const;

 private:
  struct Process {
    int32_t pid;
    uint64_t pid_namespace;  // a pid means something only inside it; 0: unknown
  };
  // A process, and the reading end of a pipe whose writing end only that process holds: it hangs up
  // when the process ends.
  struct Member {
    Process process;
    Fd lifeline;
  };
  // A rank's first word to local rank 0. A stranger lacks the token.
  struct Hello;
  // Every later word, in both directions.
  struct Message;
  struct Parcel;

  static Process this_process();
  static Fd watch(Member member, const Process& mine);

  void admit(const Hello& mine, const std::string& name, std::vector<Member>& members,
             const Deadline& deadline);
  void hear(std::deque<Fd>& visitors, const Hello& mine, std::vector<Member>& members);
  bool has_spoken(Fd& visitor, const Hello& mine, std::vector<Member>& members);
  void introduce(const std::vector<Member>& members, const Deadline& deadline);
  void connect_to_leader(const std::string& name, const Deadline& deadline);
  void be_introduced(std::vector<Member>& members, const Deadline& deadline);

  template <typename Body>
  std::invoke_result_t<Body> telling_others(Body body);
  void send(int to, const Message& message, const Deadline& deadline, int attached = -1);
  void send(int to, const void* message, size_t bytes, const Deadline& deadline, int attached);
  bool try_receive(int from, Parcel& parcel);
  Parcel receive(int from, const char* what, const Deadline& deadline);
  void hear_from_all(const Deadline& deadline);

  int local_rank_;
  std::vector<int> global_ranks_;
  Fd lifeline_;              // the writing end of this process's own
  std::vector<Fd> sockets_;  // by local rank; rank 0 has all others, the others have only rank 0
  std::vector<Fd> watched_;  // by local rank: readable or hung up once its process has ended
};

}  // namespace pyar
