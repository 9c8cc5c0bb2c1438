// The CUDA runtime of the mock, and the orders of the tests.
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "faults.h"
#include "mock.h"

namespace mock {
namespace {

constexpr int kSuccess = 0, kInvalidValue = 1, kInsufficientDriver = 35, kNoDevice = 100,
              kInvalidDevice = 101, kNotReady = 600, kCaptureUnsupported = 900, kRelaxed = 2;

struct Order {
  std::string function;
  int rank, calls_left, status;
};

// Never destroyed: threads of streams may outlive static destructors.
struct Orders {
  std::mutex mutex;
  std::vector<Order> orders;
  std::map<std::string, int> calls;
  std::map<int, int> async_errors;
  double delay_s = 0, abort_delay_s = 0;
  bool lazy = false, capturing = false;
  int version = 23007, num_devices = 8;
};

Orders& orders() {
  static auto& only = *new Orders;
  return only;
}

template <typename Body>
auto locked(Body body) {
  const std::lock_guard lock(orders().mutex);
  return body(orders());
}

constexpr const char* kHang = "hang";

int next_of(const char* function, int rank) {
  return locked([&](Orders& all) {
    ++all.calls[function];
    int status = kSuccess;
    for (Order& order : all.orders)
      if (order.function == function && (order.rank == MockControl::kAnyRank || order.rank == rank))
        if (--order.calls_left == 0) status = order.status;
    return status;
  });
}

class Stream {
 public:
  Stream() {
    std::thread([this] { run(); }).detach();
  }
  void push(std::function<void()> work) {
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(work));
    changed_.notify_all();
  }
  void synchronize() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return queue_.empty() && !busy_; });
  }
  // What is queued is still done; then the stream is gone.
  void destroy() { push(nullptr); }

 private:
  void run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return !queue_.empty(); });
      const std::function<void()> work = std::move(queue_.front());
      queue_.pop_front();
      if (!work) break;
      busy_ = true;
      lock.unlock();
      work();
      lock.lock();
      busy_ = false;
      changed_.notify_all();
    }
    lock.unlock();
    delete this;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  bool busy_ = false;
};

Stream& stream_of(void* handle) {
  static auto& null_stream = *new Stream;
  return handle ? *static_cast<Stream*>(handle) : null_stream;
}

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Counts the marks that were queued and those that were passed; may be destroyed before its marks.
struct EventState {
  std::mutex mutex;
  std::condition_variable passed_another;
  unsigned long recorded = 0, passed = 0;
  double passed_s = 0;
  bool has_timing = false;

  void pass(unsigned long mark) {
    const std::lock_guard lock(mutex);
    passed = std::max(passed, mark);
    passed_s = now_s();
    passed_another.notify_all();
  }
  void wait_for(unsigned long mark) {
    std::unique_lock lock(mutex);
    passed_another.wait(lock, [&] { return passed >= mark; });
  }
};
using Event = std::shared_ptr<EventState>;

EventState& state_of(void* event) { return **static_cast<Event*>(event); }

// In a thread's own block of memory, as a program's are: what is made for it later is freed by
// whoever reuses the stack of a thread that nobody joins, which ThreadSanitizer takes for a race.
#define MOCK_THREAD_LOCAL thread_local __attribute__((tls_model("initial-exec")))
MOCK_THREAD_LOCAL int device = 0;
MOCK_THREAD_LOCAL int latest_error = kSuccess;
MOCK_THREAD_LOCAL int capture_mode = 0;  // "global", as every thread begins

int answer(int status) {
  if (status != kSuccess) latest_error = status;
  return status;
}

}  // namespace

int entered(const char* function, int rank) { return next_of(function, rank); }
bool is_to_hang(int rank) { return next_of(kHang, rank) != kSuccess; }
int async_error(int rank) {
  return locked([&](Orders& all) {
    const auto found = all.async_errors.find(rank);
    return found == all.async_errors.end() ? 0 : found->second;
  });
}
double abort_delay_s() {
  return locked([](Orders& all) { return all.abort_delay_s; });
}
bool is_lazy() {
  return locked([](Orders& all) { return all.lazy; });
}
int version() {
  return locked([](Orders& all) { return all.version; });
}

