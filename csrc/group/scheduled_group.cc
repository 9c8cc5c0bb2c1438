#include "group/scheduled_group.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "base/error.h"
#include "kernels/kernels.h"
#include "schedules/algorithms.h"
#include "schedules/registry.h"

namespace pyar {
namespace {

// What the Header of a message holds. The chunks tell apart ranks that make the same call by
// different schedules.
struct Envelope {
  Fingerprint call;
  int32_t num_chunks, begin, end, reduce;
};
static_assert(std::is_trivially_copyable_v<Envelope> && sizeof(Envelope) <= sizeof(Header));

Header header_of(const Fingerprint& call, int num_chunks, const Transfer& t) {
  const Envelope envelope{call, num_chunks, t.begin, t.end, t.reduce};
  Header header{};
  std::memcpy(header.bytes.data(), &envelope, sizeof envelope);
  return header;
}

Fingerprint fingerprint_in(const Header& header) {
  Envelope envelope;
  std::memcpy(&envelope, header.bytes.data(), sizeof envelope);
  return envelope.call;
}

// The even split: chunk c of k covers elements [n*c/k, n*(c+1)/k), maybe none.
std::span<std::byte> bytes_of(Span data, int num_chunks, int begin, int end) {
  const auto elem_bytes = size_of(data.dtype);
  const auto offset = [&](int chunk) {
    return data.num_elems * static_cast<size_t>(chunk) / static_cast<size_t>(num_chunks) *
           elem_bytes;
  };
  return {static_cast<std::byte*>(data.data) + offset(begin), offset(end) - offset(begin)};
}

}  // namespace

ScheduledGroup::Plan::Plan(Schedule s)
    : schedule(std::move(s)), last_reducing_step(static_cast<size_t>(schedule.num_chunks), -1) {
  for (size_t i = 0; i < schedule.steps.size(); ++i)
    for (const auto* transfers : {&schedule.steps[i].sends, &schedule.steps[i].recvs})
      for (const Transfer& t : *transfers)
        if (t.reduce)
          std::fill(last_reducing_step.begin() + t.begin, last_reducing_step.begin() + t.end,
                    static_cast<int>(i));
}

ScheduledGroup::ScheduledGroup(std::unique_ptr<Transport> transport, std::string_view schedule)
    : transport_(std::move(transport)),
      all_reduce_(generate(schedule, rank(), size())),
      reduce_scatter_(ring_reduce_scatter(rank(), size())),
      all_gather_(ring_all_gather(rank(), size())) {}

void ScheduledGroup::all_reduce(Span data, Op op, const Call& call) {
  if (size() == 1) return;
  const auto mine = fingerprint(Kind::kAllReduce, data.num_elems, data.dtype,
                                static_cast<uint32_t>(op), kNoRoot, call);
  Span work = data;
  if (accumulator_of(data.dtype) != data.dtype) {
    work = {wide_.at_least(data.num_elems * sizeof(float)), data.num_elems, DType::kFloat32};
    assign(work, data);
  }
  execute(all_reduce_, work, op, mine, call);
  assign(data, work);
}

void ScheduledGroup::reduce_scatter(Span output, ConstSpan input, Op op, const Call& call) {
  if (size() == 1) return assign(output, input);
  const auto mine = fingerprint(Kind::kReduceScatter, output.num_elems, output.dtype,
                                static_cast<uint32_t>(op), kNoRoot, call);
  agree(mine, call);
  const DType accumulator = accumulator_of(input.dtype);
  const Span work{wide_.at_least(input.num_elems * size_of(accumulator)), input.num_elems,
                  accumulator};
  assign(work, input);
  execute(reduce_scatter_, work, op, mine, call);
  assign(output,
         {bytes_of(work, size(), rank(), rank() + 1).data(), output.num_elems, accumulator});
}

void ScheduledGroup::all_gather(Span output, ConstSpan input, const Call& call) {
  if (size() == 1) return assign(output, input);
  const auto mine =
      fingerprint(Kind::kAllGather, input.num_elems, input.dtype, kNoOp, kNoRoot, call);
  agree(mine, call);
  assign({bytes_of(output, size(), rank(), rank() + 1).data(), input.num_elems, input.dtype},
         input);
  execute(all_gather_, output, Op::kSum, mine, call);
}

void ScheduledGroup::broadcast(Span data, int root, const Call& call) {
  if (size() == 1) return;
  const auto mine = fingerprint(Kind::kBroadcast, data.num_elems, data.dtype, kNoOp, root, call);
  agree(mine, call);
  execute(Plan(binomial_tree(rank(), size(), root)), data, Op::kSum, mine, call);
}

void ScheduledGroup::barrier(const Call& call) {
  agree(fingerprint(Kind::kBarrier, 0, DType::kUInt8, kNoOp, kNoRoot, call), call);
}

void ScheduledGroup::fail(const Error& cause) try {
  // What concerns nobody else (no memory, an interrupt) concerns, for the others, this rank.
  std::vector<int> peers = cause.peers();
  if (peers.empty()) peers = {transport_->global_ranks()[static_cast<size_t>(rank())]};
  transport_->fail(Error(cause.what(), std::move(peers), cause.cause()));
} catch (const Error&) {
  // What counts for the others; the caller has its own.
}

void ScheduledGroup::agree(const Fingerprint& mine, const Call& call) {
  execute(all_reduce_, {nullptr, 0, DType::kUInt8}, Op::kSum, mine, call);
}

void ScheduledGroup::execute(const Plan& plan, Span data, Op op, const Fingerprint& mine,
                             const Call& call) try {
  const int num_chunks = plan.schedule.num_chunks;
  const auto chunks = [&](const Transfer& t) { return bytes_of(data, num_chunks, t.begin, t.end); };
  for (size_t i = 0; i < plan.schedule.steps.size(); ++i) {
    const Step& step = plan.schedule.steps[i];
    outgoing_.clear();
    for (const Transfer& t : step.sends)
      outgoing_.push_back({t.peer, header_of(mine, num_chunks, t), chunks(t)});

    size_t inbox_bytes = 0;
    for (const Transfer& t : step.recvs) inbox_bytes += t.reduce ? chunks(t).size() : 0;
    std::byte* inbox = inbox_.at_least(inbox_bytes);
    incoming_.clear();
    for (const Transfer& t : step.recvs) {
      std::span<std::byte> payload = chunks(t);
      if (t.reduce) payload = {std::exchange(inbox, inbox + payload.size()), payload.size()};
      incoming_.push_back({t.peer, header_of(mine, num_chunks, t), payload});
    }

    if (!transport_->exchange(outgoing_, incoming_, call.deadline, call.patience))
      transport_->fail(mismatch(mine));
    combine(plan, static_cast<int>(i), data, op);
  }
} catch (const MismatchError&) {
  throw;  // says it all
} catch (const Error& e) {
  const std::string where = describe(mine), what = e.what();
  if (what.find(where) != what.npos) throw;  // passed on by a rank that has said so
  throw_error(e.cause(), what + ", in " + where, e.peers());
}

// Adds what has arrived to what I hold: contributions to the same chunks in one pass, in rank
// order, mine among them. The average is scaled where a sum becomes the total, so that every rank
// receives the scaled one.
void ScheduledGroup::combine(const Plan& plan, int step_index, Span data, Op op) {
  const auto& recvs = plan.schedule.steps[static_cast<size_t>(step_index)].recvs;
  for (size_t i = 0; i < recvs.size();) {
    const Transfer& first = recvs[i];
    if (!first.reduce) {
      ++i;
      continue;
    }
    const auto chunk = bytes_of(data, plan.schedule.num_chunks, first.begin, first.end);
    contributions_.assign({{rank(), chunk.data()}});
    for (; i < recvs.size() && recvs[i].begin == first.begin && recvs[i].end == first.end; ++i)
      contributions_.emplace_back(recvs[i].peer, incoming_[i].payload.data());
    std::ranges::sort(contributions_);
    sources_.clear();
    for (const auto& [peer, source] : contributions_) sources_.push_back(source);

    const bool is_total = plan.last_reducing_step[static_cast<size_t>(first.begin)] == step_index;
    void* destination = chunk.data();
    reduce(data.dtype, op == Op::kAvg && !is_total ? Op::kSum : op, 1.0 / size(),
           {.sources = sources_.data(),
            .num_sources = sources_.size(),
            .destinations = &destination,
            .num_destinations = 1,
            .num_elems = chunk.size() / size_of(data.dtype)});
  }
}

// Known are my own call, those of peers whose message was taken (the same), and those of peers
// whose was refused.
MismatchError ScheduledGroup::mismatch(const Fingerprint& mine) const {
  std::vector<std::pair<int, Fingerprint>> known{{rank(), mine}};
  for (const Incoming& in : incoming_)
    if (in.state != Incoming::State::kPending)
      known.emplace_back(in.peer, fingerprint_in(in.header));
  std::ranges::sort(known, {}, &std::pair<int, Fingerprint>::first);

  std::vector<Fingerprint> calls;
  std::vector<int> global_ranks;
  int self = 0;
  for (const auto& [peer, call] : known) {
    if (peer == rank()) self = static_cast<int>(calls.size());
    calls.push_back(call);
    global_ranks.push_back(transport_->global_ranks()[static_cast<size_t>(peer)]);
  }
  if (std::ranges::count(calls, mine) == std::ssize(calls)) {
    global_ranks.erase(global_ranks.begin() + self);
    return MismatchError("ranks follow different schedules in " + describe(mine) +
                             ". All ranks must be given the same plan.",
                         global_ranks);
  }
  try {
    throw_mismatch(self, calls, global_ranks);
  } catch (const MismatchError& e) {
    return e;
  }
}

}  // namespace pyar
