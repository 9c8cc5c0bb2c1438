// The collectives of SharedMemoryGroup. Waiting and agreement are in shared_memory_group.cc.
#include <algorithm>
#include <cstring>

#include "group/shared_memory_group.h"
#include "kernels/kernels.h"

namespace pyar {
namespace {

// Up to here every rank reduces everything by itself, out of slots: one barrier for size times the
// reads. Ordinary tensors, which need three barriers else; 2 ranks, 32 KiB: 3.9 us against 6.9, 64
// KiB: 7.6 against 6.5.
constexpr size_t kOnePhaseBytes = size_t{32} << 10;
// Symmetric memory needs two. 2 ranks, 4 KiB: 0.8 us against 0.5, but 4 ranks on 2 cores: 6
// against 9.
constexpr size_t kOnePhaseSymmetricBytes = size_t{4} << 10;

// memcpy wants valid pointers also for nothing.
void copy(void* to, const void* from, size_t bytes) {
  if (bytes) std::memcpy(to, from, bytes);
}

double scale_of(Op op, int size) { return op == Op::kAvg ? 1.0 / size : 1.0; }

// reduce(), looking at what is wanted of the elements. `begin` is the place of the first in the
// buffer. A norm is taken from tiles that are still in the second-level cache.
Found reduce_watched(DType dtype, Op op, double scale, const ReduceSpans& spans, size_t begin,
                     const Findings& wanted) {
  constexpr size_t kTileBytes = size_t{64} << 10;
  const size_t elem_bytes = size_of(dtype);
  std::vector<const void*> sources(spans.num_sources);
  std::vector<void*> destinations(spans.num_destinations);
  const auto tile_at = [&](size_t at, size_t num_elems, NonFinite* nonfinite) {
    for (size_t k = 0; k < sources.size(); ++k)
      sources[k] = static_cast<const char*>(spans.sources[k]) + at * elem_bytes;
    for (size_t k = 0; k < destinations.size(); ++k)
      destinations[k] = static_cast<char*>(spans.destinations[k]) + at * elem_bytes;
    return ReduceSpans{sources.data(),      sources.size(), destinations.data(),
                       destinations.size(), num_elems,      nonfinite};
  };

  Found found;
  const size_t watched = std::clamp(wanted.num_elems, begin, begin + spans.num_elems) - begin;
  const size_t tile_elems = wanted.norm_is_wanted ? kTileBytes / elem_bytes : watched;
  for (size_t at = 0, count; at < watched; at += count) {
    count = std::min(tile_elems, watched - at);
    NonFinite nonfinite;
    const ReduceSpans tile = tile_at(at, count, &nonfinite);
    reduce(dtype, op, scale, tile);
    if (wanted.norm_is_wanted)
      found.sum_squares +=
          sum_squares(dtype, destinations.empty() ? sources[0] : destinations[0], count);
    if (nonfinite.elem != NonFinite::kNone && found.nonfinite.elem == NonFinite::kNone)
      found.nonfinite = {begin + at + nonfinite.elem, nonfinite.source};
  }
  reduce(dtype, op, scale, tile_at(watched, spans.num_elems - watched, nullptr));
  return found;
}

}  // namespace

Range shard_of(size_t num_elems, int rank, int size, size_t elem_bytes) {
  const size_t line_elems = kCacheLine / elem_bytes, lines = num_elems / line_elems;
  const auto r = static_cast<size_t>(rank), n = static_cast<size_t>(size);
  return {lines * r / n * line_elems,
          rank == size - 1 ? num_elems : lines * (r + 1) / n * line_elems};
}

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
      if (call.findings && call.findings->norm_is_wanted) {  // else not worth a pass of its own
        const void* const alone = data.data;
        const Found found = reduce_watched(
            data.dtype, op, 1.0, {&alone, 1, nullptr, 0, data.num_elems}, 0, *call.findings);
        conclude(*call.findings, {&found, 1});
      }
      return;
    }
    const Location where =
        data.bytes() > kOnePhaseSymmetricBytes ? locate(data.data, data.bytes()) : Location{};
    const bool is_small = data.bytes() <= kOnePhaseBytes;
    const unsigned turn = is_small ? turn_++ : 0;
    const auto copy_in = [&] { copy(slot(rank(), turn), data.data, data.bytes()); };
    if (is_small && !where.buffer) copy_in();
    const Places places = arrive(mine, where, call);
    if (places == Places::kSame) {
      all_reduce_in_place(where, data, op, call.findings);
      next_phase(call);
      if (call.findings) collect(*call.findings, data.num_elems);
    } else if (is_small) {
      if (where.buffer) copy_in();
      if (places == Places::kMixed) next_phase(call);
      reduce_slots(turn, {0, data.num_elems}, data.dtype, op, data.data, call.findings);
    } else {
      if (call.findings && call.findings->norm_is_wanted)
        throw Error("a norm is taken in symmetric buffers only");
      all_reduce_staged(data, op, call);
    }
  });
}

