// The parts of the Python module, one file each.
#pragma once

#include <pybind11/pybind11.h>

namespace pyar {

void bind_communicator(pybind11::module_& m);
void bind_device(pybind11::module_& m);
// After bind_communicator() and bind_cuda().
void bind_device_side(pybind11::module_& m);
// After bind_kernels().
void bind_cuda(pybind11::module_& m);
void bind_inproc(pybind11::module_& m);
void bind_kernels(pybind11::module_& m);
void bind_schedules(pybind11::module_& m);

}  // namespace pyar
