// The one family of errors. A message says who, what, where and what to do; `peers` holds global
// ranks, sorted.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace pyar {

// Values are stored in shared memory and sent on wires: append only.
enum class Cause : int { kSystem = 0, kUsage = 1, kPeer = 2, kTimeout = 3, kMismatch = 4 };

// Root, and itself the type of failures of the operating system (no memory, no descriptors).
class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& message, std::vector<int> peers = {},
                 Cause cause = Cause::kSystem)
      : std::runtime_error(message), peers_(std::move(peers)), cause_(cause) {}
  const std::vector<int>& peers() const { return peers_; }
  Cause cause() const { return cause_; }

 private:
  std::vector<int> peers_;
  Cause cause_;
};

// The caller's mistake, found before anything was sent; the communicator stays usable.
struct UsageError : Error {
  explicit UsageError(const std::string& message) : Error(message, {}, Cause::kUsage) {}
};
// `peers` died: process exit, connection reset, communicator closed.
struct PeerError : Error {
  PeerError(const std::string& message, std::vector<int> peers)
      : Error(message, std::move(peers), Cause::kPeer) {}
};
// `peers` had not arrived by the deadline.
struct TimeoutError : Error {
  TimeoutError(const std::string& message, std::vector<int> peers)
      : Error(message, std::move(peers), Cause::kTimeout) {}
};
// `peers` called something else than the majority.
struct MismatchError : Error {
  MismatchError(const std::string& message, std::vector<int> peers)
      : Error(message, std::move(peers), Cause::kMismatch) {}
};

// Throws the member of the family that `cause` names: errors that another rank reported.
[[noreturn]] void throw_error(Cause cause, const std::string& message, std::vector<int> peers);

// An error as plain bytes: how one rank tells it to the others, through shared memory or a socket.
struct ErrorReport {
  static constexpr uint32_t kMaxPeers = 64;
  int32_t cause;
  uint32_t num_peers;
  int32_t peers[kMaxPeers];
  char message[1024];
};
// `reporter`: the global rank that has met the error. What concerns nobody else (no memory, an
// interrupt) concerns, for the others, the reporter.
ErrorReport report_of(const Error& error, int reporter);
// The reader's half. The report was written by another process: copied first, since it may still
// change, and bounded before use; who is not among `ranks` is nobody's peer.
[[noreturn]] void throw_reported(ErrorReport report, const std::vector<int>& ranks, int reporter);

// "rank 3", "ranks 0, 2": how messages name ranks. Many are cut short, `peers` of an error holds
// all of them.
std::string names_of(const std::vector<int>& ranks);
// "60 s"
std::string seconds(double value);
// Throws Error("<what>: <strerror(errno)>").
[[noreturn]] void throw_errno(const std::string& what);

}  // namespace pyar
