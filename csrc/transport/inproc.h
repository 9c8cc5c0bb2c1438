// Queues between the threads of one process: the reference that every other transport is compared
// with, and what the tests of schedules run on.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "transport/transport.h"

namespace pyar {

// Shared by the transports of its ranks, each of which is used by one thread at a time.
class InprocWorld {
 public:
  explicit InprocWorld(int size);  // global ranks 0..size-1
  explicit InprocWorld(std::vector<int> global_ranks);
  int size() const { return static_cast<int>(inboxes_.size()); }
  const std::vector<int>& global_ranks() const { return global_ranks_; }

 private:
  friend class InprocTransport;

  struct Message {
    Header header;
    std::vector<std::byte> payload;
  };
  struct Inbox {
    std::vector<std::deque<Message>> from;  // by sender
    std::vector<int> awaited;               // whom the owner waits for; empty outside exchange()
    bool left = false;                      // the owner said goodbye
    // Counts what may end a wait, so that a spinning owner need not take the mutex. It changes
    // under the mutex, and who sees it change takes the mutex before reading anything else: relaxed
    // is enough.
    std::atomic<uint64_t> news{0};
    std::condition_variable changed;
  };

  // The mutex is held by the caller of all of these.
  void notify(Inbox& inbox);
  std::vector<int> missing_for(int rank) const;
  std::vector<int> global_ranks_of(std::vector<int> ranks) const;  // sorted
  [[noreturn]] void fail(const Error& cause);
  [[noreturn]] void throw_failure() const;

  const std::vector<int> global_ranks_;
  std::mutex mutex_;                             // guards the inboxes' contents and failure_
  std::vector<std::unique_ptr<Inbox>> inboxes_;  // by owner
  std::optional<Error> failure_;                 // the first cause
};

class InprocTransport final : public Transport {
 public:
  InprocTransport(std::shared_ptr<InprocWorld> world, int rank);
  ~InprocTransport() override;

  bool exchange(std::span<const Outgoing> outgoing, std::span<Incoming> incoming,
                const Deadline& deadline, Patience patience) override;
  [[noreturn]] void fail(const Error& cause) override;

 private:
  bool take(std::span<Incoming> incoming);
  void watch(const Deadline& deadline, bool late);
  InprocWorld::Inbox& mine() { return *world_->inboxes_[static_cast<size_t>(rank())]; }

  std::shared_ptr<InprocWorld> world_;
};

}  // namespace pyar
