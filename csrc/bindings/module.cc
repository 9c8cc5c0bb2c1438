// The extension module `pyallreduce._core`: converts, releases the GIL, maps exceptions; decides
// nothing.
#include <pybind11/pybind11.h>
#include <string_view>

#include "base/clock.h"
#include "base/env.h"
#include "base/error.h"
#include "bindings/rooms.h"
#include "kernels/kernels.h"

namespace py = pybind11;

namespace pyar {
namespace {

const char* python_name(Cause cause) {
  switch (cause) {
    case Cause::kUsage:
      return "UsageError";
    case Cause::kPeer:
      return "PeerError";
    case Cause::kTimeout:
      return "TimeoutError";
    case Cause::kMismatch:
      return "MismatchError";
    case Cause::kSystem:
      break;
  }
  return "Error";
}

void translate(std::exception_ptr thrown) {
  if (!thrown) return;
  try {
    std::rethrow_exception(thrown);
  } catch (const Error& error) {
    py::tuple peers(error.peers().size());
    for (size_t i = 0; i < error.peers().size(); ++i) peers[i] = error.peers()[i];
    const py::object type =
        py::module_::import("pyallreduce.errors").attr(python_name(error.cause()));
    // Another process, or the environment, may have put bytes into it that are no UTF-8.
    const std::string_view what = error.what();
    const auto message = py::reinterpret_steal<py::str>(
        PyUnicode_DecodeUTF8(what.data(), static_cast<Py_ssize_t>(what.size()), "replace"));
    PyErr_SetObject(type.ptr(), type(message, peers).ptr());
  }
}

}  // namespace
}  // namespace pyar

PYBIND11_MODULE(_core, m) {
  m.doc() = "The C++ core of pyallreduce. Private: use the names of `pyallreduce`.";
  py::register_exception_translator(&pyar::translate);
  m.attr("__version__") = PYALLREDUCE_VERSION;
  m.def("now_s", &pyar::now_s, "Seconds on CLOCK_MONOTONIC.");
  m.def("read_env", [] {
    const pyar::Env env = pyar::read_env();
    py::dict settings;
    settings["isa"] = env.isa;
    settings["cudart"] = env.cudart;
    settings["nccl"] = env.nccl;
    settings["port"] = env.port;
    settings["timeout_s"] = env.timeout_s;
    settings["trace"] = env.trace;
    return settings;
  });
  m.def("select_isa", &pyar::select_isa, py::arg("isa"),
        "Instruction set of all kernels from now on; False if this CPU lacks it.");
  pyar::bind_device(m);
  pyar::bind_kernels(m);
  pyar::bind_cuda(m);
  pyar::bind_schedules(m);
  pyar::bind_inproc(m);
  pyar::bind_communicator(m);
  pyar::bind_device_side(m);
}
