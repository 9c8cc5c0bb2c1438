// The NCCL of the mock. The ranks of a communicator meet in a file named after the unique id, which
// is gone as soon as all have come. As with the real one, a dead or silent peer is not noticed: a
// collective waits until its communicator is aborted.
#include <atomic>
#include <cstring>
#include <fcntl.h>
#include <memory>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include "base/dtype.h"
#include "faults.h"
#include "mock.h"

using namespace mock;
using pyar::BFloat16;
using pyar::Float16;

namespace {

constexpr int kSuccess = 0, kInvalidArgument = 4, kInProgress = 7;
constexpr size_t kSlotBytes = size_t{1} << 16;
constexpr int kMaxRanks = 64;

struct UniqueId {
  char name[128];
};

// Of all ranks of a communicator; lock-free, for they may be processes.
struct Barrier {
  std::atomic<unsigned> arrived, generation;
};
struct Board {
  std::atomic<int> attached;
  Barrier of_streams, of_splits;
  struct Wish {
    int color, key;
  } wishes[kMaxRanks];
  char* slot(int rank) {
    return reinterpret_cast<char*>(this + 1) + static_cast<size_t>(rank) * kSlotBytes;
  }
};

class Comm {
 public:
  Comm(const std::string& name, int size, int rank) : name_(name), size_(size), rank_(rank) {}
  ~Comm() {
    if (board_) munmap(board_, bytes());
  }

  int rank() const { return rank_; }
  int size() const { return size_; }
  const std::string& name() const { return name_; }
  Board& board() { return *board_; }
  std::atomic<int> state{kInProgress};
  std::atomic<bool> aborted{false};
  int num_splits = 0;

  // Waits for all ranks to attach; false if that was given up.
  bool attach() {
    const std::string path = this->path();
    const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, static_cast<off_t>(bytes())) != 0) return false;
    void* const memory = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (memory == MAP_FAILED) return false;
    board_ = static_cast<Board*>(memory);
    ++board_->attached;
    while (board_->attached < size_ && !aborted) sleep_s(2e-4);
    unlink(path.c_str());
    return !aborted;
  }

  // False once the communicator has been aborted.
  bool meet(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == static_cast<unsigned>(size_)) {
      barrier.arrived = 0;
      ++barrier.generation;
    }
    while (barrier.generation == generation) {
      if (aborted) return false;
      sleep_s(5e-5);
    }
    return !aborted;
  }

 private:
  size_t bytes() const { return sizeof(Board) + static_cast<size_t>(size_) * kSlotBytes; }
  std::string path() const {
    const char* const folder = getenv("TMPDIR");
    return std::string(folder ? folder : "/tmp") + "/" + name_;
  }

  const std::string name_;
  const int size_, rank_;
  Board* board_ = nullptr;
};
using CommPtr = std::shared_ptr<Comm>;

CommPtr& comm_of(void* handle) { return *static_cast<CommPtr*>(handle); }

int finish(Comm& comm, bool well) { return comm.state = well ? kSuccess : kInvalidArgument; }

// --- reductions ---

template <typename T>
struct Wide {
  using type = T;
};
template <>
struct Wide<BFloat16> {
  using type = float;
};
template <>
struct Wide<Float16> {
  using type = float;
};

template <typename T>
void combine(char* into, const char* from, size_t count, int op) {
  using W = typename Wide<T>::type;
  for (size_t i = 0; i < count; ++i) {
    T values[2];
    std::memcpy(&values[0], into + i * sizeof(T), sizeof(T));
    std::memcpy(&values[1], from + i * sizeof(T), sizeof(T));
    const W a(values[0]), b(values[1]);
    const T result(static_cast<W>(op == 0   ? a + b
                                  : op == 1 ? a * b
                                  : op == 2 ? (a > b ? a : b)
                                            : (a < b ? a : b)));
    std::memcpy(into + i * sizeof(T), &result, sizeof(T));
  }
}

struct DTypeEntry {
  size_t bytes;
  void (*combine)(char*, const char*, size_t, int);
};
template <typename T>
constexpr DTypeEntry kEntry{sizeof(T), &combine<T>};

const DTypeEntry* entry_of(int dtype) {
  switch (dtype) {
    case 1:
      return &kEntry<uint8_t>;
    case 2:
      return &kEntry<int32_t>;
    case 4:
      return &kEntry<int64_t>;
    case 6:
      return &kEntry<Float16>;
    case 7:
      return &kEntry<float>;
    case 8:
      return &kEntry<double>;
    case 9:
      return &kEntry<BFloat16>;
    default:
      return nullptr;
  }
}

// --- collectives, on the thread of a stream ---

