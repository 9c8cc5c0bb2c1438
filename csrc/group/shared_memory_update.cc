// Reduction and SGD step of a bucket in one pass over memory.
#include <algorithm>
#include <cstring>

#include "group/shared_memory_group.h"

namespace pyar {
namespace {

uint64_t hash_bytes(const void* data, size_t bytes, uint64_t seed) {  // FNV-1a
  uint64_t hash = seed ^ 0xcbf29ce484222325u;
  for (size_t i = 0; i < bytes; ++i)
    hash = (hash ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001b3u;
  return hash;
}

// All factors, as numbers without padding: a rank with another learning rate must not get through.
uint64_t hash_factors(const BucketUpdate& bucket, uint64_t hash) {
  hash = hash_bytes(&bucket.scale, sizeof bucket.scale, hash + bucket.is_reduced);
  for (const UpdatePiece& piece : bucket.pieces) {
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

void SharedMemoryGroup::update(const BucketUpdate& bucket, const Call& call) {
  const Location gradients = locate(bucket.gradients.data, bucket.gradients.bytes());
  const Location weights = locate(bucket.weights.data, bucket.weights.bytes());
  if (!gradients.buffer || !weights.buffer)
    throw UsageError("update needs gradients and weights in symmetric buffers");
  guarded([&] {
    Call agreed = call;
    agreed.layout = hash_factors(bucket, call.layout);
    if (arrive(fingerprint(Kind::kUpdate, bucket.gradients.num_elems, bucket.gradients.dtype, kNoOp,
                           kNoRoot, agreed),
               gradients, call) != Places::kSame)
      throw Error("the ranks' gradient buckets do not lie at the same place");
    const Range shard =
        shard_of(bucket.flags_begin, rank(), size(), size_of(bucket.gradients.dtype));
    NonFinite nonfinite;
    for (size_t i = 0; i < bucket.pieces.size(); ++i) {
      const UpdatePiece& piece = bucket.pieces[i];
      const Range mine{std::max(shard.begin, piece.begin),
                       std::min(shard.end, piece.begin + piece.num_elems)};
      if (mine.begin < mine.end) update_piece(bucket, i, mine, gradients, weights, nonfinite);
    }
    page(rank()).found = {nonfinite};
    // Reduced gradients are each rank's own: nobody else reads or zeroes them.
    if (bucket.is_reduced)
      std::memset(bucket.gradients.data, 0, bucket.flags_begin * size_of(bucket.gradients.dtype));
    next_phase(call);
    if (call.findings) collect(*call.findings, bucket.flags_begin);
  });
}

// Elements `mine` of piece i: their gradients of all ranks become new weights of all ranks.
void SharedMemoryGroup::update_piece(const BucketUpdate& bucket, size_t i, Range mine,
                                     const Location& gradients, const Location& weights,
                                     NonFinite& nonfinite) {
  const DType dtype = bucket.gradients.dtype;
  const UpdatePiece& piece = bucket.pieces[i];
  const size_t at = mine.begin * size_of(dtype);
  void* const momentum = bucket.momentum ? static_cast<char*>(bucket.momentum) + at : nullptr;
  std::vector<void*> g, w;
  bool used = false;
  for (int r = 0; r < size(); ++r) {
    if (bucket.is_reduced && r != rank()) continue;
    g.push_back(gradients.part(r) + at);
    used |= is_set(gradients.part(r), bucket.flags_begin + i, dtype);
  }
  for (int k = 0; k < (weights.buffer->is_one_copy() ? 1 : size()); ++k)
    w.push_back(weights.part((rank() + k) % size()) + at);  // the first is read: my own
  if (used) {
    NonFinite found;
    sgd(dtype, piece.scalars, bucket.scale,
        {.gradients = g.data(),
         .num_gradients = g.size(),
         .weights = w.data(),
         .num_weights = w.size(),
         .momentum = momentum,
         .num_elems = mine.count(),
         .zero_gradients = !bucket.is_reduced,
         .nonfinite = &found});
    if (found.elem != NonFinite::kNone && nonfinite.elem == NonFinite::kNone)
      nonfinite = {mine.begin + found.elem, found.source};
  } else if (momentum && piece.idle_scale != 1.0) {
    reduce(dtype, Op::kAvg, piece.idle_scale, {&momentum, 1, &momentum, 1, mine.count()});
  }
}

}  // namespace pyar
