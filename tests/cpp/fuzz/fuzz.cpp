// The driver: runs a corpus, then mutates it for a while and keeps every input that reaches code,
// or a number of repetitions, that none before has reached.
//   TARGET CORPUS [SECONDS [SEED]]    fuzz; with KEEP=1 inputs that reach new code join the folder
//   TARGET FILE                       runs one input: to look at a failure
// An input that breaks something is left in the file TARGET.failed.
#include "fuzz.h"

#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <random>
#include <stdexcept>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

namespace {

namespace fs = std::filesystem;
using Bytes = std::vector<uint8_t>;

// How often each edge of the control flow was taken by the present input. Threads of a target may
// lose counts to each other; a hint is all that is needed.
constexpr size_t kEdges = size_t{1} << 16;
std::array<uint8_t, kEdges> counts;
thread_local uintptr_t previous;

// Two numbers that the code under test has compared, and that differed: putting one in the place of
// the other leads past the comparison.
struct Comparison {
  uint64_t left, right;
  uint8_t num_bytes;
};
std::array<Comparison, 256> comparisons;
size_t num_comparisons;

void note(uint64_t left, uint64_t right, uint8_t num_bytes) {
  if (left != right) comparisons[num_comparisons++ % comparisons.size()] = {left, right, num_bytes};
}

}  // namespace

// What the compiler calls from instrumented code (only csrc/ and the targets are).
extern "C" {
void __sanitizer_cov_trace_pc() {
  const auto here = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  uint8_t& count = counts[(here ^ previous) % kEdges];
  count = static_cast<uint8_t>(count + (count < 255));
  previous = here >> 1;
}
void __sanitizer_cov_trace_cmp1(uint8_t a, uint8_t b) { note(a, b, 1); }
void __sanitizer_cov_trace_cmp2(uint16_t a, uint16_t b) { note(a, b, 2); }
void __sanitizer_cov_trace_cmp4(uint32_t a, uint32_t b) { note(a, b, 4); }
void __sanitizer_cov_trace_cmp8(uint64_t a, uint64_t b) { note(a, b, 8); }
void __sanitizer_cov_trace_const_cmp1(uint8_t a, uint8_t b) { note(a, b, 1); }
void __sanitizer_cov_trace_const_cmp2(uint16_t a, uint16_t b) { note(a, b, 2); }
void __sanitizer_cov_trace_const_cmp4(uint32_t a, uint32_t b) { note(a, b, 4); }
void __sanitizer_cov_trace_const_cmp8(uint64_t a, uint64_t b) { note(a, b, 8); }
void __sanitizer_cov_trace_cmpf(float, float) {}
void __sanitizer_cov_trace_cmpd(double, double) {}
void __sanitizer_cov_trace_switch(uint64_t value, const uint64_t* cases) {
  for (uint64_t i = 0; i < cases[0]; ++i)  // cases[1]: bits of the value
    note(value, cases[2 + i], static_cast<uint8_t>(cases[1] / 8));
}
}

namespace {

// A file that always holds the present input: what a crash, or a kill, leaves behind.
class Present {
 public:
  explicit Present(std::string path) : path_(std::move(path)) {
    const int fd = open(path_.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0 || ftruncate(fd, kMaxBytes) != 0) throw std::runtime_error("cannot write " + path_);
    data_ = static_cast<uint8_t*>(mmap(nullptr, kMaxBytes, PROT_WRITE, MAP_SHARED, fd, 0));
    close(fd);
  }
  ~Present() { fs::remove(path_); }  // only if nothing broke
  void hold(const Bytes& input) {
    std::copy(input.begin(), input.end(), data_);
    std::fill(data_ + input.size(), data_ + kMaxBytes, uint8_t{0});  // as missing bytes are read
  }
  static constexpr size_t kMaxBytes = 2048;

 private:
  std::string path_;
  uint8_t* data_;
};

class Fuzzer {
 public:
  Fuzzer(const std::string& name, uint64_t seed) : present_(name + ".failed"), random_(seed) {}

  void run(const Bytes& input) {
    counts.fill(0);
    previous = 0;
    present_.hold(input);
    alarm(kHangS);
    LLVMFuzzerTestOneInput(input.data(), input.size());
    alarm(0);
    ++num_runs_;
    bool is_new = false;
    for (size_t edge = 0; edge < kEdges; ++edge) {
      if (counts[edge] == 0) continue;
      const uint8_t level = level_of(counts[edge]);
      is_new |= (seen_[edge] | level) != seen_[edge];
      num_edges_ += seen_[edge] == 0;
      seen_[edge] |= level;
    }
    if (is_new) corpus_.push_back(input);
  }

  Bytes mutant() {
    Bytes input = pick(corpus_);
    for (size_t changes = 1 + below(5); changes > 0; --changes) mutate(input);
    input.resize(std::min(input.size(), Present::kMaxBytes));
    return input;
  }