// Pieces that fit a slot: each rank puts something into its own, then all look.
template <typename Put, typename Look>
void in_pieces(Comm& comm, size_t total_bytes, Put put, Look look) {
  for (size_t begin = 0; begin < total_bytes; begin += kSlotBytes) {
    const size_t bytes = std::min(kSlotBytes, total_bytes - begin);
    put(begin, bytes);
    if (!comm.meet(comm.board().of_streams)) return;
    look(begin, bytes);
    if (!comm.meet(comm.board().of_streams)) return;
  }
}

void reduce_into(Comm& comm, const DTypeEntry& dtype, int op, char* to, size_t bytes) {
  std::memcpy(to, comm.board().slot(0), bytes);
  for (int r = 1; r < comm.size(); ++r)
    dtype.combine(to, comm.board().slot(r), bytes / dtype.bytes, op);
}

template <typename Body>
int collective(const char* function, void* handle, void* stream, Body body) {
  const CommPtr comm = comm_of(handle);
  if (const int ordered = entered(function, comm->rank())) {
    while (ordered == MockControl::kStalls && !comm->aborted) sleep_s(2e-4);
    return ordered == MockControl::kStalls ? kInvalidArgument : ordered;
  }
  if (comm->state != kSuccess) return kInvalidArgument;  // its init is not over
  const bool hangs = is_to_hang(comm->rank());
  auto work = [comm, hangs, body] {
    while (hangs && !comm->aborted) sleep_s(2e-4);
    if (!comm->aborted) body(*comm);
  };
  if (!is_lazy()) {
    enqueue(stream, std::move(work));
    return kSuccess;
  }
  comm->state = kInProgress;
  std::thread([comm, stream, work = std::move(work)] {
    sleep_s(5e-3);
    enqueue(stream, work);
    comm->state = kSuccess;
  }).detach();
  return kInProgress;
}

// --- communicators ---

struct Config {
  size_t size;
  unsigned magic, version;
  int blocking;
};

// `begin` on a thread of its own unless the communicator blocks.
template <typename Begin>
int start(const Config* config, Begin begin) {
  if (config && (config->magic != 0xcafebeef || config->size < 44)) return kInvalidArgument;
  std::thread worker(begin);
  if (config && config->blocking == 0) {
    worker.detach();
    return kInProgress;
  }
  worker.join();
  return kSuccess;
}

}  // namespace

MOCK_EXPORT int ncclGetVersion(int* number) {
  if (const int ordered = entered("ncclGetVersion")) return ordered;
  *number = version();
  return kSuccess;
}
MOCK_EXPORT const char* ncclGetErrorString(int status) {
  return status == 6 ? "remote process exited or there was a network error" : "a mocked NCCL error";
}
MOCK_EXPORT int ncclGetUniqueId(UniqueId* id) {
  if (const int ordered = entered("ncclGetUniqueId")) return ordered;
  static std::atomic<int> made{0};
  std::memset(id->name, 0, sizeof id->name);
  const std::string name = "nccl-mock-" + std::to_string(getpid()) + "-" + std::to_string(made++);
  name.copy(id->name, sizeof id->name - 1);
  return kSuccess;
}
MOCK_EXPORT int ncclCommInitRankConfig(void** handle, int size, UniqueId id, int rank,
                                       Config* config) {
  if (const int ordered = entered("ncclCommInitRankConfig", rank)) return ordered;
  if (rank < 0 || rank >= size || size > kMaxRanks) return kInvalidArgument;
  auto comm = std::make_shared<Comm>(id.name, size, rank);
  *handle = new CommPtr(comm);
  return start(config, [comm] { finish(*comm, comm->attach()); });
}
MOCK_EXPORT int ncclCommAbort(void* handle) {
  if (const int ordered = entered("ncclCommAbort", comm_of(handle)->rank())) return ordered;
  sleep_s(abort_delay_s());
  comm_of(handle)->aborted = true;
  delete &comm_of(handle);
  return kSuccess;
}
MOCK_EXPORT int ncclCommGetAsyncError(void* handle, int* status) {
  const CommPtr& comm = comm_of(handle);
  if (const int ordered = entered("ncclCommGetAsyncError", comm->rank())) return ordered;
  const int ordered = async_error(comm->rank());
  *status = ordered ? ordered : comm->state.load();
  return kSuccess;
}
MOCK_EXPORT int ncclAllReduce(const void* input, void* output, size_t count, int dtype, int op,
                              void* handle, void* stream) {
  const DTypeEntry* const entry = entry_of(dtype);
  if (!entry || op < 0 || op > 3) return kInvalidArgument;
  return collective("ncclAllReduce", handle, stream, [=](Comm& comm) {
    in_pieces(
        comm, count * entry->bytes,
        [&](size_t begin, size_t bytes) {
          std::memcpy(comm.board().slot(comm.rank()), static_cast<const char*>(input) + begin,
                      bytes);
        },
        [&](size_t begin, size_t bytes) {
          reduce_into(comm, *entry, op, static_cast<char*>(output) + begin, bytes);
        });
  });
}
MOCK_EXPORT int ncclReduceScatter(const void* input, void* output, size_t count, int dtype, int op,
                                  void* handle, void* stream) {
  const DTypeEntry* const entry = entry_of(dtype);
  if (!entry || op < 0 || op > 3) return kInvalidArgument;
  return collective("ncclReduceScatter", handle, stream, [=](Comm& comm) {
    const size_t shard_bytes = count * entry->bytes;
    for (int owner = 0; owner < comm.size(); ++owner)
      in_pieces(
          comm, shard_bytes,
          [&](size_t begin, size_t bytes) {
            const size_t at = static_cast<size_t>(owner) * shard_bytes + begin;
            std::memcpy(comm.board().slot(comm.rank()), static_cast<const char*>(input) + at,
                        bytes);
          },
          [&](size_t begin, size_t bytes) {
            if (owner == comm.rank())
              reduce_into(comm, *entry, op, static_cast<char*>(output) + begin, bytes);
          });
  });
}
MOCK_EXPORT int ncclAllGather(const void* input, void* output, size_t count, int dtype,
                              void* handle, void* stream) {
  const DTypeEntry* const entry = entry_of(dtype);
  if (!entry) return kInvalidArgument;
  return collective("ncclAllGather", handle, stream, [=](Comm& comm) {
    const size_t shard_bytes = count * entry->bytes;
    in_pieces(
        comm, shard_bytes,
        [&](size_t begin, size_t bytes) {
          std::memcpy(comm.board().slot(comm.rank()), static_cast<const char*>(input) + begin,
                      bytes);
        },
        [&](size_t begin, size_t bytes) {
          for (int r = 0; r < comm.size(); ++r)
            std::memcpy(static_cast<char*>(output) + static_cast<size_t>(r) * shard_bytes + begin,
                        comm.board().slot(r), bytes);
        });
  });
}
MOCK_EXPORT int ncclBroadcast(const void* input, void* output, size_t count, int dtype, int root,
                              void* handle, void* stream) {
  const DTypeEntry* const entry = entry_of(dtype);
  if (!entry || root < 0 || root >= comm_of(handle)->size()) return kInvalidArgument;
  return collective("ncclBroadcast", handle, stream, [=](Comm& comm) {
    in_pieces(
        comm, count * entry->bytes,
        [&](size_t begin, size_t bytes) {
          if (comm.rank() == root)
            std::memcpy(comm.board().slot(root), static_cast<const char*>(input) + begin, bytes);
        },
        [&](size_t begin, size_t bytes) {
          std::memcpy(static_cast<char*>(output) + begin, comm.board().slot(root), bytes);
        });
  });
}

