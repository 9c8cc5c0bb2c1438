// What ranks tell each other on their hosts about collectives of their devices. NCCL notices
// neither a dead or silent peer nor that ranks call different things: it waits, or gives wrong
// sums.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "group/fingerprint.h"
#include "group/group.h"

namespace pyar {

// How far the device of a rank is: how many flights of this group it has begun, and ended.
struct Progress {
  uint64_t begun, ended;
};

class Control {
 public:
  virtual ~Control() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // By rank: the names that users know them by.
  virtual const std::vector<int>& global_ranks() const = 0;

  // Collective: returns once all ranks have announced the same call. Throws as Group's methods do.
  virtual void agree(const Fingerprint& mine, const Call& call) = 0;
  // Collective, of host memory; itself announces the call.
  virtual void broadcast(Span data, int root, const Call& call) = 0;

  // The following are for any thread, also while another one is inside agree().

  virtual void tell(Progress mine) = 0;
  virtual Progress progress_of(int rank) const = 0;
  // Throws if another rank has reported an error, or has died or closed before its device ended
  // flight `number`; `during` is for messages.
  virtual void check_peers(uint64_t number, std::string_view during) const = 0;
  // The other ranks get this error, too. The first counts.
  virtual void report(const Error& error) = 0;
  // Waits of this rank, in progress and to come, end with an Error.
  virtual void interrupt() = 0;
  virtual bool is_interrupted() const = 0;
  // Tells the others that this rank will not come again.
  virtual void leave() = 0;
};

}  // namespace pyar
