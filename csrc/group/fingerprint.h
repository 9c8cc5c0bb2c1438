// What a rank believes it is calling. Travels with every collective, so that ranks that disagree
// get an error, not wrong sums.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

#include "base/dtype.h"
#include "group/group.h"

namespace pyar {

// Values are stored in shared memory and sent on wires: append only.
enum class Kind : uint32_t {
  kAllReduce,
  kReduceScatter,
  kAllGather,
  kBroadcast,
  kBarrier,
  kAllocate,  // symmetric_empty
  kUpdate,    // reduction and SGD step in one pass
  kSplit,     // a group's ranks form smaller groups
};
inline constexpr int kNumKinds = 8;

constexpr const char* name_of(Kind kind) {
  constexpr const char* kNames[] = {"all_reduce", "reduce_scatter",  "all_gather", "broadcast",
                                    "barrier",    "symmetric_empty", "update",     "split"};
  return static_cast<uint32_t>(kind) < kNumKinds ? kNames[static_cast<uint32_t>(kind)] : "?";
}

inline constexpr uint32_t kNoOp = ~uint32_t{0};
inline constexpr int32_t kNoRoot = -1;

// kind, op and dtype are plain numbers because another process wrote them: any value may be found
// there.
struct Fingerprint {
  uint64_t sequence, layout, num_elems;  // layout: 0 when the caller has no opinion
  uint32_t kind, op, dtype;              // op: kNoOp for kinds that reduce nothing
  int32_t root;                          // kNoRoot except for broadcast

  bool operator==(const Fingerprint&) const = default;
};
static_assert(std::is_trivially_copyable_v<Fingerprint> && sizeof(Fingerprint) == 40);

// What `call` is a part of, where it says so.
Fingerprint fingerprint(Kind kind, size_t num_elems, DType dtype, uint32_t op, int root,
                        const Call& call);

// "all_reduce(sum, float32, 1024 elements) of <subject> as call 7"
std::string describe(const Fingerprint& call, std::string_view subject = {});

// Throws the MismatchError of a collective in which not all of `by_rank` are equal. What most ranks
// called counts as right (a tie: what by_rank[0] called); `peers` are those that called something
// else. `self_rank` indexes by_rank; `global_ranks` (as long) holds the names that users know the
// ranks by, `subjects` (as long, or empty) what each rank says its data are.
[[noreturn]] void throw_mismatch(int self_rank, std::span<const Fingerprint> by_rank,
                                 std::span<const int> global_ranks,
                                 std::span<const std::string> subjects = {});

}  // namespace pyar
