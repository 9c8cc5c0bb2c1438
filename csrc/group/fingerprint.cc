#include "group/fingerprint.h"

#include <algorithm>
#include <cstdio>
#include <vector>

#include "base/error.h"

namespace pyar {
namespace {

// A call, and the ranks (global, ascending) that made it.
struct Camp {
  Fingerprint call;
  std::string subject;
  std::vector<int> ranks;
};

std::vector<Camp> camps_of(std::span<const Fingerprint> by_rank, std::span<const int> global_ranks,
                           std::span<const std::string> subjects) {
  std::vector<Camp> camps;
  for (size_t r = 0; r < by_rank.size(); ++r) {
    auto camp = std::ranges::find(camps, by_rank[r], &Camp::call);
    if (camp == camps.end())
      camp = camps.insert(camp, {by_rank[r], subjects.empty() ? std::string() : subjects[r], {}});
    camp->ranks.push_back(global_ranks[r]);
  }
  for (Camp& camp : camps) std::ranges::sort(camp.ranks);
  return camps;
}

}  // namespace

Fingerprint fingerprint(Kind kind, size_t num_elems, DType dtype, uint32_t op, int root,
                        const Call& call) {
  if (call.part_of) return *call.part_of;
  return {.sequence = call.sequence,
          .layout = call.layout,
          .num_elems = num_elems,
          .kind = static_cast<uint32_t>(kind),
          .op = op,
          .dtype = static_cast<uint32_t>(dtype),
          .root = root};
}

std::string describe(const Fingerprint& call, std::string_view subject) {
  const auto kind = static_cast<Kind>(call.kind);
  std::string text = std::string(name_of(kind)) + "(";
  if (kind != Kind::kBarrier) {
    if (call.op != kNoOp) text += std::string(name_of(static_cast<Op>(call.op))) + ", ";
    text += std::string(name_of(static_cast<DType>(call.dtype))) + ", " +
            std::to_string(call.num_elems) + (call.num_elems == 1 ? " element" : " elements");
    if (call.root != kNoRoot) text += ", root " + std::to_string(call.root);
    if (call.layout != 0) {
      char hex[32];
      std::snprintf(hex, sizeof hex, ", layout %llx", static_cast<unsigned long long>(call.layout));
      text += hex;
    }
  }
  text += ")";
  if (!subject.empty()) text.append(" of ").append(subject);
  return text + " as call " + std::to_string(call.sequence);
}

void throw_mismatch(int self_rank, std::span<const Fingerprint> by_rank,
                    std::span<const int> global_ranks, std::span<const std::string> subjects) {
  // camps[0] holds by_rank[0].
  const std::vector<Camp> camps = camps_of(by_rank, global_ranks, subjects);
  const auto size_of_camp = [](const Camp& camp) { return camp.ranks.size(); };
  const size_t most = size_of_camp(*std::ranges::max_element(camps, {}, size_of_camp));
  const bool tie = std::ranges::count(camps, most, size_of_camp) > 1;
  const Camp& right = tie ? camps.front() : *std::ranges::find(camps, most, size_of_camp);

  std::string calls;
  std::vector<int> peers;
  for (const Camp& camp : camps) {
    if (&camp == &right) continue;
    calls += names_of(camp.ranks) + " called " + describe(camp.call, camp.subject) + ", ";
    peers.insert(peers.end(), camp.ranks.begin(), camp.ranks.end());
  }
  std::ranges::sort(peers);
  throw MismatchError("ranks disagree about a collective: " + calls + "but " +
                          names_of(right.ranks) + " called " + describe(right.call, right.subject) +
                          " (seen by rank " +
                          std::to_string(global_ranks[static_cast<size_t>(self_rank)]) +
                          "). All ranks must make the same calls in the same order.",
                      peers);
}

}  // namespace pyar
