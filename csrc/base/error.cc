#include "base/error.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

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
