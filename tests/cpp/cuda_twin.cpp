// The twin of the CUDA kernels against the CPU kernels, bit for bit: random sizes, alignments,
// types, grids, flags and values. Every span is an allocation of its own, so that the sanitizers
// see an access beyond it.
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>

#include "base/error.h"
#include "check.h"
#include "kernels/cuda/cuda_kernels.h"
#include "random_elems.h"

using namespace pyar;
using namespace pyar::test;

namespace {

constexpr DType kFloats[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr std::pair<DType, DType> kGradientAndWeight[] = {
    {DType::kFloat64, DType::kFloat64},   {DType::kFloat32, DType::kFloat32},
    {DType::kBFloat16, DType::kBFloat16}, {DType::kFloat16, DType::kFloat16},
    {DType::kBFloat16, DType::kFloat32},  {DType::kFloat16, DType::kFloat32},
};
constexpr std::pair<DType, DType> kCasts[] = {
    {DType::kFloat64, DType::kFloat64},   {DType::kFloat32, DType::kFloat32},
    {DType::kBFloat16, DType::kBFloat16}, {DType::kFloat16, DType::kFloat16},
    {DType::kFloat32, DType::kBFloat16},  {DType::kFloat32, DType::kFloat16},
    {DType::kBFloat16, DType::kFloat32},  {DType::kFloat16, DType::kFloat32},
};

class Random {
 public:
  explicit Random(uint64_t seed) : bits_(seed) {}
  size_t below(size_t bound) { return bits_.next() % bound; }
  bool one_in(size_t count) { return below(count) == 0; }
  // Around the sizes of accesses, of batches of 256 threads, and of chunks.
  size_t num_elems() {
    constexpr size_t kSizes[] = {0, 1, 2, 7, 8, 16, 33, 255, 1024, 2048, 4096, 6000};
    return kSizes[below(std::size(kSizes))] + below(20);
  }
  size_t chunk_elems() {
    constexpr size_t kSizes[] = {0, 1, 100, 1024, 5000};
    return kSizes[below(std::size(kSizes))];
  }
  unsigned max_blocks() { return static_cast<unsigned>(below(6)); }
  Bits& bits() { return bits_; }

 private:
  Bits bits_;
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Elements `shift` after a boundary of 64 bytes, with a copy for the CPU kernels to work on.
class Elems {
 public:
  Elems(DType dtype, size_t num_elems, size_t shift, bool tame, Random& random)
      : shift_bytes_(shift * size_of(dtype)), num_bytes_(num_elems * size_of(dtype)) {
    storage_ = allocate();
    expected_ = allocate();
    const Bytes values = random_elems(dtype, num_elems, random.bits(), tame);
    if (values.empty()) return;
    std::memcpy(data(), values.data(), num_bytes_);
    std::memcpy(expected(), values.data(), num_bytes_);
  }
  void* data() const { return storage_.get() + shift_bytes_; }
  void* expected() const { return expected_.get() + shift_bytes_; }
  uint64_t address() const { return reinterpret_cast<uintptr_t>(data()); }
  void check() const { CHECK(num_bytes_ == 0 || std::memcmp(data(), expected(), num_bytes_) == 0); }

 private:
  using Storage = std::unique_ptr<unsigned char, Free>;
  Storage allocate() const {
    void* memory = nullptr;
    CHECK(posix_memalign(&memory, 64, shift_bytes_ + num_bytes_ + 1) == 0);
    return Storage(static_cast<unsigned char*>(memory));
  }

  size_t shift_bytes_, num_bytes_;
  Storage storage_, expected_;
};

// An image where the kernels look for it.
class Image {
 public:
  explicit Image(const std::vector<char>& bytes) {
    void* memory = nullptr;
    CHECK(posix_memalign(&memory, 16, bytes.size() + 1) == 0);
    memory_.reset(memory);
    if (!bytes.empty()) std::memcpy(memory, bytes.data(), bytes.size());
  }
  void* get() const { return memory_.get(); }

 private:
  std::unique_ptr<void, Free> memory_;
};

size_t shift_of(bool is_common, size_t common, Random& random) {
  return is_common ? common : random.below(16);
}

// ---- copy, reduce, cast ----

void check_copy(Random& random) {
  const size_t num_words = random.num_elems();
  const bool is_common = !random.one_in(3);
  const size_t common = random.below(16);
  const Elems from(DType::kInt32, num_words, shift_of(is_common, common, random), false, random);
  const Elems to(DType::kInt32, num_words, shift_of(is_common, common, random), false, random);
  std::memcpy(to.expected(), from.data(), num_words * 4);
  cuda_twin().copy(from.data(), to.data(), num_words * 4, {nullptr, random.max_blocks()});
  from.check();
  to.check();
}

void check_reduce(DType dtype, Random& random) {
  const size_t num_elems = random.num_elems(), num_sources = 1 + random.below(4);
  const bool tame = random.one_in(2), is_common = !random.one_in(3);
  const size_t common = random.below(16);
  std::vector<Elems> elems;
  std::vector<void*> data, expected;
  for (size_t i = 0; i < num_sources + 2; ++i) {
    elems.emplace_back(dtype, num_elems, shift_of(is_common, common, random), tame, random);
    data.push_back(elems.back().data());
    expected.push_back(elems.back().expected());
  }
  // The last source is a destination too.
  const size_t first = num_sources - 1;
  const double scale = random.one_in(3) ? 1.0 : 1.0 / 3;
  reduce(dtype, Op::kAvg, scale, {expected.data(), num_sources, &expected[first], 3, num_elems});
  cuda_twin().reduce(dtype, scale, {data.data(), num_sources, &data[first], 3, num_elems},
                     {nullptr, random.max_blocks()});
  for (const Elems& each : elems) each.check();
}

// By CPU kernels, whose product of a 16-bit float is rounded after its conversion.
void cast_on_cpu(DType from, const void* source, DType to, void* destination, size_t num_elems,
                 double scale) {
  const DType wide = from == to ? from : DType::kFloat32;
  if (num_elems == 0) return;
  Bytes values(num_elems * size_of(wide));
  if (from == wide)
    std::memcpy(values.data(), source, values.size());
  else
    convert(from, source, wide, values.data(), num_elems);
  void* const product = values.data();
  reduce(wide, Op::kAvg, scale, {&product, 1, &product, 1, num_elems});
  if (to == wide)
    std::memcpy(destination, values.data(), values.size());
  else
    convert(wide, values.data(), to, destination, num_elems);
}

void check_cast(DType from, DType to, Random& random) {
  const bool tame = random.one_in(2), in_place = from == to && random.one_in(2);
  const double scale = random.one_in(2) ? 1.0 : 0.3;
  std::vector<Elems> sources, destinations;
  std::vector<TableSpan> spans;
  for (size_t count = 1 + random.below(5); count > 0; --count) {
    const size_t num_elems = random.num_elems(), common = random.below(16);
    const bool is_common = !random.one_in(3);
    sources.emplace_back(from, num_elems, shift_of(is_common, common, random), tame, random);
    if (!in_place)
      destinations.emplace_back(to, num_elems, shift_of(is_common, common, random), tame, random);
    const Elems& target = in_place ? sources.back() : destinations.back();
    spans.push_back({sources.back().address(), target.address(), num_elems});
    cast_on_cpu(from, sources.back().expected(), to, target.expected(), num_elems, scale);
  }
  const SpanTable table(from, to, spans, random.chunk_elems());
  const Image image(table.image());
  cuda_twin().cast(table, {image.get(), nullptr, nullptr, scale}, {nullptr, random.max_blocks()});
  for (const Elems& each : sources) each.check();
  for (const Elems& each : destinations) each.check();
}

// ---- update ----

struct Piece {
  size_t num_elems;
  uint32_t group;
  bool is_used;
  Elems weight, gradient;
  std::unique_ptr<Elems> momentum, copy;
};

struct Bucket {
  DType gradient, weight;
  std::vector<Piece> pieces;
  std::vector<UpdateRule> rules;
  Bytes flags;  // empty: all are used
};

Bucket random_bucket(DType gradient, DType weight, Random& random) {
  Bucket bucket{gradient, weight, {}, {}, {}};
  const bool tame = random.one_in(2), has_flags = random.one_in(2);
  const size_t num_groups = random.one_in(8) ? 70 : 1 + random.below(3);
  for (size_t i = 0; i < num_groups; ++i) {
    UpdateRule rule;
    rule.scalars.decay = random.one_in(2) ? 0 : 1e-4;
    rule.scalars.history = 0.9;
    rule.scalars.gain = random.one_in(2) ? 1 : 0.1;
    rule.scalars.momentum = 0.9;
    rule.scalars.rate = 0.3;
    rule.scalars.nesterov = random.one_in(2);
    rule.idle_scale = random.one_in(2) ? 1 : 0.7;
    bucket.rules.push_back(rule);
  }
  const size_t num_pieces = num_groups > 3 ? num_groups : random.below(6);
  if (has_flags) bucket.flags.resize(num_pieces * size_of(gradient));
  for (size_t i = 0; i < num_pieces; ++i) {
    const size_t num_elems = num_groups > 3 ? random.below(40) : random.num_elems();
    const size_t common = random.below(16);
    const bool is_common = !random.one_in(3), is_used = !has_flags || !random.one_in(3);
    const auto elems = [&](DType dtype) {
      return Elems(dtype, num_elems, shift_of(is_common, common, random), tame, random);
    };
    Piece piece{num_elems,       static_cast<uint32_t>(i % num_groups),
                is_used,         elems(weight),
                elems(gradient), nullptr,
                nullptr};
    if (!random.one_in(4)) piece.momentum = std::make_unique<Elems>(elems(weight));
    if (gradient != weight && !random.one_in(3))
      piece.copy = std::make_unique<Elems>(elems(gradient));
    // Any bit counts, also that of a subnormal.
    if (has_flags && is_used)
      bucket.flags[i * size_of(gradient) + random.below(size_of(gradient))] = 1;
    bucket.pieces.push_back(std::move(piece));
  }
  return bucket;
}

UpdateTable table_of(const Bucket& bucket, size_t chunk_elems) {
  std::vector<TablePiece> pieces;
  for (const Piece& piece : bucket.pieces)
    pieces.push_back({piece.weight.address(), piece.momentum ? piece.momentum->address() : kNoSpan,
                      piece.gradient.address(), piece.copy ? piece.copy->address() : kNoSpan,
                      piece.num_elems, piece.group});
  return UpdateTable(bucket.gradient, bucket.weight, pieces, chunk_elems);
}

struct Found {
  double sum_squares = 0;
  bool nonfinite = false;
};

// The gradients as the update sees them: scaled, rounded to the weights' type.
Bytes means_of(const Bucket& bucket, const Piece& piece, double scale) {
  Bytes means(piece.num_elems * size_of(bucket.weight));
  if (bucket.gradient != bucket.weight)
    convert(bucket.gradient, piece.gradient.expected(), bucket.weight, means.data(),
            piece.num_elems);
  else if (!means.empty())
    std::memcpy(means.data(), piece.gradient.expected(), means.size());
  void* const data = means.data();
  reduce(bucket.weight, Op::kAvg, scale, {&data, 1, &data, 1, piece.num_elems});
  return means;
}

Found look_on_cpu(const Bucket& bucket, double scale) {
  Found found;
  for (const Piece& piece : bucket.pieces) {
    if (!piece.is_used) continue;
    const Bytes means = means_of(bucket, piece, scale);
    const void* const source = means.data();
    Bytes copy = means;
    void* const destination = copy.data();
    NonFinite nonfinite;
    reduce(bucket.weight, Op::kSum, 1, {&source, 1, &destination, 1, piece.num_elems, &nonfinite});
    found.nonfinite |= nonfinite.elem != NonFinite::kNone;
    found.sum_squares += sum_squares(bucket.weight, means.data(), piece.num_elems);
  }
  return found;
}

void update_on_cpu(const Bucket& bucket, double scale, bool zero_gradients) {
  for (const Piece& piece : bucket.pieces) {
    const UpdateRule& rule = bucket.rules[piece.group];
    void* const momentum = piece.momentum ? piece.momentum->expected() : nullptr;
    if (!piece.is_used) {
      if (momentum && rule.idle_scale != 1)
        reduce(bucket.weight, Op::kAvg, rule.idle_scale,
               {&momentum, 1, &momentum, 1, piece.num_elems});
      continue;
    }
    Bytes means = means_of(bucket, piece, scale);
    void *mean = means.data(), *weight = piece.weight.expected();
    sgd(bucket.weight, rule.scalars, 1.0, {&mean, 1, &weight, 1, momentum, piece.num_elems, false});
    if (piece.copy)
      convert(bucket.weight, weight, bucket.gradient, piece.copy->expected(), piece.num_elems);
    if (zero_gradients && piece.num_elems > 0)
      std::memset(piece.gradient.expected(), 0, piece.num_elems * size_of(bucket.gradient));
  }
}

void check_bits(const Bucket& bucket) {
  for (const Piece& piece : bucket.pieces) {
    piece.weight.check();
    piece.gradient.check();
    if (piece.momentum) piece.momentum->check();
    if (piece.copy) piece.copy->check();
  }
}

void check_found(const Found& expected, float found_inf, double sum_squares, double before) {
  CHECK((found_inf != 0) == expected.nonfinite);
  const double want = before + expected.sum_squares;
  if (std::isfinite(want))
    CHECK(std::abs(sum_squares - want) <= 1e-12 * want);
  else
    CHECK(!std::isfinite(sum_squares));
}

void check_update(DType gradient, DType weight, Random& random) {
  Bucket bucket = random_bucket(gradient, weight, random);
  const UpdateTable table = table_of(bucket, random.chunk_elems());
  const Image image(table.image());
  const float loss_scale = 1024;
  const double clip = 0.37;
  const float found_inf = random.one_in(6) ? std::numeric_limits<float>::quiet_NaN() : 0;
  const uint32_t aborted = random.one_in(6);
  float new_found_inf = 0;
  double sum_squares = 5;
  UpdateCall call{image.get()};
  call.flags = bucket.flags.empty() ? nullptr : bucket.flags.data();
  call.rules = bucket.rules.data();
  call.num_rules = bucket.rules.size();
  call.scale = random.one_in(3) ? 1 : 1.0 / 3;
  double scale = call.scale;
  if (random.one_in(2)) call.loss_scale = &loss_scale, scale *= 1.0 / loss_scale;
  if (random.one_in(2)) call.clip = &clip, scale *= clip;
  call.zero_gradients = random.one_in(2);
  if (random.one_in(2)) call.gate.found_inf = &found_inf;
  if (random.one_in(2)) call.gate.aborted = &aborted;
  if (random.one_in(2)) call.findings = {&new_found_inf, &sum_squares};
  const bool is_open = (!call.gate.found_inf || found_inf == 0) && (!call.gate.aborted || !aborted);
  const bool looks = call.findings.found_inf && table.num_chunks() > 0;

  const Found expected = look_on_cpu(bucket, scale);
  cuda_twin().update(table, call, {nullptr, random.max_blocks()});
  if (is_open) update_on_cpu(bucket, scale, call.zero_gradients);
  check_bits(bucket);
  check_found(is_open && looks ? expected : Found{}, new_found_inf, sum_squares, 5);
}

void check_inspect(DType gradient, DType weight, Random& random) {
  Bucket bucket = random_bucket(gradient, weight, random);
  const UpdateTable table = table_of(bucket, random.chunk_elems());
  const Image image(table.image());
  float found_inf = 0;
  double first = 0, second = 0;
  UpdateCall call{image.get()};
  call.flags = bucket.flags.empty() ? nullptr : bucket.flags.data();
  call.scale = 0.5;
  call.findings = {&found_inf, &first};
  cuda_twin().inspect(table, call, {nullptr, 1 + random.max_blocks()});
  check_bits(bucket);
  check_found(look_on_cpu(bucket, 0.5), found_inf, first, 0);
  // The bits of the sum do not depend on the grid.
  call.findings.sum_squares = &second;
  cuda_twin().inspect(table, call, {nullptr, 1 + random.max_blocks()});
  CHECK(std::memcmp(&first, &second, sizeof first) == 0 || first != first);
}

// ---- single cases ----

void check_refusals() {
  const auto update_table = [](DType gradient, DType weight, TablePiece piece) {
    error_of<UsageError>([&] { UpdateTable(gradient, weight, {piece}); });
  };
  update_table(DType::kFloat32, DType::kBFloat16, {0, 0, 0, kNoSpan, 1, 0});
  update_table(DType::kInt32, DType::kInt32, {0, 0, 0, kNoSpan, 1, 0});
  update_table(DType::kFloat32, DType::kFloat32, {0, 0, 0, 0, 1, 0});        // a copy
  update_table(DType::kFloat32, DType::kFloat32, {2, 0, 0, kNoSpan, 1, 0});  // half an element
  error_of<UsageError>([] { SpanTable(DType::kFloat16, DType::kBFloat16, {}); });
  error_of<UsageError>([] { SpanTable(DType::kFloat32, DType::kFloat64, {}); });

  const UpdateTable table(DType::kFloat32, DType::kFloat32, {{0, 0, 0, kNoSpan, 1, 2}});
  const Image image(table.image());
  const UpdateRule rules[3] = {};
  UpdateCall call{image.get()};
  call.rules = rules;
  call.num_rules = 2;  // of 3 groups
  error_of<UsageError>([&] { cuda_twin().update(table, call, {}); });
  call.num_rules = 3;
  call.weights = static_cast<char*>(image.get()) + 4;
  error_of<UsageError>([&] { cuda_twin().update(table, call, {}); });
  error_of<UsageError>([&] { cuda_twin().inspect(table, {image.get()}, {}); });
  const void* const sources[kMaxCudaSpans + 1] = {};
  error_of<UsageError>([&] {
    cuda_twin().reduce(DType::kFloat32, 1, {sources, kMaxCudaSpans + 1, nullptr, 0, 1}, {});
  });
  error_of<UsageError>([] { cuda_twin().copy(nullptr, nullptr, 3, {}); });
}

// Chunks lie end to end, whole accesses long, and know how far they are from a boundary.
void check_chunks() {
  for (const uint64_t address : {0, 4, 8, 64}) {
    const SpanTable table(DType::kFloat32, DType::kFloat32, {{address, address + 160, 1003}}, 99);
    CHECK(table.num_chunks() == 11);  // of 100
    std::vector<SpanChunk> chunks(table.num_chunks());
    std::memcpy(chunks.data(), table.image().data(), table.image().size());
    for (size_t i = 0; i < chunks.size(); ++i) {
      CHECK(chunks[i].source == address + i * 400);
      CHECK(chunks[i].destination == address + 160 + i * 400);
      CHECK(chunks[i].num_elems == (i < 10 ? 100 : 3));
      CHECK(chunks[i].head == std::min<size_t>((16 - address % 16) % 16 / 4, chunks[i].num_elems));
    }
  }
  const SpanTable skewed(DType::kFloat32, DType::kFloat32, {{0, 4, 150}}, 100);
  std::vector<SpanChunk> chunks(2);
  std::memcpy(chunks.data(), skewed.image().data(), skewed.image().size());
  CHECK(chunks[0].head == 100 && chunks[1].head == 50);  // no access is wide
}

}  // namespace

int main() {
  give_up_after(250);
  check_refusals();
  check_chunks();
  const uint64_t num_seeds = std::getenv("EMULATED") ? 20 : 300;
  for (uint64_t seed = 0; seed < num_seeds; ++seed) {
    Random random(seed);
    check_copy(random);
    check_reduce(kFloats[random.below(4)], random);
    const auto [from, to] = kCasts[random.below(std::size(kCasts))];
    check_cast(from, to, random);
    for (const auto& [gradient, weight] : kGradientAndWeight) {
      check_update(gradient, weight, random);
      check_inspect(gradient, weight, random);
    }
  }
}
