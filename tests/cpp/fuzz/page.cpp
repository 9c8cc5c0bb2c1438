// Two ranks of three write anything at all into the shared pages; the third makes a call. It may
// succeed or throw an error of the family, about ranks that exist; nothing else.
#include "../ranks.h"
#include "fuzz.h"

using namespace pyar;
using namespace pyar::test;

namespace {

// As in SharedMemoryGroup, whose constructor refuses a segment of another size.
constexpr size_t kPageBytes = 4096, kTurnBytes = size_t{512} << 10;
constexpr int kRanks = 3, kVictim = 1;
// More than the limits below which a group takes a shorter way: the symmetric buffer is used where
// it lies, an ordinary tensor goes through the slots in turns.
constexpr size_t kElems = 10000, kPartBytes = 40960;
// How a page begins: the flag's phase; two notices of a fingerprint, a place and a time; their
// subjects; what was found.
constexpr size_t kNoticesAt = 64, kNoticeBytes = 64, kSubjectBytes = 256;
constexpr size_t kFoundAt = kNoticesAt + 2 * (kNoticeBytes + kSubjectBytes);

class Host {
 public:
  Host() {
    std::vector<std::unique_ptr<HostLink>> links(kRanks);
    on_threads(kRanks, [&](int me) {
      links[size_t(me)] = std::make_unique<HostLink>(world_.link(me));
      if (me == kVictim)
        victim_ = std::make_unique<SharedMemoryGroup>(std::move(*links[size_t(me)]), Deadline(30));
      else {
        Segment mine =
            links[size_t(me)]->share(kRanks * (kPageBytes + 2 * kTurnBytes), Deadline(30));
        if (me == 0) control_ = std::move(mine);
      }
    });
    leader_ = std::move(links[0]);
    other_ = std::move(links[2]);
    allocate();
  }

  // Well-behaved pages: everyone has come to this call and to the phases after it.
  void agree(const Fingerprint& call, uint64_t buffer_id, uint64_t offset_bytes) {
    uint32_t phase;
    std::memcpy(&phase, page(kVictim), sizeof phase);
    std::memset(control_.data(), 0, kRanks * kPageBytes);
    std::memcpy(page(kVictim), &phase, sizeof phase);
    phase += 100;
    for (const int r : {0, 2}) {
      std::memcpy(page(r), &phase, sizeof phase);
      const NonFinite nothing;
      std::memcpy(page(r) + kFoundAt, &nothing, sizeof nothing);
      for (const size_t parity : {0, 1}) {
        char* const notice = page(r) + kNoticesAt + parity * kNoticeBytes;
        std::memcpy(notice, &call, sizeof call);
        std::memcpy(notice + sizeof call, &buffer_id, sizeof buffer_id);
        std::memcpy(notice + sizeof call + 8, &offset_bytes, sizeof offset_bytes);
      }
    }
  }

  char* page(int rank) const { return control_.data() + size_t(rank) * kPageBytes; }
  SharedMemoryGroup& victim() { return *victim_; }
  const World& world() const { return world_; }
  char* symmetric() const { return buffer_->part(kVictim); }

 private:
  // A symmetric buffer, with the others' parts played here.
  void allocate() {
    const Call call{.sequence = 2,
                    .layout = 0,
                    .deadline = Deadline(30),
                    .patience = kPatience,
                    .present_patience = kPatience};
    agree(fingerprint(Kind::kAllocate, kElems, DType::kFloat32, kNoOp, kNoRoot, call), 0, 0);
    Segment segment = Segment::create(kRanks * kPartBytes);
    leader_->give(segment, Deadline(30));
    buffer_ = victim_->allocate(kElems, DType::kFloat32, false, call);
  }

