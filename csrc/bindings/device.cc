// What a device needs, as `pyallreduce doctor` tells it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "base/env.h"
#include "bindings/rooms.h"
#include "device/cuda_runtime.h"
#include "group/nccl_library.h"

namespace py = pybind11;

namespace pyar {
namespace {

py::dict describe(const DynamicLibrary& library) {
  py::dict found;
  found["path"] = library.path();
  found["how"] = library.how();
  return found;
}

using Folders = std::vector<std::string>;

py::dict describe_cuda_runtime(const Folders& folders) {
  const CudaRuntime& cuda = CudaRuntime::load(read_env().cudart, folders);
  py::dict found = describe(cuda.library());
  found["version"] =
      std::to_string(cuda.version() / 1000) + "." + std::to_string(cuda.version() % 1000 / 10);
  found["devices"] = cuda.device_count();
  return found;
}

py::dict describe_nccl(const Folders& folders) {
  const NcclLibrary& nccl = NcclLibrary::load(read_env().nccl, folders);
  py::dict found = describe(nccl.library());
  found["version"] = NcclLibrary::name_of(nccl.version());
  found["missing"] = nccl.missing();
  return found;
}

}  // namespace

void bind_device(py::module_& m) {
  py::module_ s = m.def_submodule("device");
  s.def("cuda_runtime", &describe_cuda_runtime, py::arg("folders") = Folders());
  s.def("nccl", &describe_nccl, py::arg("folders") = Folders());
}

}  // namespace pyar