#ifndef MOCK_WITHOUT_OPTIONAL

MOCK_EXPORT const char* ncclGetLastError(void*) { return "the mock's last words"; }

// As in NCCL 2.23 the new handle is there once the parent is done with the split; then the new
// communicator is being made.
MOCK_EXPORT int ncclCommSplit(void* handle, int color, int key, void** new_handle, Config* config) {
  const CommPtr parent = comm_of(handle);
  if (const int ordered = entered("ncclCommSplit", parent->rank())) return ordered;
  parent->state = kInProgress;
  const int status = start(config, [parent, color, key, new_handle] {
    Board& board = parent->board();
    const int index = parent->num_splits++;
    board.wishes[parent->rank()] = {color, key};
    if (!parent->meet(board.of_splits)) return;
    int rank = 0, size = 0;
    for (int r = 0; r < parent->size(); ++r) {
      const Board::Wish& other = board.wishes[r];
      if (other.color != color) continue;
      ++size;
      rank += other.key < key || (other.key == key && r < parent->rank());
    }
    if (!parent->meet(board.of_splits)) return;
    CommPtr child;
    if (color >= 0) {
      child = std::make_shared<Comm>(
          parent->name() + "-" + std::to_string(index) + "-" + std::to_string(color), size, rank);
      *new_handle = new CommPtr(child);
    }
    parent->state = kSuccess;
    if (child) finish(*child, child->attach());
  });
  return status;
}
MOCK_EXPORT int ncclMemAlloc(void** memory, size_t bytes) {
  if (const int ordered = entered("ncclMemAlloc")) return ordered;
  *memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  return *memory ? kSuccess : 1;
}
MOCK_EXPORT int ncclMemFree(void* memory) {
  if (const int ordered = entered("ncclMemFree")) return ordered;
  std::free(memory);
  return kSuccess;
}
MOCK_EXPORT int ncclCommRegister(void* handle, void* memory, size_t, void** registration) {
  if (const int ordered = entered("ncclCommRegister", comm_of(handle)->rank())) return ordered;
  *registration = memory;
  return kSuccess;
}
MOCK_EXPORT int ncclCommDeregister(void* handle, void*) {
  return entered("ncclCommDeregister", comm_of(handle)->rank());
}

#endif
