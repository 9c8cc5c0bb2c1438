// The collectives of SharedMemoryGroup. Waiting and agreement are in shared_memory_group.cc.
#include <algorithm>
#include <cstring>

#include "group/shared_memory_group.h"
#include "kernels/kernels.h"

namespace pyar {
namespace {

// Up to here every rank reduces everything by itself: one barrier instead of two or three, for size
// times the reads.
constexpr size_t kOnePhaseBytes = size_t{16} << 10;

// The shard of `rank`: whole cache lines, so that no line is written by two ranks.
Range shard_of(size_t num_elems, int rank, int size, size_t elem_bytes) {
  const size_t line_elems = kCacheLine / elem_bytes, lines = num_elems / line_elems;
  const auto r = static_cast<size_t>(rank), n = static_cast<size_t>(size);
  return {lines * r / n * line_elems,
          rank == size - 1 ? num_elems : lines * (r + 1) / n * line_elems};
}

double scale_of(Op op, int size) { return op == Op::kAvg ? 1.0 / size : 1.0; }

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

// A flag of any value but zero, in whatever type.
bool is_set(const char* part, size_t element, DType dtype) {
  static constexpr char kZero[8] = {};
  return std::memcmp(part + element * size_of(dtype), kZero, size_of(dtype)) != 0;
}

}  // namespace

// Why two turns of the slots suffice: a turn is written again only two turns later, and between the
// two lies a phase that every rank publishes after it has read the first.

void SharedMemoryGroup::barrier(const Call& call) {
  guarded([&] {
    arrive(fingerprint(Kind::kBarrier, 0, DType::kUInt8, kNoOp, kNoRoot, call), {}, call);
  });
}

void SharedMemoryGroup::all_reduce(Span data, Op op, const Call& call) {
  const Fingerprint mine = fingerprint(Kind::kAllReduce, data.num_elems, data.dtype,
                                       static_cast<uint32_t>(op), kNoRoot, call);
  static_assert(kOnePhaseBytes <= kTurnBytes);
  guarded([&] {
    if (size() == 1) {
      arrive(mine, {}, call);
    } else if (data.bytes() <= kOnePhaseBytes) {
      const unsigned turn = turn_++;
      if (data.num_elems) std::memcpy(slot(rank(), turn), data.data, data.bytes());
      arrive(mine, {}, call);
      reduce_slots(turn, {0, data.num_elems}, data.dtype, op, data.data);
    } else if (const Location where = locate(data.data, data.bytes()); arrive(mine, where, call)) {
      all_reduce_in_place(where, data, op);
      next_phase(call);
    } else {
      all_reduce_staged(data, op, call);
    }
  });
}

// My shard of everyone's part, read and written once.
void SharedMemoryGroup::all_reduce_in_place(const Location& where, Span data, Op op) {
  const size_t elem_bytes = size_of(data.dtype);
  const Range shard = shard_of(data.num_elems, rank(), size(), elem_bytes);
  std::vector<void*> parts;  // in rank order: fixes the order of the sum
  for (int r = 0; r < size(); ++r) parts.push_back(where.part(r) + shard.begin * elem_bytes);
  reduce(data.dtype, op, scale_of(op, size()),
         {parts.data(), parts.size(), parts.data(), parts.size(), shard.count()});
}

// One slot at a time: everyone copies in, reduces its shard of all slots, copies all shards out.
void SharedMemoryGroup::all_reduce_staged(Span data, Op op, const Call& call) {
  const size_t elem_bytes = size_of(data.dtype);
  auto* const bytes = static_cast<char*>(data.data);
  for (size_t done = 0; done < data.bytes(); done += kTurnBytes) {
    const unsigned turn = turn_++;
    const size_t chunk_bytes = std::min(kTurnBytes, data.bytes() - done);
    const auto shard_bytes = [&](int r) {
      const Range shard = shard_of(chunk_bytes / elem_bytes, r, size(), elem_bytes);
      return Range{shard.begin * elem_bytes, shard.end * elem_bytes};
    };
    std::memcpy(slot(rank(), turn), bytes + done, chunk_bytes);
    next_phase(call);
    const Range mine = shard_of(chunk_bytes / elem_bytes, rank(), size(), elem_bytes);
    reduce_slots(turn, mine, data.dtype, op, slot(rank(), turn) + mine.begin * elem_bytes);
    next_phase(call);
    for (int r = 0; r < size(); ++r) {
      const Range theirs = shard_bytes(r);
      std::memcpy(bytes + done + theirs.begin, slot(r, turn) + theirs.begin, theirs.count());
    }
  }
}

// Elements [begin, end) of all slots of this turn, reduced in rank order to `to`.
void SharedMemoryGroup::reduce_slots(unsigned turn, Range elems, DType dtype, Op op, void* to) {
  std::vector<const void*> slots;
  for (int r = 0; r < size(); ++r) slots.push_back(slot(r, turn) + elems.begin * size_of(dtype));
  reduce(dtype, op, scale_of(op, size()), {slots.data(), slots.size(), &to, 1, elems.count()});
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
  const Location gradients = locate(bucket.gradients.data, bucket.gradients.bytes());
  const Location weights = locate(bucket.weights.data, bucket.weights.bytes());
  if (!gradients.buffer || !weights.buffer)
    throw UsageError("update needs gradients and weights in symmetric buffers");
  guarded([&] {
    Call agreed = call;
    agreed.layout = hash_scalars(bucket.pieces, call.layout);  // a rank with another learning rate
    const auto op = static_cast<uint32_t>(bucket.op);
    if (!arrive(fingerprint(Kind::kUpdate, bucket.gradients.num_elems, bucket.gradients.dtype, op,
                            kNoRoot, agreed),
                gradients, call))
      throw Error("the ranks' gradient buckets do not lie at the same place");
    const Range shard =
        shard_of(bucket.flags_begin, rank(), size(), size_of(bucket.gradients.dtype));
    for (size_t i = 0; i < bucket.pieces.size(); ++i) {
      const UpdatePiece& piece = bucket.pieces[i];
      const Range mine{std::max(shard.begin, piece.begin),
                       std::min(shard.end, piece.begin + piece.num_elems)};
      if (mine.begin < mine.end) update_piece(bucket, i, mine, gradients, weights);
    }
    next_phase(call);
  });
}

// Elements `mine` of piece i: their gradients of all ranks become new weights of all ranks.
void SharedMemoryGroup::update_piece(const BucketUpdate& bucket, size_t i, Range mine,
                                     const Location& gradients, const Location& weights) {
  const DType dtype = bucket.gradients.dtype;
  const UpdatePiece& piece = bucket.pieces[i];
  const size_t at = mine.begin * size_of(dtype);
  void* const momentum = bucket.momentum ? static_cast<char*>(bucket.momentum) + at : nullptr;
  std::vector<void*> g, w;
  bool used = false;
  for (int r = 0; r < size(); ++r) {
    g.push_back(gradients.part(r) + at);
    w.push_back(weights.part((rank() + r) % size()) + at);  // the first is read: my own
    used |= is_set(gradients.part(r), bucket.flags_begin + i, dtype);
  }
  if (used)
    sgd(dtype, piece.scalars, scale_of(bucket.op, size()),
        {g.data(), g.size(), w.data(), w.size(), momentum, mine.count(), /*zero_gradients=*/true});
  else if (momentum && piece.idle_scale != 1.0)
    reduce(dtype, Op::kAvg, piece.idle_scale, {&momentum, 1, &momentum, 1, mine.count()});
}

}  // namespace pyar
