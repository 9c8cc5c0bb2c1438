// The floor beside every all-reduce figure: the bytes that an in-place all-reduce (average) on one
// host must move, moved by a plain loop, and nothing else. p processes, buffers in shared memory;
// each sums its shard of all buffers and writes it to all of them. Prints the seconds of each
// round, one a line.
//   g++ -O3 -march=native -std=c++20 floor.cpp -o floor && ./floor RANKS BYTES ROUNDS
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <sched.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

namespace {

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Barrier {
  std::atomic<long> arrived{0};
  void wait(int ranks, long& phase, bool may_spin) {
    const long target = ++phase * ranks;
    arrived.fetch_add(1, std::memory_order_acq_rel);
    for (int spins = 0; arrived.load(std::memory_order_acquire) < target; ++spins)
      if (!may_spin || spins > 100'000) sched_yield();
  }
};

// Compile-time number of buffers: the loop that the compiler vectorises best.
template <int kRanks>
void average(float* const* buffers, size_t begin, size_t end) {
  float* __restrict__ at[kRanks];
  for (int r = 0; r < kRanks; ++r) at[r] = buffers[r];
  constexpr float kScale = 1.0f / kRanks;
  for (size_t i = begin; i < end; i += 16) {
    float sum[16];
    for (int k = 0; k < 16; ++k) sum[k] = at[0][i + k];
    for (int r = 1; r < kRanks; ++r)
      for (int k = 0; k < 16; ++k) sum[k] += at[r][i + k];
    for (int r = 0; r < kRanks; ++r)
      for (int k = 0; k < 16; ++k) at[r][i + k] = sum[k] * kScale;
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return std::fprintf(stderr, "usage: %s RANKS BYTES ROUNDS\n", argv[0]), 2;
  const int ranks = std::atoi(argv[1]), rounds = std::atoi(argv[3]);
  const size_t n = std::strtoul(argv[2], nullptr, 10) / 64 * 16;
  if (ranks != 2 && ranks != 4) return std::fprintf(stderr, "RANKS is 2 or 4\n"), 2;
  void* shared = mmap(nullptr, 4096 + ranks * n * sizeof(float), PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) return std::perror("mmap"), 1;
  auto& barrier = *new (shared) Barrier;
  std::vector<float*> buffers;
  for (int r = 0; r < ranks; ++r)
    buffers.push_back(reinterpret_cast<float*>(static_cast<char*>(shared) + 4096) + r * n);
  int rank = 0;
  for (int r = 1; r < ranks && rank == 0; ++r)
    if (fork() == 0) rank = r;
  const bool may_spin = ranks <= sysconf(_SC_NPROCESSORS_ONLN);
  const size_t begin = n / 16 * rank / ranks * 16, end = n / 16 * (rank + 1) / ranks * 16;
  long phase = 0;
  for (int round = 0; round < rounds; ++round) {
    for (size_t i = 0; i < n; ++i) buffers[rank][i] = static_cast<float>(rank + 1);
    barrier.wait(ranks, phase, may_spin);
    const double start = now_s();
    barrier.wait(ranks, phase,
                 may_spin);  // an all-reduce in place waits twice: for all data, for all results
    if (ranks == 2)
      average<2>(buffers.data(), begin, end);
    else
      average<4>(buffers.data(), begin, end);
    barrier.wait(ranks, phase, may_spin);
    if (rank == 0) std::printf("%.9f\n", now_s() - start);
    if (n && buffers[rank][n - 1] != (ranks + 1) / 2.0f) return 1;
    barrier.wait(ranks, phase, may_spin);
  }
  if (rank) _exit(0);
  int status = 0;
  bool failed = false;
  while (wait(&status) > 0) failed |= status != 0;
  return failed;
}
