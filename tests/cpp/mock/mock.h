// One library in place of two, for machines without a GPU: it exports what we use of the CUDA
// runtime and of NCCL. Streams are threads that do what was queued in order, later, on host memory;
// ranks are threads or processes that meet in a file. Slower than the real ones on purpose: what is
// not waited for has not happened yet.
#pragma once

// How a test makes it fail, or look inside. Ranks are those of a communicator; kAnyRank: whichever
// calls. Calls are counted from the latest reset() or order.
struct MockControl {
  static constexpr int kAnyRank = -1;
  static constexpr const char* kSymbol = "mock_control";

  void (*reset)();
  // The nth call (1: the next) of `function` by `rank` returns `status` and does nothing else.
  void (*fail)(const char* function, int rank, int nth, int status);
  // As a status: the call does not return before its communicator is aborted.
  static constexpr int kStalls = -1;
  // The nth collective of `rank` never ends, unless its communicator is aborted.
  void (*hang)(int rank, int nth);
  // What the communicators of `rank` answer to ncclCommGetAsyncError.
  void (*set_async_error)(int rank, int status);
  // Work on streams (not events) takes so much longer.
  void (*set_delay)(double seconds);
  // ncclCommAbort takes so long.
  void (*set_abort_delay)(double seconds);
  // Collectives return ncclInProgress and are queued a little later, as when NCCL connects late.
  void (*set_lazy)(bool lazy);
  void (*set_version)(int version);
  // Negative: no driver.
  void (*set_num_devices)(int count);
  int (*num_calls)(const char* function);
  // As while some thread captures a graph: all streams are captured, events may be asked by threads
  // of relaxed mode only.
  void (*set_capturing)(bool capturing);
  // Stands for a kernel.
  void (*launch)(void* stream, void (*kernel)(void*), void* argument);
};
