// What a fingerprint costs per call: making one, and comparing it with those that the other ranks
// wrote. Prints the seconds per call of SAMPLES batches of 1000 calls among RANKS ranks, one a
// line.
#include "group/fingerprint.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr int kCalls = 1000;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The compiler must assume that this memory has been read and written, as by another rank.
void touch(void* memory) { asm volatile("" : : "g"(memory) : "memory"); }

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return std::fprintf(stderr, "usage: %s RANKS SAMPLES\n", argv[0]), 2;
  const auto ranks = static_cast<size_t>(std::atoi(argv[1]));
  std::vector<pyar::Fingerprint> by_rank(ranks);  // ours is the first
  pyar::Call call{
      .sequence = 0, .layout = 7, .deadline = pyar::Deadline(60), .patience = pyar::kSpinFirst};
  const auto make = [&] {
    return pyar::fingerprint(pyar::Kind::kAllReduce, 1024, pyar::DType::kFloat32,
                             static_cast<uint32_t>(pyar::Op::kSum), pyar::kNoRoot, call);
  };
  std::fill(by_rank.begin(), by_rank.end(), make());
  long disagreements = 0;
  for (int sample = -1; sample < std::atoi(argv[2]); ++sample) {
    const double start = now();
    for (int i = 0; i < kCalls; ++i) {
      touch(&call);
      by_rank[0] = make();
      touch(by_rank.data());
      for (const pyar::Fingerprint& theirs : by_rank) disagreements += theirs != by_rank[0];
      touch(&disagreements);
    }
    if (sample >= 0) std::printf("%.12f\n", (now() - start) / kCalls);
  }
  return disagreements != 0;
}
