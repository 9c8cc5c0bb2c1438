// Random collectives whose results are known: every rank draws the same ones from the same seed.
#pragma once

#include <random>

#include "ranks.h"

namespace pyar::test {

// Small integers: exact in every dtype, also their sum over 16 ranks in 8 bits.
inline int input_of(int rank, size_t elem, uint64_t call) {
  return static_cast<int>((elem * 7 + static_cast<size_t>(rank) * 5 + call * 3) % 16);
}

inline int reduced(Op op, int ranks, size_t elem, uint64_t call) {
  int result = input_of(0, elem, call);
  for (int r = 1; r < ranks; ++r) {
    const int value = input_of(r, elem, call);
    result = op == Op::kSum   ? result + value
             : op == Op::kMin ? std::min(result, value)
                              : std::max(result, value);
  }
  return result;
}

// One rank's memory for the drawn collectives: ordinary, symmetric, or (at some other place of it)
// symmetric on some ranks only.
template <typename T>
class Room {
 public:
  Room(SharedMemoryGroup& group, DType dtype, size_t num_elems, Calls& calls)
      : dtype_(dtype), num_elems_(num_elems), ordinary_(num_elems) {
    symmetric_ = group.allocate(num_elems, dtype, /*one_copy=*/false, calls.next());
    rank_ = group.rank();
  }
  Span span(bool symmetric, size_t offset, size_t num_elems) {
    CHECK(offset + num_elems <= num_elems_);
    T* const base = symmetric ? reinterpret_cast<T*>(symmetric_->part(rank_)) : ordinary_.data();
    return {base + offset, num_elems, dtype_};
  }

 private:
  DType dtype_;
  size_t num_elems_;
  std::vector<T> ordinary_;
  std::shared_ptr<SymmetricBuffer> symmetric_;
  int rank_;
};

template <typename T, typename Value>
void fill(Span span, Value value) {
  for (size_t i = 0; i < span.num_elems; ++i) static_cast<T*>(span.data)[i] = T(value(i));
}

template <typename T, typename Value>
void check(Span span, Value value) {
  for (size_t i = 0; i < span.num_elems; ++i) CHECK(static_cast<T*>(span.data)[i] == T(value(i)));
}

// `rounds` collectives on up to max_elems elements; sizes on both sides of where the group changes
// its path.
template <typename T>
void random_collectives(SharedMemoryGroup& group, DType dtype, size_t max_elems, int rounds,
                        unsigned seed) {
  const int ranks = group.size(), me = group.rank();
  const auto shards = static_cast<size_t>(ranks);
  Calls calls;
  Room<T> room(group, dtype, max_elems * shards, calls);
  Room<T> other(group, dtype, max_elems * shards, calls);
  std::mt19937 random(seed);
  const auto below = [&](size_t limit) { return random() % limit; };
  for (int round = 0; round < rounds; ++round) {
    const Call call = calls.next();
    const size_t sizes[] = {below(3), below(64), 4096 / sizeof(T) + below(3),
                            32768 / sizeof(T) + below(3), below(max_elems)};
    const size_t num_elems = std::min(max_elems, sizes[below(5)]), offset = below(3);
    const size_t places = below(3);  // everyone symmetric, no one, the even ranks
    const bool symmetric = places == 0 || (places == 2 && me % 2 == 0);
    const Op op = std::array{Op::kSum, Op::kMin, Op::kMax}[below(3)];
    const int root = static_cast<int>(below(shards));
    const auto mine = [&](size_t i) { return input_of(me, i, call.sequence); };
    const auto result = [&](size_t i) { return reduced(op, ranks, i, call.sequence); };
    const size_t room_for_offset = max_elems * shards - num_elems;
    const Span data = room.span(symmetric, std::min(offset, room_for_offset), num_elems);
    switch (below(5)) {
      case 0: {
        fill<T>(data, mine);
        group.all_reduce(data, op, call);
        check<T>(data, result);
        break;
      }
      case 1: {
        const Span input = room.span(symmetric, 0, num_elems * shards);
        const Span output = other.span(symmetric, 0, num_elems);
        fill<T>(input, mine);
        group.reduce_scatter(output, input, op, call);
        check<T>(output, [&](size_t i) { return result(i + num_elems * size_t(me)); });
        break;
      }
      case 2: {
        const Span output = other.span(symmetric, 0, num_elems * shards);
        fill<T>(data, mine);
        group.all_gather(output, data, call);
        for (int r = 0; r < ranks; ++r)
          check<T>({static_cast<T*>(output.data) + size_t(r) * num_elems, num_elems, dtype},
                   [&](size_t i) { return input_of(r, i, call.sequence); });
        break;
      }
      case 3: {
        fill<T>(data, mine);
        group.broadcast(data, root, call);
        check<T>(data, [&](size_t i) { return input_of(root, i, call.sequence); });
        break;
      }
      default:
        group.barrier(call);
    }
  }
  group.barrier(calls.next());  // nobody leaves while another still waits
}

}  // namespace pyar::test
