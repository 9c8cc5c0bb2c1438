#include "base/error.h"

#include <cerrno>
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

void throw_errno(const std::string& what) { throw Error(what + ": " + std::strerror(errno)); }

}  // namespace pyar