  World world_{kRanks};
  Segment control_ = Segment::create(0);
  std::unique_ptr<HostLink> leader_, other_;
  std::unique_ptr<SharedMemoryGroup> victim_;
  std::shared_ptr<SymmetricBuffer> buffer_;
};

Host& host() {
  static auto& only = *new Host;
  return only;
}

void check(const Error& error) {
  const std::vector<int>& peers = error.peers();
  for (const int peer : peers) CHECK(std::ranges::count(host().world().global_ranks(), peer) == 1);
  CHECK(std::ranges::is_sorted(peers) && std::ranges::adjacent_find(peers) == peers.end());
  CHECK(std::strlen(error.what()) < 4096);
  CHECK(error.cause() == Cause::kSystem || error.cause() == Cause::kUsage ||
        error.cause() == Cause::kPeer || error.cause() == Cause::kTimeout ||
        error.cause() == Cause::kMismatch);
}

void check(const Findings& findings, size_t num_elems) {
  if (!findings.has_nonfinite) return;
  CHECK(findings.nonfinite_elem < num_elems);
  CHECK(findings.nonfinite_rank == Findings::kNoRank ||
        std::ranges::count(host().world().global_ranks(), findings.nonfinite_rank) == 1);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t num_bytes) {
  Input input(data, num_bytes);
  Host& host = ::host();
  SharedMemoryGroup& victim = host.victim();
  static std::vector<float> ordinary(kRanks * kElems);
  const bool is_symmetric = input.below(2), is_small = input.below(2);
  const size_t num_elems = is_small ? 5 : kElems;
  auto* const memory = is_symmetric ? reinterpret_cast<float*>(host.symmetric()) : ordinary.data();
  const Span some{memory, num_elems, DType::kFloat32};
  const Span all{ordinary.data(), kRanks * num_elems, DType::kFloat32};

  Findings findings{.num_elems = num_elems, .norm_is_wanted = is_symmetric};
  const Call call{.sequence = 1 + input.below(2),
                  .layout = input.take<uint8_t>(),
                  .deadline = Deadline(0),  // who is not there will not come
                  .patience = {.spins = 0, .yield_s = 0},
                  .present_patience = {.spins = 0, .yield_s = 0},
                  .findings = &findings};
  const auto kind = static_cast<Kind>(input.below(5));
  const auto op = static_cast<Op>(input.below(kNumOps));
  const bool reduces = kind == Kind::kAllReduce || kind == Kind::kReduceScatter;
  const bool has_all = kind == Kind::kReduceScatter || kind == Kind::kAllGather;
  const uint64_t buffer_id = is_symmetric && kind == Kind::kAllReduce && !is_small;
  host.agree(fingerprint(kind,
                         kind == Kind::kBarrier ? 0
                         : has_all              ? all.num_elems
                                                : num_elems,
                         kind == Kind::kBarrier ? DType::kUInt8 : DType::kFloat32,
                         reduces ? static_cast<uint32_t>(op) : kNoOp,
                         kind == Kind::kBroadcast ? host.world().global(0) : kNoRoot, call),
             buffer_id, 0);
  while (!input.empty()) {  // what the others write over it
    const int rank = input.below(2) ? 2 : 0;
    const size_t offset = input.below(kPageBytes);
    const size_t wanted = std::min<size_t>(input.take<uint8_t>(), kPageBytes - offset);
    const auto bytes = input.take_bytes(wanted);
    if (!bytes.empty()) std::memcpy(host.page(rank) + offset, bytes.data(), bytes.size());
  }
  try {
    switch (kind) {
      case Kind::kAllReduce:
        victim.all_reduce(some, op, call);
        check(findings, num_elems);
        break;
      case Kind::kReduceScatter:
        victim.reduce_scatter(some, all, op, call);
        break;
      case Kind::kAllGather:
        victim.all_gather(all, some, call);
        break;
      case Kind::kBroadcast:
        victim.broadcast(some, 0, call);
        break;
      default:
        victim.barrier(call);
    }
  } catch (const Error& error) {
    check(error);
  }
  return 0;
}
