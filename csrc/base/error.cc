#include "base/error.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <set>
#include <string_view>

namespace pyar {

void throw_error(Cause cause, const std::string& message, std::vector<int> peers) {
  switch (cause) {
    case Cause::kUsage:
      throw UsageError(message);
    case Cause::kPeer:
      throw PeerError(message, std::move(peers));
    case Cause::kTimeout:
      throw TimeoutError(message, std::move(peers));
    case Cause::kMismatch:
      throw MismatchError(message, std::move(peers));
    case Cause::kSystem:
      break;
  }
  throw Error(message, std::move(peers));
}

ErrorReport report_of(const Error& error, int reporter) {
  std::vector<int> peers = error.peers();
  if (peers.empty()) peers = {reporter};
  ErrorReport report{};
  report.cause = static_cast<int32_t>(error.cause());
  report.num_peers = static_cast<uint32_t>(std::min<size_t>(peers.size(), ErrorReport::kMaxPeers));
  std::copy_n(peers.begin(), report.num_peers, report.peers);
  std::strncpy(report.message, error.what(), sizeof report.message - 1);
  return report;
}

void throw_reported(const ErrorReport report, const std::vector<int>& ranks, int reporter) {
  std::set<int> peers;
  for (uint32_t i = 0; i < std::min(report.num_peers, ErrorReport::kMaxPeers); ++i)
    if (std::ranges::find(ranks, report.peers[i]) != ranks.end()) peers.insert(report.peers[i]);
  std::string message(report.message, strnlen(report.message, sizeof report.message));
  constexpr std::string_view kReported = " (reported by rank ";
  if (message.find(kReported) == std::string::npos)  // who met it, not who passed it on
    message.append(kReported).append(std::to_string(reporter)).append(")");
  throw_error(static_cast<Cause>(report.cause), message, {peers.begin(), peers.end()});
}

std::string names_of(const std::vector<int>& ranks) {
  constexpr size_t kMaxNamed = 8;  // a line of text still; `peers` of the error holds all of them
  std::string text = ranks.size() == 1 ? "rank" : "ranks";
  for (size_t i = 0; i < std::min(ranks.size(), kMaxNamed); ++i) {
    text += i == 0 ? " " : ", ";
    text += std::to_string(ranks[i]);
  }
  if (ranks.size() > kMaxNamed) text.append(" and more");
  return text;
}

std::string seconds(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g s", value);
  return text;
}

void throw_errno(const std::string& what) { throw Error(what + ": " + std::strerror(errno)); }

}  // namespace pyar