void sleep_s(double seconds) {
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
}

void enqueue(void* stream, std::function<void()> work) {
  const double delay_s = locked([](Orders& all) { return all.delay_s; });
  stream_of(stream).push([delay_s, work = std::move(work)] {
    if (delay_s > 0) sleep_s(delay_s);
    work();
  });
}

}  // namespace mock

using namespace mock;

#define OBEY(function) \
  if (const int ordered = entered(function)) return answer(ordered)

MOCK_EXPORT int cudaGetDeviceCount(int* count) {
  OBEY("cudaGetDeviceCount");
  *count = locked([](Orders& all) { return all.num_devices; });
  if (*count > 0) return kSuccess;
  const bool has_driver = *count == 0;
  *count = 0;
  return answer(has_driver ? kNoDevice : kInsufficientDriver);
}
MOCK_EXPORT int cudaSetDevice(int wanted) {
  OBEY("cudaSetDevice");
  if (wanted < 0 || wanted >= locked([](Orders& all) { return all.num_devices; }))
    return answer(kInvalidDevice);
  device = wanted;
  return kSuccess;
}
MOCK_EXPORT int cudaGetDevice(int* current) {
  OBEY("cudaGetDevice");
  *current = device;
  return kSuccess;
}
MOCK_EXPORT int cudaRuntimeGetVersion(int* number) {
  *number = 13000;
  return kSuccess;
}
MOCK_EXPORT int cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return kSuccess;
}
MOCK_EXPORT int cudaStreamCreateWithPriority(void** stream, unsigned flags, int priority) {
  OBEY("cudaStreamCreateWithPriority");
  if (flags > 1 || priority > 0 || priority < -5) return answer(kInvalidValue);
  *stream = new Stream;
  return kSuccess;
}
MOCK_EXPORT int cudaStreamDestroy(void* stream) {
  OBEY("cudaStreamDestroy");
  stream_of(stream).destroy();
  return kSuccess;
}
MOCK_EXPORT int cudaStreamSynchronize(void* stream) {
  OBEY("cudaStreamSynchronize");
  stream_of(stream).synchronize();
  return kSuccess;
}
MOCK_EXPORT int cudaStreamIsCapturing(void*, int* status) {
  OBEY("cudaStreamIsCapturing");
  *status = locked([](Orders& all) { return all.capturing; }) ? 1 : 0;
  return kSuccess;
}
MOCK_EXPORT int cudaStreamWaitEvent(void* stream, void* event, unsigned flags) {
  OBEY("cudaStreamWaitEvent");
  if (flags != 0) return answer(kInvalidValue);
  const Event kept = *static_cast<Event*>(event);
  unsigned long mark;
  {
    const std::lock_guard lock(kept->mutex);
    mark = kept->recorded;
  }
  stream_of(stream).push([kept, mark] { kept->wait_for(mark); });
  return kSuccess;
}
MOCK_EXPORT int cudaEventCreateWithFlags(void** event, unsigned flags) {
  OBEY("cudaEventCreateWithFlags");
  auto state = std::make_shared<EventState>();
  state->has_timing = flags == 0;
  *event = new Event(std::move(state));
  return kSuccess;
}
MOCK_EXPORT int cudaEventDestroy(void* event) {
  OBEY("cudaEventDestroy");
  delete static_cast<Event*>(event);
  return kSuccess;
}
MOCK_EXPORT int cudaEventRecord(void* event, void* stream) {
  OBEY("cudaEventRecord");
  const Event kept = *static_cast<Event*>(event);
  unsigned long mark;
  {
    const std::lock_guard lock(kept->mutex);
    mark = ++kept->recorded;
  }
  stream_of(stream).push([kept, mark] { kept->pass(mark); });
  return kSuccess;
}
MOCK_EXPORT int cudaEventQuery(void* event) {
  OBEY("cudaEventQuery");
  if (capture_mode != kRelaxed && locked([](Orders& all) { return all.capturing; }))
    return answer(kCaptureUnsupported);
  EventState& state = state_of(event);
  const std::lock_guard lock(state.mutex);
  return state.passed >= state.recorded ? kSuccess : answer(kNotReady);
}
MOCK_EXPORT int cudaEventElapsedTime(float* milliseconds, void* start, void* end) {
  OBEY("cudaEventElapsedTime");
  double passed_s[2];
  void* const events[] = {start, end};
  for (int i = 0; i < 2; ++i) {
    EventState& state = state_of(events[i]);
    const std::lock_guard lock(state.mutex);
    if (!state.has_timing || state.recorded == 0) return answer(kInvalidValue);
    if (state.passed < state.recorded) return answer(kNotReady);
    passed_s[i] = state.passed_s;
  }
  *milliseconds = static_cast<float>(1e3 * (passed_s[1] - passed_s[0]));
  return kSuccess;
}
MOCK_EXPORT int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void* stream) {
  OBEY("cudaMemcpyAsync");
  if (kind < 0 || kind > 4) return answer(kInvalidValue);
  enqueue(stream, [=] { std::memmove(to, from, bytes); });
  return kSuccess;
}
MOCK_EXPORT int cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  OBEY("cudaHostAlloc");
  *memory = std::malloc(bytes);
  return *memory ? kSuccess : answer(2);
}
MOCK_EXPORT int cudaFreeHost(void* memory) {
  OBEY("cudaFreeHost");
  std::free(memory);
  return kSuccess;
}
MOCK_EXPORT int cudaThreadExchangeStreamCaptureMode(int* mode) {
  OBEY("cudaThreadExchangeStreamCaptureMode");
  std::swap(capture_mode, *mode);
  return kSuccess;
}
MOCK_EXPORT int cudaGetLastError() { return std::exchange(latest_error, kSuccess); }
MOCK_EXPORT const char* cudaGetErrorString(int status) {
  switch (status) {
    case kSuccess:
      return "no error";
    case kInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case kNoDevice:
      return "no CUDA-capable device is detected";
    case kInvalidDevice:
      return "invalid device ordinal";
    case kNotReady:
      return "device not ready";
    default:
      return "a mocked error";
  }
}

