// What the floor programs share: ranks as forked processes around one shared arena, a barrier,
// fresh data for every round and its check, and a command loop.
//
// A program measures on command: a line "ROUNDS COLD FIRST METHOD" on its standard input makes
// every rank run ROUNDS rounds of the METHOD (counted from 0; most programs have one); the answer
// is one line a round, the seconds of the slowest rank and of rank 0, then "wrong K", the number of
// elements that did not hold what they should. Between commands all ranks are blocked in a read, so
// that others can measure.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <sched.h>
#include <span>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

namespace floors {

constexpr int kMaxRanks = 4;
constexpr int kMaxRounds = 4096;
constexpr size_t kElemsPerLine = 16;  // float32 in 64 bytes

// What the machine has: g++ 12 takes wider vector types through the stack.
#if defined(__AVX512F__)
typedef float Vector __attribute__((vector_size(64)));
#elif defined(__AVX__)
typedef float Vector __attribute__((vector_size(32)));
#else
typedef float Vector __attribute__((vector_size(16)));
#endif
constexpr size_t kElemsPerVector = sizeof(Vector) / sizeof(float);

inline Vector& vector_at(float* p) { return *reinterpret_cast<Vector*>(p); }

inline double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

[[noreturn]] inline void fail(const char* what) {
  std::perror(what);
  std::exit(1);
}

// Zeroed pages; `shared` by the forked ranks, or private, as an ordinary allocation gives a tensor.
inline void* map(size_t bytes, bool shared) {
  void* at = mmap(nullptr, std::max<size_t>(bytes, 1), PROT_READ | PROT_WRITE,
                  (shared ? MAP_SHARED : MAP_PRIVATE) | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) fail("mmap");
  return at;
}

inline float* map_floats(size_t count, bool shared) {
  return static_cast<float*>(map(count * sizeof(float), shared));
}

// A shard of `count` elements in whole cache lines.
struct Shard {
  size_t begin, end;
};
inline Shard shard_of(size_t count, int rank, int ranks) {
  const size_t lines = count / kElemsPerLine, r = static_cast<size_t>(rank),
               p = static_cast<size_t>(ranks);
  return {lines * r / p * kElemsPerLine, lines * (r + 1) / p * kElemsPerLine};
}

// Whole numbers, so that sums are exact, that differ in every round, rank and tile. The length of a
// tile is prime: data in the wrong place never look right. A tile stays in the second-level cache:
// writing the pattern costs what writing any gradient costs.
class Pattern {
 public:
  static constexpr size_t kTile = 16381;

  explicit Pattern(int ranks) : ranks_(ranks) {
    uint32_t state = 2463534242;
    for (int r = 0; r < ranks; ++r) {
      tiles_[r].resize(kTile);
      for (float& value : tiles_[r]) {
        state ^= state << 13, state ^= state >> 17, state ^= state << 5;
        value = static_cast<float>(state % 65536) - 32768.0f;
      }
    }
    sums_.assign(kTile, 0.0f);
    for (int r = 0; r < ranks; ++r)
      for (size_t i = 0; i < kTile; ++i) sums_[i] += tiles_[r][i];
  }

  void write(float* to, size_t count, int rank, long round) const {
    for_tiles(count, [&](size_t begin, size_t length, size_t tile) {
      const float offset = offset_of(rank, round, tile);
      for (size_t i = 0; i < length; ++i) to[begin + i] = tiles_[rank][i] + offset;
    });
  }

  // Calls check(index, sum of what all ranks wrote there) for every element; counts the false.
  template <typename Check>
  long count_wrong(size_t count, long round, Check check) const {
    long wrong = 0;
    for_tiles(count, [&](size_t begin, size_t length, size_t tile) {
      float offset = 0.0f;
      for (int r = 0; r < ranks_; ++r) offset += offset_of(r, round, tile);
      for (size_t i = 0; i < length; ++i) wrong += !check(begin + i, sums_[i] + offset);
    });
    return wrong;
  }

 private:
  template <typename Body>
  static void for_tiles(size_t count, Body body) {
    for (size_t begin = 0, tile = 0; begin < count; begin += kTile, ++tile)
      body(begin, std::min(kTile, count - begin), tile);
  }
  static float offset_of(int rank, long round, size_t tile) {
    return static_cast<float>((round * 7919 + rank * 104729 + static_cast<long>(tile) * 31) % 1021);
  }

  int ranks_;
  std::array<std::vector<float>, kMaxRanks> tiles_;
  std::vector<float> sums_;
};

struct Command {
  int rounds = 0, cold = 0;
  long first = 0;
  int method = 0;
};

class Host {
 public:
  explicit Host(int ranks)
      : ranks_(ranks),
        may_spin_(ranks <= sysconf(_SC_NPROCESSORS_ONLN)),
        state_(*new (map(sizeof(State), true)) State) {
    if (ranks < 2 || ranks > kMaxRanks) std::fprintf(stderr, "RANKS is 2 to 4\n"), std::exit(2);
  }

