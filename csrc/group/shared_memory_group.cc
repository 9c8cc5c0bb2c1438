#include "group/shared_memory_group.h"

#include <algorithm>
#include <cstring>

#include "kernels/kernels.h"

namespace pyar {
namespace {

// Staging per rank and turn. Smaller: more barriers per byte; larger: falls out of the second-level
// cache.
constexpr size_t kTurnBytes = size_t{512} << 10;
// Up to here every rank reduces everything by itself: one barrier instead of two or three, for size
// times the reads.
constexpr size_t kOnePhaseBytes = size_t{16} << 10;
static_assert(kOnePhaseBytes <= kTurnBytes);

struct Range {
  size_t begin, end;
  size_t count() const { return end - begin; }
};

// The shard of `rank`: whole cache lines, so that no line is written by two ranks.
Range shard_of(size_t num_elems, int rank, int size, size_t elem_bytes) {
  const size_t line_elems = kCacheLine / elem_bytes, lines = num_elems / line_elems;
  const auto r = static_cast<size_t>(rank), n = static_cast<size_t>(size);
  return {lines * r / n * line_elems,
          rank == size - 1 ? num_elems : lines * (r + 1) / n * line_elems};
}

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

uint64_t hash_bytes(const void* data, size_t bytes, uint64_t seed) {  // FNV-1a
  uint64_t hash = seed ^ 0xcbf29ce484222325u;
  for (size_t i = 0; i < bytes; ++i)
    hash = (hash ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001b3u;
  return hash;
}

// The scalars as numbers without padding, so that they can be hashed.
uint64_t hash_scalars(std::span<const UpdatePiece> pieces, uint64_t hash) {
  for (const UpdatePiece& piece : pieces) {
    const SgdScalars& s = piece.scalars;
    const double values[] = {s.decay, s.history, s.gain, s.momentum, s.rate, double(s.nesterov)};
    hash = hash_bytes(values, sizeof values, hash);
  }
  return hash;
}

double scale_of(Op op, int size) { return op == Op::kAvg ? 1.0 / size : 1.0; }

}  // namespace

SharedMemoryGroup::SharedMemoryGroup(HostLink link, const Deadline& deadline)
    : link_(std::move(link)), control_([&] {
        static_assert(sizeof(Page) % 4096 == 0);
        const size_t ranks = static_cast<size_t>(link_.local_size());
        const size_t bytes = ranks * (sizeof(Page) + 2 * kTurnBytes);
        if (link_.local_rank() != 0) return link_.take(bytes, deadline);
        Segment control = Segment::create(bytes);  // zeroed: a valid state of every page
        link_.give(control);
        return control;
      }()) {}

char* SharedMemoryGroup::slot(int rank, unsigned turn) const {
  const size_t index = 2 * static_cast<size_t>(rank) + turn % 2;
  return control_.data() + static_cast<size_t>(size()) * sizeof(Page) + index * kTurnBytes;
}

// ---------------------------------------------------------------------------------------------------------------
// Agreement and waiting

bool SharedMemoryGroup::arrive(const Fingerprint& mine, const Location& where, const Call& call) {
  current_ = mine;
  const size_t parity = mine.sequence % 2;
  const uint64_t buffer_id = where.buffer ? where.buffer->id : 0;
  page(rank()).notices[parity] = {mine, buffer_id, where.offset_bytes, now_s()};
  next_phase(call);

  bool agreed = true, same_place = buffer_id != 0;
  for (int r = 0; r < size(); ++r) {
    const Notice& notice = page(r).notices[parity];
    agreed &= notice.fingerprint == mine;
    same_place &= notice.buffer_id == buffer_id && notice.offset_bytes == where.offset_bytes;
    if (call.arrivals_s) call.arrivals_s[r] = notice.arrived_s;
  }
  if (agreed) return same_place;
  std::vector<Fingerprint> by_rank;
  for (int r = 0; r < size(); ++r) by_rank.push_back(page(r).notices[parity].fingerprint);
  throw_mismatch(rank(), by_rank, link_.global_ranks());
}

void SharedMemoryGroup::next_phase(const Call& call) {
  const uint32_t phase = ++phase_;
  page(rank()).flag.publish(phase);
  bool failed = false;
  for (int r = 0; r < size(); ++r) {
    PhaseFlag& flag = page(r).flag;
    await(
        call.deadline, call.patience, [&] { return flag.reached(phase); },
        [&](double slice_s) { flag.sleep_until(phase, slice_s); },
        [&](bool late) { watch(phase, late, call); });
    failed |= flag.failed.load(std::memory_order_relaxed) != 0;
  }
  // All have come, but some have given up since, on this late rank for example.
  if (failed) watch(phase, /*late=*/false, call);
}

void SharedMemoryGroup::watch(uint32_t phase, bool late, const Call& call) {
  const std::string where = describe(current_);
  // The dead first: what a rank reported before it died is then certain to be seen, and is the
  // better cause.
  std::vector<int> dead, gone, absent;
  for (const int r : link_.dead_ranks())
    if (!page(r).flag.reached(phase)) dead.push_back(link_.global_ranks()[r]);
  for (int r = 0; r < size(); ++r) {
    const Report& report = page(r).report;
    if (r != rank() && page(r).flag.failed.load(std::memory_order_acquire)) {
      // Written by another process: bounded before use.
      const uint32_t count = std::min(report.num_peers, Report::kMaxPeers);
      const std::string message(report.message, strnlen(report.message, sizeof report.message));
      throw_error(static_cast<Cause>(report.cause),
                  message + " (reported by rank " + std::to_string(link_.global_ranks()[r]) + ")",
                  std::vector<int>(report.peers, report.peers + count));
    }
    const bool has_left = page(r).has_left.load(std::memory_order_acquire) != 0;
    if (page(r).flag.reached(phase)) continue;
    absent.push_back(link_.global_ranks()[r]);
    if (has_left) gone.push_back(link_.global_ranks()[r]);
  }
  if (!gone.empty())
    throw PeerError(names_of(gone) + " closed the communicator before " + where, gone);
  if (!dead.empty())
    throw PeerError(names_of(dead) + " died: the process ended during " + where +
                        "; see its log for the reason",
                    dead);
  if (interrupted_.load(std::memory_order_relaxed))
    throw Error("the communicator was closed during " + where);
  if (call.on_slice) (*call.on_slice)();
  if (late && !absent.empty())
    throw TimeoutError(names_of(absent) + " had not arrived at " + where + " after " +
                           seconds(call.deadline.timeout_s()) +
                           ": stopped, slow, or somewhere else in the program; a longer "
                           "timeout_s can be given to init()",
                       absent);
}

template <typename Body>
void SharedMemoryGroup::guarded(Body body) {
  try {
    body();
  } catch (const Error& error) {
    report(error);
    throw;
  } catch (const std::exception& error) {
    report(Error(error.what()));
    throw;
  }
}

void SharedMemoryGroup::report(const Error& error) {
  if (page(rank()).flag.failed.load(std::memory_order_relaxed)) return;
  // What concerns nobody else (no memory, an interrupt) concerns, for the others, this rank.
  std::vector<int> peers = error.peers();
  if (peers.empty()) peers = {link_.global_ranks()[rank()]};
  Report& report = page(rank()).report;
  report.cause = static_cast<int32_t>(error.cause());
  report.num_peers = static_cast<uint32_t>(std::min<size_t>(peers.size(), Report::kMaxPeers));
  std::copy_n(peers.begin(), report.num_peers, report.peers);
  std::strncpy(report.message, error.what(), sizeof report.message - 1);
  // Publishes the fields above: pairs with the acquire in watch().
  page(rank()).flag.failed.store(1, std::memory_order_release);
}

void SharedMemoryGroup::leave() {
  // Publishes all phases reached before: pairs with the acquire in watch().
  page(rank()).has_left.store(1, std::memory_order_release);
}

// ---------------------------------------------------------------------------------------------------------------
// Symmetric memory

std::shared_ptr<SymmetricBuffer> SharedMemoryGroup::allocate(size_t num_elems, DType dtype,
                                                             bool one_copy, const Call& call) {
  auto buffer = std::shared_ptr<SymmetricBuffer>();
  guarded([&] {
    arrive(fingerprint(Kind::kAllocate, num_elems, dtype, kNoOp, one_copy ? 0 : kNoRoot, call), {},
           call);
    const size_t part_bytes = num_elems * size_of(dtype);
    const size_t part_stride = one_copy ? 0 : round_up(part_bytes, sizeof(Page));
    const size_t bytes = one_copy ? part_bytes : part_stride * static_cast<size_t>(size());
    Segment segment = [&] {
      if (rank() != 0) {
        next_phase(call);  // so that a failed reservation of rank 0 is told by its report
        return link_.take(bytes, call.deadline);
      }
      Segment created = Segment::create(bytes);
      link_.give(created);
      next_phase(call);
      return created;
    }();
    buffer = std::make_shared<SymmetricBuffer>(
        SymmetricBuffer{std::move(segment), ++num_allocated_, part_stride, part_bytes});
  });
  const std::lock_guard lock(buffers_mutex_);
  std::erase_if(buffers_, [](const auto& weak) { return weak.expired(); });
  buffers_.push_back(buffer);
  return buffer;
}

SharedMemoryGroup::Location SharedMemoryGroup::locate(const void* data, size_t bytes) {
  const std::lock_guard lock(buffers_mutex_);
  for (const auto& weak : buffers_) {
    std::shared_ptr<SymmetricBuffer> buffer = weak.lock();
    if (!buffer || bytes == 0) continue;
    const char* begin = buffer->part(rank());
    const auto* wanted = static_cast<const char*>(data);
    if (wanted >= begin && wanted + bytes <= begin + buffer->part_bytes)
      return {std::move(buffer), static_cast<size_t>(wanted - begin)};
  }
  return {};
}

// ---------------------------------------------------------------------------------------------------------------
// Collectives
//
// Why two turns of the slots suffice: a turn is written again only two turns later, and between the
// two lies a phase that every rank publishes after it has read the first.

void SharedMemoryGroup::barrier(const Call& call) {
  guarded([&] {
    arrive(fingerprint(Kind::kBarrier, 0, DType::kUInt8, kNoOp, kNoRoot, call), {}, call);
  });
}

void SharedMemoryGroup::all_reduce(Span data, Op op, const Call& call) {
  const double scale = scale_of(op, size());
  const size_t elem_bytes = size_of(data.dtype);
  const auto ranks = static_cast<size_t>(size());
  auto* const bytes = static_cast<char*>(data.data);
  const Fingerprint mine = fingerprint(Kind::kAllReduce, data.num_elems, data.dtype,
                                       static_cast<uint32_t>(op), kNoRoot, call);
  std::vector<void*> at(ranks);  // the ranks' data, in rank order: fixes the order of the sum
  const auto reduce_into = [&](std::span<void* const> destinations, size_t num_elems) {
    reduce(data.dtype, op, scale,
           {at.data(), ranks, destinations.data(), destinations.size(), num_elems});
  };
  guarded([&] {
    if (size() == 1) {
      arrive(mine, {}, call);
      return;
    }
    if (data.bytes() <= kOnePhaseBytes) {
      const unsigned turn = turn_++;
      for (int r = 0; r < size(); ++r) at[r] = slot(r, turn);
      if (data.num_elems) std::memcpy(at[rank()], bytes, data.bytes());
      arrive(mine, {}, call);
      reduce_into({&data.data, 1}, data.num_elems);
      return;
    }
    const Location where = locate(data.data, data.bytes());
    if (arrive(mine, where, call)) {  // in place: my shard of everyone's buffer
      const Range shard = shard_of(data.num_elems, rank(), size(), elem_bytes);
      for (int r = 0; r < size(); ++r) at[r] = where.part(r) + shard.begin * elem_bytes;
      reduce_into(at, shard.count());
      next_phase(call);
      return;
    }
    for (size_t done = 0; done < data.bytes();) {  // staged, one slot at a time
      const unsigned turn = turn_++;
      const size_t chunk_bytes = std::min(kTurnBytes, data.bytes() - done);
      const Range shard = shard_of(chunk_bytes / elem_bytes, rank(), size(), elem_bytes);
      std::memcpy(slot(rank(), turn), bytes + done, chunk_bytes);
      next_phase(call);
      for (int r = 0; r < size(); ++r) at[r] = slot(r, turn) + shard.begin * elem_bytes;
      reduce_into({&at[rank()], 1}, shard.count());
      next_phase(call);
      for (int r = 0; r < size(); ++r) {
        const Range theirs = shard_of(chunk_bytes / elem_bytes, r, size(), elem_bytes);
        std::memcpy(bytes + done + theirs.begin * elem_bytes,
                    slot(r, turn) + theirs.begin * elem_bytes, theirs.count() * elem_bytes);
      }
      done += chunk_bytes;
    }
  });
}

void SharedMemoryGroup::reduce_scatter(Span output, ConstSpan input, Op op, const Call& call) {
  const double scale = scale_of(op, size());
  const size_t elem_bytes = size_of(output.dtype), shard_bytes = output.bytes();
  const auto ranks = static_cast<size_t>(size());
  auto* const mine = static_cast<char*>(output.data);
  const auto* const bytes = static_cast<const char*>(input.data);
  std::vector<const void*> at(ranks);
  guarded([&] {
    const Location where = locate(input.data, input.bytes());
    if (arrive(fingerprint(Kind::kReduceScatter, input.num_elems, input.dtype,
                           static_cast<uint32_t>(op), kNoRoot, call),
               where, call)) {
      for (int r = 0; r < size(); ++r)
        at[r] = where.part(r) + static_cast<size_t>(rank()) * shard_bytes;
      reduce(output.dtype, op, scale, {at.data(), ranks, &output.data, 1, output.num_elems});
      next_phase(call);
      return;
    }
    // A slot holds a piece of every rank's shard.
    const size_t room_bytes = kTurnBytes / ranks / kCacheLine * kCacheLine;
    for (size_t done = 0; done < shard_bytes;) {
      const unsigned turn = turn_++;
      const size_t piece_bytes = std::min(room_bytes, shard_bytes - done);
      for (size_t r = 0; r < ranks; ++r)
        std::memcpy(slot(rank(), turn) + r * room_bytes, bytes + r * shard_bytes + done,
                    piece_bytes);
      next_phase(call);
      for (int r = 0; r < size(); ++r)
        at[r] = slot(r, turn) + static_cast<size_t>(rank()) * room_bytes;
      void* const to = mine + done;
      reduce(output.dtype, op, scale, {at.data(), ranks, &to, 1, piece_bytes / elem_bytes});
      done += piece_bytes;
    }
  });
}

void SharedMemoryGroup::all_gather(Span output, ConstSpan input, const Call& call) {
  const size_t shard_bytes = input.bytes();
  auto* const bytes = static_cast<char*>(output.data);
  const auto* const mine = static_cast<const char*>(input.data);
  guarded([&] {
    const Location where = locate(output.data, output.bytes());
    if (arrive(fingerprint(Kind::kAllGather, output.num_elems, output.dtype, kNoOp, kNoRoot, call),
               where, call)) {
      for (int r = 0; r < size(); ++r)
        std::memcpy(where.part(r) + static_cast<size_t>(rank()) * shard_bytes, mine, shard_bytes);
      next_phase(call);
      return;
    }
    for (size_t done = 0; done < shard_bytes;) {
      const unsigned turn = turn_++;
      const size_t piece_bytes = std::min(kTurnBytes, shard_bytes - done);
      std::memcpy(slot(rank(), turn), mine + done, piece_bytes);
      next_phase(call);
      for (int r = 0; r < size(); ++r)
        std::memcpy(bytes + static_cast<size_t>(r) * shard_bytes + done, slot(r, turn),
                    piece_bytes);
      done += piece_bytes;
    }
  });
}

void SharedMemoryGroup::broadcast(Span data, int root, const Call& call) {
  auto* const bytes = static_cast<char*>(data.data);
  guarded([&] {
    arrive(fingerprint(Kind::kBroadcast, data.num_elems, data.dtype, kNoOp,
                       link_.global_ranks()[root], call),
           {}, call);
    for (size_t done = 0; done < data.bytes();) {
      const unsigned turn = turn_++;
      const size_t piece_bytes = std::min(kTurnBytes, data.bytes() - done);
      if (rank() == root) std::memcpy(slot(root, turn), bytes + done, piece_bytes);
      next_phase(call);
      if (rank() != root) std::memcpy(bytes + done, slot(root, turn), piece_bytes);
      done += piece_bytes;
    }
  });
}

void SharedMemoryGroup::update(const BucketUpdate& bucket, const Call& call) {
  const DType dtype = bucket.gradients.dtype;
  const size_t elem_bytes = size_of(dtype);
  const auto ranks = static_cast<size_t>(size());
  const Location gradients = locate(bucket.gradients.data, bucket.gradients.bytes());
  const Location weights = locate(bucket.weights.data, bucket.weights.bytes());
  if (!gradients.buffer || !weights.buffer)
    throw UsageError("update needs gradients and weights in symmetric buffers");
  guarded([&] {
    Call agreed = call;
    agreed.layout = hash_scalars(bucket.pieces, call.layout);  // a rank with another learning rate
    if (!arrive(fingerprint(Kind::kUpdate, bucket.gradients.num_elems, dtype,
                            static_cast<uint32_t>(bucket.op), kNoRoot, agreed),
                gradients, call))
      throw Error("the ranks' gradient buckets do not lie at the same place");

    std::vector<const void*> flags(ranks);
    for (int r = 0; r < size(); ++r) flags[r] = gradients.part(r) + bucket.flags_begin * elem_bytes;
    const Range shard = shard_of(bucket.flags_begin, rank(), size(), elem_bytes);
    std::vector<void*> g(ranks), w(ranks);
    for (size_t i = 0; i < bucket.pieces.size(); ++i) {
      const UpdatePiece& piece = bucket.pieces[i];
      const Range mine{std::max(shard.begin, piece.begin),
                       std::min(shard.end, piece.begin + piece.num_elems)};
      const auto is_used = [&](const void* ranks_flags) {
        static constexpr char kZero[8] = {};
        return std::memcmp(static_cast<const char*>(ranks_flags) + i * elem_bytes, kZero,
                           elem_bytes) != 0;
      };
      if (mine.begin >= mine.end) continue;
      const size_t at = mine.begin * elem_bytes;
      void* const momentum = bucket.momentum ? static_cast<char*>(bucket.momentum) + at : nullptr;
      if (std::ranges::none_of(flags, is_used)) {
        if (momentum && piece.idle_scale != 1.0)
          reduce(dtype, Op::kAvg, piece.idle_scale, {&momentum, 1, &momentum, 1, mine.count()});
        continue;
      }
      for (int r = 0; r < size(); ++r) {
        g[r] = gradients.part(r) + at;
        w[r] = weights.part((rank() + r) % size()) + at;  // the first is read: my own
      }
      sgd(dtype, piece.scalars, scale_of(bucket.op, size()),
          {g.data(), ranks, w.data(), ranks, momentum, mine.count(),
           /*zero_gradients=*/true});
    }
    next_phase(call);
  });
}

}  // namespace pyar
