// What the two halves of the mock share: orders to fail, counters, and the queues of streams.
#pragma once

#include <functional>

#define MOCK_EXPORT extern "C" __attribute__((visibility("default")))

namespace mock {

// To be called first by every exported function: the status that it was ordered to return, or 0.
int entered(const char* function, int rank = -1);
// The same for collectives that are to hang.
bool is_to_hang(int rank);
int async_error(int rank);
double abort_delay_s();
bool is_lazy();
int version();

// Queues on a stream; `work` is delayed as ordered.
void enqueue(void* stream, std::function<void()> work);
void sleep_s(double seconds);

}  // namespace mock
