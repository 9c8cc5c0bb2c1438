// The ranks of one host, connected as a star of unix sockets around local rank 0: how shared
// segments are handed over, and how a death is noticed. That the hand-over works is the proof that
// the ranks share a host.
#pragma once

#include <string>
#include <vector>

#include "base/wait.h"
#include "memory/fd.h"
#include "memory/segment.h"

namespace pyar {

class HostLink {
 public:
  // Collective. `name` is an abstract socket address (nothing in the file system), `token` a secret
  // of this communicator; both equal on all ranks. global_ranks[l] is the rank, for messages, of
  // local rank l. Throws TimeoutError, PeerError, or Error when a socket or descriptor cannot be
  // had.
  HostLink(int local_rank, std::vector<int> global_ranks, const std::string& name,
           const std::string& token, const Deadline& deadline);

  int local_rank() const { return local_rank_; }
  int local_size() const { return static_cast<int>(global_ranks_.size()); }
  const std::vector<int>& global_ranks() const { return global_ranks_; }

  // Local rank 0 gives its segment to all others; the descriptor is closed afterwards.
  void give(Segment& segment);
  // The others receive it.
  Segment take(size_t bytes, const Deadline& deadline);

  // Local ranks whose process has ended. Costs one poll() without waiting.
  std::vector<int> dead_ranks() const;

 private:
  struct Process {
    int pid;
    unsigned long pid_namespace;  // a pid means something only inside it
  };
  void listen_for_all(const std::string& name, const std::string& token, const Deadline& deadline);
  void join(const std::string& name, const std::string& token, const Deadline& deadline);
  void watch(const std::vector<Process>& processes);

  int local_rank_;
  std::vector<int> global_ranks_;
  std::vector<Fd> sockets_;  // by local rank; rank 0 has all others, the others have only rank 0
  std::vector<Fd> pidfds_;   // by local rank; empty where the kernel gives none
};

}  // namespace pyar
