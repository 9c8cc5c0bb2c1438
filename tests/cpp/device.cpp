// The CUDA runtime's seam and the search for libraries, with the mock in place of both.
#include <cstring>
#include <vector>

#include "mocked.h"

using namespace pyar;
using namespace pyar::test;

namespace {

bool contains(const Error& error, const std::string& words) {
  return std::string(error.what()).find(words) != std::string::npos;
}

void libraries_are_found_where_they_should_be() {
  CHECK(nccl().library().how() == "PYALLREDUCE_NCCL" && nccl().version() == 23007);
  CHECK(nccl().library().path() == mock_path());
  CHECK(&nccl() == &NcclLibrary::load(mock_path()));
  // The mock has no soname, so it is no candidate for "already loaded": a folder has it under the
  // name that is sought.
  const LibrarySearch search{.name = "the mock",
                             .variable = "PYALLREDUCE_MOCK",
                             .path = "",
                             .sonames = {"libno_such.so.1", "libnccl_mock.so"},
                             .folders = {"/nowhere", mock_folder},
                             .remedy = "Build it"};
  const DynamicLibrary library(search);
  CHECK(library.how() == "installed package" && library.path() == mock_path());
  CHECK(library.symbol("ncclAllReduce") && !library.symbol("ncclNothing"));
}

void a_loaded_library_comes_first() {
  const DynamicLibrary libc({.name = "C",
                             .variable = "",
                             .path = "",
                             .sonames = {"libno_such.so.1", "libc.so.6"},
                             .folders = {mock_folder},
                             .remedy = ""});
  CHECK(libc.how() == "already loaded" && libc.symbol("malloc"));
}

void errors_say_what_was_tried_and_what_to_do() {
  const Error absent = error_of<Error>([] {
    const DynamicLibrary library({.name = "the mock",
                                  .variable = "PYALLREDUCE_MOCK",
                                  .path = "",
                                  .sonames = {"libno_such.so.1"},
                                  .folders = {"/nowhere"},
                                  .remedy = "Build it"});
  });
  CHECK(contains(absent, "/nowhere/libno_such.so.1") && contains(absent, "Build it"));
  CHECK(contains(absent, "PYALLREDUCE_MOCK"));
  const Error wrong_path = error_of<Error>([] { NcclLibrary::load("/nowhere/libnccl.so.2"); });
  CHECK(contains(wrong_path, "PYALLREDUCE_NCCL=/nowhere/libnccl.so.2"));
  error_of<Error>([] { NcclLibrary::load("/nowhere/libnccl.so.2"); });  // not remembered as loaded

  const Error old = error_of<Error>([] { NcclLibrary::load(mock_path("nccl_old")); });
  CHECK(contains(old, "version 2.14.3 is older than 2.18.0") && contains(old, "pip install"));
  const Error hollow = error_of<Error>([] { NcclLibrary::load(mock_path("nccl_hollow")); });
  CHECK(contains(hollow, "ncclAllReduce") && contains(hollow, "ncclCommAbort"));
  const Error no_runtime = error_of<Error>([] { CudaRuntime::load(mock_path("nccl_old")); });
  CHECK(contains(no_runtime, "cudaStreamWaitEvent") && contains(no_runtime, "cudaGetErrorString"));
}

void optional_functions_may_be_missing() {
  const NcclLibrary& plain = NcclLibrary::load(mock_path("nccl_plain"));
  CHECK(!plain.comm_split && !plain.mem_alloc && plain.all_reduce);
  CHECK(plain.missing().size() == 6 && plain.missing().front() == "ncclGetLastError");
  CHECK(nccl().missing().empty() && nccl().comm_split);
}

void devices_are_counted_without_a_driver_too() {
  CHECK(cuda().device_count() == 8 && cuda().version() == 13000);
  mock().set_num_devices(-1);
  CHECK(cuda().device_count() == 0);
  mock().set_num_devices(0);
  CHECK(cuda().device_count() == 0 && cuda().get_last_error.status() == kCudaSuccess);
  mock().reset();
  mock().fail("cudaGetDeviceCount", MockControl::kAnyRank, 1, 999);
  CHECK(contains(error_of<Error>([] { cuda().device_count(); }), "cudaGetDeviceCount: a mocked"));
}

void a_scope_gives_the_device_back() {
  mock().reset();
  int device = -1;
  {
    const DeviceScope scope(cuda(), 3);
    cuda().get_device(&device);
    CHECK(device == 3);
  }
  cuda().get_device(&device);
  CHECK(device == 0);
  const Error error = error_of<Error>([] { const DeviceScope scope(cuda(), 8); });
  CHECK(contains(error, "cudaSetDevice: invalid device ordinal (status 101)"));
  cuda().get_last_error.status();
}

void streams_work_in_order_and_later() {
  mock().reset();
  mock().set_delay(0.02);
  Stream producer(cuda()), consumer(cuda());
  Event produced(cuda(), Event::Timing::kYes), begun(cuda(), Event::Timing::kYes);
  std::vector<int> source(1000, 7), between(1000), result(1000);
  const size_t bytes = source.size() * sizeof(int);
  begun.record(producer.get());
  cuda().memcpy_async(between.data(), source.data(), bytes, kCudaMemcpyDefault, producer.get());
  produced.record(producer.get());
  CHECK(!produced.has_passed());
  CHECK(cuda().get_last_error.status() == kCudaSuccess);  // "not ready" is none
  produced.hold_back(consumer.get());
  cuda().memcpy_async(result.data(), between.data(), bytes, kCudaMemcpyDefault, consumer.get());
  consumer.synchronize();
  CHECK(result == source && produced.has_passed());
  CHECK(produced.seconds_since(begun) >= 0.02);
  mock().fail("cudaEventQuery", MockControl::kAnyRank, 1, 700);
  CHECK(contains(error_of<Error>([&] { produced.has_passed(); }), "cudaEventQuery"));
}

void pinned_memory_is_zeroed() {
  mock().reset();
  const PinnedMemory memory(cuda(), 64);
  const std::vector<char> zeros(64);
  CHECK(std::memcmp(memory.data(), zeros.data(), 64) == 0);
}

}  // namespace

int main() {
  give_up_after(60);
  libraries_are_found_where_they_should_be();
  a_loaded_library_comes_first();
  errors_say_what_was_tried_and_what_to_do();
  optional_functions_may_be_missing();
  devices_are_counted_without_a_driver_too();
  a_scope_gives_the_device_back();
  streams_work_in_order_and_later();
  pinned_memory_is_zeroed();
}
