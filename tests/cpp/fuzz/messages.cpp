// A rank sends anything at all where another expects the messages of a schedule.
#include <array>
#include <optional>

#include "../check.h"
#include "fuzz.h"
#include "group/fingerprint.h"
#include "group/scheduled_group.h"
#include "transport/inproc.h"

using namespace pyar;
using namespace pyar::test;

namespace {

constexpr int kRanks = 3;
constexpr std::array kSchedules{"direct", "halving_doubling", "ring"};

// What a message begins with: see Envelope in scheduled_group.cc. One that has drifted from it
// still fuzzes, from further away.
struct Envelope {
  Fingerprint call;
  int32_t num_chunks, begin, end, reduce;
};

void check(const Error& error) {
  CHECK(error.cause() == Cause::kMismatch || error.cause() == Cause::kTimeout ||
        error.cause() == Cause::kPeer);
  const std::vector<int>& peers = error.peers();
  CHECK(!peers.empty() && std::ranges::is_sorted(peers));
  for (const int peer : peers) CHECK(peer >= 0 && peer < kRanks);
  CHECK(std::strlen(error.what()) < 4096);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t num_bytes) {
  Input input(data, num_bytes);
  const auto world = std::make_shared<InprocWorld>(kRanks);
  ScheduledGroup victim(std::make_unique<InprocTransport>(world, 0),
                        kSchedules[input.below(kSchedules.size())]);
  std::optional<InprocTransport> others[kRanks];
  for (int r = 1; r < kRanks; ++r) others[r].emplace(world, r);

  constexpr size_t kElems = 12;
  float values[kElems] = {}, more[kElems * kRanks] = {};
  const Span some{values, kElems, DType::kFloat32}, all{more, kElems * kRanks, DType::kFloat32};
  const Call call{.sequence = 1,
                  .layout = 0,
                  .deadline = Deadline(0),
                  .patience = {.spins = 0, .yield_s = 0},
                  .present_patience = {.spins = 0, .yield_s = 0}};
  const auto kind = static_cast<Kind>(input.below(5));
  while (!input.empty()) {
    Envelope envelope{
        fingerprint(kind, kind == Kind::kBarrier ? 0 : kElems,
                    kind == Kind::kBarrier ? DType::kUInt8 : DType::kFloat32,
                    kind <= Kind::kReduceScatter ? static_cast<uint32_t>(Op::kSum) : kNoOp,
                    kind == Kind::kBroadcast ? 1 : kNoRoot, call),
        kRanks, 0, 0, 1};
    envelope.begin = static_cast<int32_t>(input.below(kRanks));
    envelope.end = envelope.begin + 1;
    envelope.reduce = static_cast<int32_t>(input.below(2));
    Header header{};
    std::memcpy(header.bytes.data(), &envelope, sizeof envelope);
    const size_t offset = input.below(header.bytes.size());
    const auto wild = input.take_bytes(
        std::min<size_t>(input.take<uint8_t>() % 16, header.bytes.size() - offset));
    if (!wild.empty()) std::memcpy(header.bytes.data() + offset, wild.data(), wild.size());
    const std::vector<std::byte> payload(input.below(3) == 0 ? 16 : input.below(80));
    const Outgoing message{0, header, payload};
    others[1 + input.below(kRanks - 1)]->exchange({&message, 1}, {}, call.deadline, call.patience);
  }
  try {
    switch (kind) {
      case Kind::kAllReduce:
        victim.all_reduce(some, Op::kSum, call);
        break;
      case Kind::kReduceScatter:
        victim.reduce_scatter(some, all, Op::kSum, call);
        break;
      case Kind::kAllGather:
        victim.all_gather(all, some, call);
        break;
      case Kind::kBroadcast:
        victim.broadcast(some, 1, call);
        break;
      default:
        victim.barrier(call);
    }
  } catch (const Error& error) {
    check(error);
  }
  return 0;
}