// My shard of everyone's part, read and written once.
void SharedMemoryGroup::all_reduce_in_place(const Location& where, Span data, Op op,
                                            Findings* findings) {
  const size_t elem_bytes = size_of(data.dtype);
  const Range shard = shard_of(data.num_elems, rank(), size(), elem_bytes);
  std::vector<void*> parts;  // in rank order: fixes the order of the sum
  for (int r = 0; r < size(); ++r) parts.push_back(where.part(r) + shard.begin * elem_bytes);
  page(rank()).found =
      reduce_watched(data.dtype, op, scale_of(op, size()),
                     {parts.data(), parts.size(), parts.data(), parts.size(), shard.count()},
                     shard.begin, findings ? *findings : Findings{});
}

void SharedMemoryGroup::collect(Findings& findings, size_t num_elems) const {
  std::vector<Found> by_rank;
  for (int r = 0; r < size(); ++r) {
    by_rank.push_back(page(r).found);
    // Written by another process: bounded before use, and so is the source, by conclude().
    NonFinite& nonfinite = by_rank.back().nonfinite;
    if (nonfinite.elem >= num_elems) nonfinite = {};
  }
  conclude(findings, by_rank);
}

void SharedMemoryGroup::conclude(Findings& findings, std::span<const Found> by_rank) const {
  const NonFinite* first = &by_rank.front().nonfinite;
  for (const Found& found : by_rank) {
    findings.sum_squares += found.sum_squares;
    if (found.nonfinite.elem < first->elem) first = &found.nonfinite;
  }
  if (first->elem == NonFinite::kNone) return;
  findings.has_nonfinite = true;
  findings.nonfinite_elem = first->elem;
  // Written by another process: bounded before use.
  if (first->source < link_.global_ranks().size())
    findings.nonfinite_rank = link_.global_ranks()[first->source];
}

// The slots take a chunk per turn. A rank reduces its shard of the chunk from its own tensor and
// the others' slots, to its own tensor and its own slot; what it copies in and out are the others'
// shards. Two turns are under way at once, so that one phase per chunk says both "my shard of this
// chunk is reduced" and "my share of the next chunk is there".
void SharedMemoryGroup::all_reduce_staged(Span data, Op op, const Call& call) {
  const size_t elem_bytes = size_of(data.dtype), ranks = static_cast<size_t>(size());
  // Areas of a slot do not move, also for a last, shorter chunk: copying in the next chunk must not
  // touch my shard of the one before, which others may still be copying out.
  const size_t area_bytes = kTurnBytes / ranks / kCacheLine * kCacheLine;
  const size_t chunk_bytes = area_bytes * ranks;
  const size_t num_chunks = (data.bytes() + chunk_bytes - 1) / chunk_bytes;
  const unsigned first_turn = turn_;
  turn_ += static_cast<unsigned>(num_chunks);

  const auto staged = [&](int owner, size_t chunk, size_t shard) {
    return slot(owner, first_turn + static_cast<unsigned>(chunk)) + shard * area_bytes;
  };
  const auto shard_of_chunk = [&](size_t chunk, size_t shard) {
    const size_t begin = chunk * chunk_bytes + shard * area_bytes;
    return Range{std::min(begin, data.bytes()), std::min(begin + area_bytes, data.bytes())};
  };
  auto* const bytes = static_cast<char*>(data.data);
  const auto copy_in = [&](size_t chunk) {
    for (int r = 0; r < size(); ++r) {
      const Range theirs = shard_of_chunk(chunk, static_cast<size_t>(r));
      if (r != rank()) copy(staged(rank(), chunk, r), bytes + theirs.begin, theirs.count());
    }
  };
  const auto reduce_mine = [&](size_t chunk) {
    const auto me = static_cast<size_t>(rank());
    const Range mine = shard_of_chunk(chunk, me);
    std::vector<const void*> sources(ranks);
    for (int r = 0; r < size(); ++r) sources[r] = staged(r, chunk, me);
    sources[me] = bytes + mine.begin;
    void* const destinations[] = {bytes + mine.begin, staged(rank(), chunk, me)};
    reduce(data.dtype, op, scale_of(op, size()),
           {sources.data(), ranks, destinations, 2, mine.count() / elem_bytes});
  };
  const auto copy_out = [&](size_t chunk) {
    for (int r = 0; r < size(); ++r) {
      const Range theirs = shard_of_chunk(chunk, static_cast<size_t>(r));
      if (r != rank()) copy(bytes + theirs.begin, staged(r, chunk, r), theirs.count());
    }
  };

  copy_in(0);
  next_phase(call);
  for (size_t chunk = 0; chunk < num_chunks; ++chunk) {
    reduce_mine(chunk);
    if (chunk + 1 < num_chunks) copy_in(chunk + 1);
    next_phase(call);
    copy_out(chunk);
  }
}

// Elements [begin, end) of all slots of this turn, reduced in rank order to `to`.
void SharedMemoryGroup::reduce_slots(unsigned turn, Range elems, DType dtype, Op op, void* to,
                                     Findings* findings) {
  std::vector<const void*> slots;
  for (int r = 0; r < size(); ++r) slots.push_back(slot(r, turn) + elems.begin * size_of(dtype));
  const Found found = reduce_watched(dtype, op, scale_of(op, size()),
                                     {slots.data(), slots.size(), &to, 1, elems.count()},
                                     elems.begin, findings ? *findings : Findings{});
  if (findings) conclude(*findings, {&found, 1});
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
               where, call) == Places::kSame) {
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
               where, call) == Places::kSame) {
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

}  // namespace pyar
