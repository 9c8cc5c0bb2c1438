// Bytes between ranks. Knows neither schedules nor what the bytes mean.
#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/wait.h"

namespace pyar {

// Travels ahead of a payload. The transport only compares it: the receiver says which one it
// expects.
struct Header {
  std::array<std::byte, 64> bytes;
  bool operator==(const Header&) const = default;
};

struct Outgoing {
  int peer;
  Header header;
  std::span<const std::byte> payload;  // may be empty: the header travels alone
};

struct Incoming {
  int peer;
  Header header;  // expected; of a refused message the one that came
  std::span<std::byte> payload;
  enum class State { kPending, kTaken, kRefused } state = State::kPending;
};

// Errors name global ranks; every other rank here is an index into global_ranks.
class Transport {
 public:
  Transport(int rank, std::vector<int> global_ranks)
      : rank_(rank), global_ranks_(std::move(global_ranks)) {}
  virtual ~Transport() = default;  // the orderly goodbye: what was sent still arrives
  Transport(const Transport&) = delete;
  Transport& operator=(const Transport&) = delete;

  int rank() const { return rank_; }
  int size() const { return static_cast<int>(global_ranks_.size()); }
  std::span<const int> global_ranks() const { return global_ranks_; }

  // Sends and receives progress together, so ranks that send to each other do not wait for each
  // other. No payload of `incoming` overlaps another of the call. Messages between two ranks arrive
  // in the order in which they were sent. Returns true once all is done: the payloads of `outgoing`
  // may then be overwritten. Returns false as soon as a message with another header than expected,
  // or another payload size, has been refused; nothing but fail() may follow. Throws the first
  // cause once any rank has failed, PeerError, or TimeoutError naming who had not arrived.
  virtual bool exchange(std::span<const Outgoing> outgoing, std::span<Incoming> incoming,
                        const Deadline& deadline, Patience patience) = 0;

  // Ends the communication for all ranks, also those that never exchange a message with this one:
  // there every pending and later exchange throws `cause`. If another cause came first, that one
  // counts. Throws what counts.
  [[noreturn]] virtual void fail(const Error& cause) = 0;

 private:
  int rank_;
  std::vector<int> global_ranks_;
};

}  // namespace pyar