namespace {

constexpr MockControl kControl = {
    .reset =
        [] {
          locked([](Orders& all) {
            all.orders.clear();
            all.calls.clear();
            all.async_errors.clear();
            all.delay_s = all.abort_delay_s = 0;
            all.lazy = all.capturing = false;
            all.version = 23007;
            all.num_devices = 8;
          });
        },
    .fail =
        [](const char* function, int rank, int nth, int status) {
          locked([&](Orders& all) { all.orders.push_back({function, rank, nth, status}); });
        },
    .hang =
        [](int rank, int nth) {
          locked([&](Orders& all) { all.orders.push_back({kHang, rank, nth, 1}); });
        },
    .set_async_error =
        [](int rank, int status) { locked([&](Orders& all) { all.async_errors[rank] = status; }); },
    .set_delay = [](double seconds) { locked([&](Orders& all) { all.delay_s = seconds; }); },
    .set_abort_delay =
        [](double seconds) { locked([&](Orders& all) { all.abort_delay_s = seconds; }); },
    .set_lazy = [](bool lazy) { locked([&](Orders& all) { all.lazy = lazy; }); },
    .set_version = [](int number) { locked([&](Orders& all) { all.version = number; }); },
    .set_num_devices = [](int count) { locked([&](Orders& all) { all.num_devices = count; }); },
    .num_calls =
        [](const char* function) {
          return locked([&](Orders& all) { return all.calls[function]; });
        },
    .set_capturing =
        [](bool capturing) { locked([&](Orders& all) { all.capturing = capturing; }); },
    .launch = [](void* stream, void (*kernel)(void*),
                 void* argument) { enqueue(stream, [=] { kernel(argument); }); },
};

}  // namespace

MOCK_EXPORT const MockControl* mock_control() { return &kControl; }