  int ranks() const { return ranks_; }
  int rank() const { return rank_; }
  pid_t pid_of(int rank) const { return state_.pids[rank]; }

  // From here on there are `ranks` processes.
  void fork_ranks() {
    for (int r = 1; r < ranks_; ++r) {
      int ends[2];
      if (pipe(ends) != 0) fail("pipe");
      const pid_t child = fork();
      if (child < 0) fail("fork");
      if (child == 0) {
        for (const int other : wakers_) close(other);
        close(ends[1]);
        rank_ = r, inbox_ = ends[0];
        break;
      }
      close(ends[0]);
      wakers_.push_back(ends[1]);
    }
    state_.pids[rank_] = getpid();
    barrier();
  }

  // While no rank waits for a core it may spin, which costs 0.1 us; with more ranks than cores it
  // must hand its core to the rank that it waits for.
  void barrier() {
    const long target = ++phase_ * ranks_;
    state_.arrived.fetch_add(1, std::memory_order_acq_rel);
    for (int spins = 0; state_.arrived.load(std::memory_order_acquire) < target; ++spins)
      if (may_spin_ && spins < 100'000)
        pause();
      else
        sched_yield();
  }

  // rewrite(round) fills this rank's data; timed(method) is what is measured; wrong(round) checks
  // all of it.
  template <typename Rewrite, typename Timed, typename Wrong>
  int serve(size_t evict_bytes, Rewrite rewrite, Timed timed, Wrong wrong) {
    std::vector<char> evict(evict_bytes);
    Command command;
    while (next(command)) {
      for (int i = 0; i < command.rounds; ++i) {
        rewrite(command.first + i);
        // Dirty lines of its own for the whole last-level cache: the data are in memory then.
        if (command.cold)
          for (size_t at = 0; at < evict_bytes; at += 64)
            evict[at] = static_cast<char>(evict[at] + 1);
        barrier();
        const double start = now_s();
        timed(command.method);
        state_.seconds[rank_][i] = now_s() - start;
        barrier();  // else who returned first checks its sums on the core that others return on
        state_.wrong.fetch_add(wrong(command.first + i), std::memory_order_relaxed);
        barrier();
      }
      if (rank_ == 0) answer(command);
    }
    return finish();
  }

 private:
  struct State {
    std::atomic<long> arrived{0};
    alignas(64) std::atomic<long> wrong{0};
    Command command;
    pid_t pids[kMaxRanks];
    double seconds[kMaxRanks][kMaxRounds];
  };

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  bool next(Command& command) {
    char byte = 0;
    if (rank_ != 0) {
      if (read(inbox_, &byte, 1) != 1) return false;
      command = state_.command;
      return true;
    }
    std::array<char, 128> text;
    if (!std::fgets(text.data(), text.size(), stdin)) return false;
    const int read = std::sscanf(text.data(), "%d %d %ld %d", &command.rounds, &command.cold,
                                 &command.first, &command.method);
    if (read != 4 || command.rounds < 0 || command.rounds > kMaxRounds)
      std::fprintf(stderr, "expected ROUNDS COLD FIRST METHOD, got %s", text.data()), std::exit(2);
    state_.command = command;
    for (const int waker : wakers_)
      if (write(waker, &byte, 1) != 1) fail("write");
    return true;
  }

  void answer(const Command& command) {
    for (int i = 0; i < command.rounds; ++i) {
      double slowest = 0.0;
      for (int r = 0; r < ranks_; ++r) slowest = std::max(slowest, state_.seconds[r][i]);
      std::printf("%.9f %.9f\n", slowest, state_.seconds[0][i]);
    }
    std::printf("wrong %ld\n", state_.wrong.exchange(0));
    std::fflush(stdout);
  }

  int finish() {
    if (rank_ != 0) _exit(0);
    for (const int waker : wakers_) close(waker);
    int status = 0;
    bool failed = false;
    while (wait(&status) > 0) failed |= status != 0;
    return failed;
  }

  int ranks_, rank_ = 0, inbox_ = -1;
  bool may_spin_;
  long phase_ = 0;
  State& state_;
  std::vector<int> wakers_;
};

// RANKS BYTES [MODE] EVICT_BYTES
struct Arguments {
  int ranks;
  size_t count;  // float32 elements, in whole cache lines
  const char* mode;
  size_t evict_bytes;

  Arguments(int argc, char** argv, const char* modes) {
    if (argc != 5)
      std::fprintf(stderr, "usage: %s RANKS BYTES MODE EVICT_BYTES; MODE: %s\n", argv[0], modes),
          std::exit(2);
    ranks = std::atoi(argv[1]);
    count = std::strtoul(argv[2], nullptr, 10) / (kElemsPerLine * sizeof(float)) * kElemsPerLine;
    mode = argv[3];
    evict_bytes = std::strtoul(argv[4], nullptr, 10);
  }
  bool is(const char* name) const { return std::strcmp(mode, name) == 0; }
  int refuse() const { return std::fprintf(stderr, "unknown MODE %s\n", mode), 2; }
};

}  // namespace floors
