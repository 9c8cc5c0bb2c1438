// The mock of tests/cpp/mock, loaded in place of the CUDA runtime and of NCCL.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "check.h"
#include "device/cuda_runtime.h"
#include "group/group.h"
#include "group/nccl_library.h"
#include "mock/mock.h"

namespace pyar::test {

// Where the libraries of tests/cpp/mock were built: beside the program.
inline const std::string mock_folder =
    std::filesystem::canonical("/proc/self/exe").parent_path().string();

inline std::string mock_path(const std::string& name = "nccl_mock") {
  return mock_folder + "/lib" + name + ".so";
}

inline const CudaRuntime& cuda() { return CudaRuntime::load(mock_path()); }
inline const NcclLibrary& nccl() { return NcclLibrary::load(mock_path()); }

// Each library has its own.
inline const MockControl& control_of(const DynamicLibrary& library) {
  return *reinterpret_cast<const MockControl* (*)()>(library.symbol(MockControl::kSymbol))();
}
inline const MockControl& mock() { return control_of(cuda().library()); }

// Work of a kernel.
inline void on_stream(CudaStream stream, std::function<void()> work) {
  using Work = std::function<void()>;
  mock().launch(
      stream,
      [](void* argument) {
        const std::unique_ptr<Work> owned(static_cast<Work*>(argument));
        (*owned)();
      },
      new Work(std::move(work)));
}

// Of float32 alone.
inline void scale_floats(Span data, double factor, CudaStream stream) {
  on_stream(stream, [=] {
    for (size_t i = 0; i < data.num_elems; ++i) static_cast<float*>(data.data)[i] *= float(factor);
  });
}

}  // namespace pyar::test