  size_t num_runs() const { return num_runs_; }
  size_t num_edges() const { return num_edges_; }
  size_t num_inputs() const { return corpus_.size(); }

 private:
  static constexpr unsigned kHangS = 20;
  static constexpr std::array<uint64_t, 11> kExtremes{
      0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fffffff, 0x80000000, ~0ull, 1ull << 63};

  // As AFL does: loops that run 5 and 6 times are alike, 5 and 9 times are not.
  static uint8_t level_of(uint8_t count) {
    if (count < 4) return static_cast<uint8_t>(1 << (count - 1));
    return count < 8 ? 8 : count < 16 ? 16 : count < 32 ? 32 : count < 128 ? 64 : 128;
  }
  size_t below(size_t limit) { return random_() % limit; }
  template <typename List>
  const typename List::value_type& pick(const List& list) {
    return list[below(list.size())];
  }

  void mutate(Bytes& input) {
    if (input.empty()) input.push_back(0);
    const size_t at = below(input.size());
    switch (below(8)) {
      case 0:
        input[at] ^= static_cast<uint8_t>(1 << below(8));
        break;
      case 1:
        input[at] = static_cast<uint8_t>(random_());
        break;
      case 2:
        overwrite(input, at, pick(kExtremes), size_t{1} << below(4));
        break;
      case 3:
        input.insert(input.begin() + ptrdiff_t(at), 1 + below(8), static_cast<uint8_t>(random_()));
        break;
      case 4:
        input.erase(input.begin() + ptrdiff_t(at),
                    input.begin() + ptrdiff_t(at + below(input.size() - at) + 1));
        break;
      case 5: {  // a piece of another one
        const Bytes& other = pick(corpus_);
        const size_t from = below(other.size() + 1);
        input.resize(at);
        input.insert(input.end(), other.begin() + ptrdiff_t(from), other.end());
        break;
      }
      default:
        satisfy_a_comparison(input, at);
    }
  }

  static void overwrite(Bytes& input, size_t at, uint64_t value, size_t num_bytes) {
    std::memcpy(&input[at], &value, std::min(num_bytes, input.size() - at));
  }

  // Looks for one side in the input and puts the other there; if it is not there, anywhere.
  void satisfy_a_comparison(Bytes& input, size_t at) {
    if (num_comparisons == 0) return;
    const size_t known = std::min(num_comparisons, comparisons.size());
    auto [left, right, num_bytes] = comparisons[below(known)];
    if (below(2)) std::swap(left, right);
    const auto* const bytes = reinterpret_cast<const uint8_t*>(&left);
    const auto place =
        std::search(input.begin() + ptrdiff_t(at), input.end(), bytes, bytes + num_bytes);
    if (place != input.end()) at = size_t(place - input.begin());
    overwrite(input, at, right, num_bytes);
  }

  Present present_;
  std::mt19937_64 random_;
  std::vector<Bytes> corpus_;
  std::array<uint8_t, kEdges> seen_{};
  size_t num_runs_ = 0, num_edges_ = 0;
};

Bytes read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

std::vector<fs::path> files_in(const fs::path& folder) {
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(folder)) files.push_back(entry.path());
  std::ranges::sort(files);
  return files;
}

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return std::fprintf(stderr, "usage: %s CORPUS|FILE [SECONDS [SEED]]\n", argv[0]), 2;
  const std::string name = fs::path(argv[0]).filename();
  const fs::path corpus(argv[1]);
  if (fs::is_regular_file(corpus)) {
    const Bytes input = read(corpus);
    return LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  const double seconds = argc > 2 ? std::atof(argv[2]) : 0;
  const uint64_t seed = argc > 3 ? std::strtoull(argv[3], nullptr, 10) : std::random_device()();
  const bool keeps = std::getenv("KEEP") != nullptr;
  std::printf("%s: seed %llu\n", name.c_str(), static_cast<unsigned long long>(seed));
  std::fflush(stdout);

  Fuzzer fuzzer(name, seed);
  fuzzer.run(Bytes());
  for (const fs::path& file : files_in(corpus)) fuzzer.run(read(file));
  const size_t known_inputs = fuzzer.num_inputs(), known_edges = fuzzer.num_edges();
  for (const double end_s = now_s() + seconds; now_s() < end_s;) {
    const Bytes input = fuzzer.mutant();
    const size_t edges = fuzzer.num_edges();
    fuzzer.run(input);
    if (keeps && fuzzer.num_edges() > edges) {
      const fs::path file =
          corpus / (std::to_string(seed) + "-" + std::to_string(fuzzer.num_runs()));
      std::ofstream(file, std::ios::binary)
          .write(reinterpret_cast<const char*>(input.data()), std::streamsize(input.size()));
    }
  }
  std::printf("%s: %zu runs in %g s, nothing broke; %zu edges and %zu inputs (corpus: %zu, %zu)\n",
              name.c_str(), fuzzer.num_runs(), seconds, fuzzer.num_edges(), fuzzer.num_inputs(),
              known_edges, known_inputs);
}
