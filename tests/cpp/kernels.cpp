// The bits of every kernel on any input, as one line per kernel: all instruction sets of a machine
// must agree, and two machines are compared by what this prints (make arm64).
#include "kernels/kernels.h"

#include <cinttypes>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "random_elems.h"

using namespace pyar;
using namespace pyar::test;

namespace {

constexpr DType kDTypes[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16,
                             DType::kInt64,   DType::kInt32,   DType::kUInt8};
constexpr Op kOps[] = {Op::kSum, Op::kAvg, Op::kProd, Op::kMin, Op::kMax};
constexpr size_t kLengths[] = {1, 3, 15, 64, 257, 1003};  // blocks, vectors, tails

class Digest {  // FNV-1a
 public:
  void add(const void* data, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i)
      hash_ = (hash_ ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001b3u;
  }
  void add(const Bytes& bytes) { add(bytes.data(), bytes.size()); }
  uint64_t value() const { return hash_; }

 private:
  uint64_t hash_ = 0xcbf29ce484222325u;
};

// One kernel on all lengths, tame and wild; `run` gets three inputs and adds what comes out.
template <typename Run>
void each_case(DType dtype, Digest& digest, Run run) {
  Bits bits(1 + static_cast<uint64_t>(dtype));
  for (const bool tame : {true, false})
    for (const size_t num_elems : kLengths) {
      std::vector<Bytes> inputs;
      for (int k = 0; k < 3; ++k) inputs.push_back(random_elems(dtype, num_elems, bits, tame));
      run(num_elems, inputs, digest);
    }
}

void add_nonfinite(Digest& digest, const NonFinite& found) {
  const uint64_t words[] = {found.elem, found.source};
  digest.add(words, sizeof words);
}

uint64_t digest_of_reduce(DType dtype, Op op, const KernelTable* table) {
  Digest digest;
  each_case(dtype, digest, [&](size_t num_elems, std::vector<Bytes>& inputs, Digest& out) {
    const void* const sources[] = {inputs[0].data(), inputs[1].data(), inputs[2].data()};
    Bytes first(inputs[0].size()), second(inputs[0].size());
    void* const destinations[] = {first.data(), second.data()};
    NonFinite found;
    reduce(dtype, op, 1.0 / 3, {sources, 3, destinations, 2, num_elems, &found}, table);
    CHECK(first == second);
    out.add(first);
    add_nonfinite(out, found);
  });
  return digest.value();
}

uint64_t digest_of_sum_squares(DType dtype, const KernelTable* table) {
  Digest digest;
  each_case(dtype, digest, [&](size_t num_elems, std::vector<Bytes>& inputs, Digest& out) {
    double sum = sum_squares(dtype, inputs[0].data(), num_elems, table);
    if (sum != sum) sum = -1;  // which NaN it is, nobody promises: the sum is not stored in tensors
    out.add(&sum, sizeof sum);
  });
  return digest.value();
}

uint64_t digest_of_convert(DType narrow, bool widens, const KernelTable* table) {
  Digest digest;
  const DType from = widens ? narrow : DType::kFloat32, to = widens ? DType::kFloat32 : narrow;
  each_case(from, digest, [&](size_t num_elems, std::vector<Bytes>& inputs, Digest& out) {
    Bytes result(num_elems * size_of(to));
    convert(from, inputs[0].data(), to, result.data(), num_elems, table);
    out.add(result);
  });
  return digest.value();
}

uint64_t digest_of_sgd(DType dtype, bool has_momentum, bool nesterov, const KernelTable* table) {
  Digest digest;
  const SgdScalars scalars{.decay = 1e-4,
                           .history = 0.9,
                           .gain = 0.1,
                           .momentum = 0.9,
                           .rate = 0.3,
                           .nesterov = nesterov};
  each_case(dtype, digest, [&](size_t num_elems, std::vector<Bytes>& inputs, Digest& out) {
    Bytes other = inputs[1];
    void* const gradients[] = {inputs[0].data(), other.data()};
    void* const weights = inputs[1].data();
    NonFinite found;
    sgd(dtype, scalars, 0.5,
        {.gradients = gradients,
         .num_gradients = 2,
         .weights = &weights,
         .num_weights = 1,
         .momentum = has_momentum ? inputs[2].data() : nullptr,
         .num_elems = num_elems,
         .zero_gradients = true,
         .nonfinite = &found},
        table);
    for (const Bytes& bytes : inputs) out.add(bytes);
    add_nonfinite(out, found);
  });
  return digest.value();
}

// Prints the digest, once all instruction sets agree on it.
template <typename DigestWith>
void print(const char* kernel, const char* variant, DType dtype, DigestWith digest_with) {
  const uint64_t expected = digest_with(table_for("baseline"));
  for (const std::string_view isa : isas()) {
    if (digest_with(table_for(isa)) == expected) continue;
    fail(__FILE__, __LINE__,
         std::string(kernel) + " " + variant + " of " + name_of(dtype) + ": other bits with " +
             std::string(isa));
  }
  std::printf("%-12s %-9s %-9s %016" PRIx64 "\n", kernel, variant, name_of(dtype), expected);
}

}  // namespace

int main() {
  give_up_after(120);
  for (const DType dtype : kDTypes) {
    for (const Op op : kOps)
      if (is_floating(dtype) || op != Op::kAvg)
        print("reduce", name_of(op), dtype,
              [&](const KernelTable* table) { return digest_of_reduce(dtype, op, table); });
    if (!is_floating(dtype)) continue;
    print("sum_squares", "", dtype,
          [&](const KernelTable* table) { return digest_of_sum_squares(dtype, table); });
    for (const bool widens : {true, false})
      if (size_of(dtype) == 2)
        print("convert", widens ? "widen" : "narrow", dtype,
              [&](const KernelTable* table) { return digest_of_convert(dtype, widens, table); });
    print("sgd", "plain", dtype,
          [&](const KernelTable* table) { return digest_of_sgd(dtype, false, false, table); });
    print("sgd", "momentum", dtype,
          [&](const KernelTable* table) { return digest_of_sgd(dtype, true, false, table); });
    print("sgd", "nesterov", dtype,
          [&](const KernelTable* table) { return digest_of_sgd(dtype, true, true, table); });
  }
}
