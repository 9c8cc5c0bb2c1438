// The CUDA kernels over raw addresses, and their twin on the host: `_core.cuda` (only where CUDA is
// compiled in) and `_core.cuda_twin` have the same functions.
#include <cstdint>
#include <optional>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/convert.h"
#include "bindings/rooms.h"
#include "kernels/cuda/cuda_kernels.h"

namespace py = pybind11;

namespace pyar {
namespace {

using OptionalAddress = std::optional<uint64_t>;
// weight, momentum, gradient, copy, num_elems, group
using PieceTuple =
    std::tuple<uint64_t, OptionalAddress, uint64_t, OptionalAddress, size_t, uint32_t>;
using SpanTuple = std::tuple<uint64_t, uint64_t, size_t>;  // source, destination, num_elems

UpdateTable update_table(const std::string& gradient, const std::string& weight,
                         const std::vector<PieceTuple>& tuples, size_t chunk_elems) {
  std::vector<TablePiece> pieces;
  pieces.reserve(tuples.size());
  for (const auto& [w, momentum, g, copy, num_elems, group] : tuples)
    pieces.push_back({w, momentum.value_or(kNoSpan), g, copy.value_or(kNoSpan), num_elems, group});
  return UpdateTable(dtype_named(gradient), dtype_named(weight), pieces, chunk_elems);
}

SpanTable span_table(const std::string& from, const std::string& to,
                     const std::vector<SpanTuple>& tuples, size_t chunk_elems) {
  std::vector<TableSpan> spans;
  spans.reserve(tuples.size());
  for (const auto& [source, destination, num_elems] : tuples)
    spans.push_back({source, destination, num_elems});
  return SpanTable(dtype_named(from), dtype_named(to), spans, chunk_elems);
}

SgdForm form_named(const std::string& name) {
  if (name == "reference") return SgdForm::kReference;
  if (name == "absorbed") return SgdForm::kAbsorbed;
  if (name == "corrected") return SgdForm::kCorrected;
  throw UsageError("unknown form " + name);
}

template <typename Table>
py::bytes image_of(const Table& table) {
  const std::vector<char> image = table.image();
  return {image.data(), image.size()};
}

void bind_tables(py::module_& k) {
  py::class_<SpanTable>(k, "SpanTable")
      .def(py::init(&span_table), py::arg("from_dtype"), py::arg("to_dtype"), py::arg("spans"),
           py::arg("chunk_elems") = 0)
      .def_property_readonly("num_chunks", &SpanTable::num_chunks)
      .def("image", &image_of<SpanTable>);
  py::class_<UpdateTable>(k, "UpdateTable")
      .def(py::init(&update_table), py::arg("gradient_dtype"), py::arg("weight_dtype"),
           py::arg("pieces"), py::arg("chunk_elems") = 0)
      .def_property_readonly("num_chunks", &UpdateTable::num_chunks)
      .def("image", &image_of<UpdateTable>);
  py::class_<UpdateRule>(k, "UpdateRule")
      .def(py::init([](const SgdScalars& scalars, double idle_scale) {
             UpdateRule rule;
             rule.scalars = scalars;
             rule.idle_scale = idle_scale;
             return rule;
           }),
           py::arg("scalars"), py::arg("idle_scale") = 1.0)
      .def_static(
          "on_device",
          [](const std::string& form, double decay, double momentum, bool nesterov,
             Address learning_rate, Address momentum_unit) {
            UpdateRule rule;
            rule.scalars.decay = decay;
            rule.scalars.momentum = momentum;
            rule.scalars.nesterov = nesterov;
            rule.form = form_named(form);
            rule.learning_rate = pointer<float>(learning_rate);
            rule.momentum_unit = pointer<double>(momentum_unit);
            return rule;
          },
          py::kw_only(), py::arg("form"), py::arg("decay"), py::arg("momentum"),
          py::arg("nesterov"), py::arg("learning_rate"), py::arg("momentum_unit") = 0);
}

Launch launch_of(Address stream, unsigned max_blocks) { return {pointer(stream), max_blocks}; }

Gate gate_of(Address found_inf, Address aborted) {
  return {pointer<float>(found_inf), pointer<uint32_t>(aborted)};
}

UpdateFindings findings_of(Address found_inf, Address sum_squares) {
  return {pointer<float>(found_inf), pointer<double>(sum_squares)};
}

void bind_launchers(py::module_& m, const CudaKernels& kernels) {
  using ReleaseGil = py::call_guard<py::gil_scoped_release>;
  const CudaKernels* const to = &kernels;

  m.def(
      "copy",
      [to](Address source, Address destination, size_t num_bytes, Address stream,
           unsigned max_blocks) {
        to->copy(pointer(source), pointer(destination), num_bytes, launch_of(stream, max_blocks));
      },
      ReleaseGil(), py::arg("source"), py::arg("destination"), py::arg("num_bytes"), py::kw_only(),
      py::arg("stream") = 0, py::arg("max_blocks") = 0);

  m.def(
      "reduce",
      [to](const std::vector<Address>& sources, const std::vector<Address>& destinations,
           size_t num_elems, const std::string& dtype, double scale, Address stream,
           unsigned max_blocks) {
        const std::vector<void*> from = pointers(sources), into = pointers(destinations);
        to->reduce(dtype_named(dtype), scale,
                   {from.data(), from.size(), into.data(), into.size(), num_elems},
                   launch_of(stream, max_blocks));
      },
      ReleaseGil(), py::arg("sources"), py::arg("destinations"), py::arg("num_elems"),
      py::arg("dtype"), py::arg("scale") = 1.0, py::kw_only(), py::arg("stream") = 0,
      py::arg("max_blocks") = 0);

  m.def(
      "cast",
      [to](const SpanTable& table, Address image, Address sources, Address destinations,
           double scale, Address stream, unsigned max_blocks) {
        to->cast(table,
                 {pointer(image), pointer<char>(sources), pointer<char>(destinations), scale},
                 launch_of(stream, max_blocks));
      },
      ReleaseGil(), py::arg("table"), py::arg("image"), py::kw_only(), py::arg("sources") = 0,
      py::arg("destinations") = 0, py::arg("scale") = 1.0, py::arg("stream") = 0,
      py::arg("max_blocks") = 0);

  m.def(
      "update",
      [to](const UpdateTable& table, Address image, const std::vector<UpdateRule>& rules,
           Address weights, Address momentum, Address gradients, Address copies, Address flags,
           double scale, Address loss_scale, Address clip, bool zero_gradients, Address found_inf,
           Address aborted, Address new_found_inf, Address sum_squares, Address stream,
           unsigned max_blocks) {
        to->update(
            table,
            {pointer(image), pointer<char>(weights), pointer<char>(momentum),
             pointer<char>(gradients), pointer<char>(copies), pointer(flags), rules.data(),
             rules.size(), scale, pointer<float>(loss_scale), pointer<double>(clip), zero_gradients,
             gate_of(found_inf, aborted), findings_of(new_found_inf, sum_squares)},
            launch_of(stream, max_blocks));
      },
      ReleaseGil(), py::arg("table"), py::arg("image"), py::arg("rules"), py::kw_only(),
      py::arg("weights") = 0, py::arg("momentum") = 0, py::arg("gradients") = 0,
      py::arg("copies") = 0, py::arg("flags") = 0, py::arg("scale") = 1.0,
      py::arg("loss_scale") = 0, py::arg("clip") = 0, py::arg("zero_gradients") = false,
      py::arg("found_inf") = 0, py::arg("aborted") = 0, py::arg("new_found_inf") = 0,
      py::arg("sum_squares") = 0, py::arg("stream") = 0, py::arg("max_blocks") = 0);

  m.def(
      "inspect",
      [to](const UpdateTable& table, Address image, Address gradients, Address flags, double scale,
           Address loss_scale, Address aborted, Address new_found_inf, Address sum_squares,
           Address stream, unsigned max_blocks) {
        UpdateCall call{pointer(image)};
        call.gradients = pointer<char>(gradients);
        call.flags = pointer(flags);
        call.scale = scale;
        call.loss_scale = pointer<float>(loss_scale);
        call.gate = gate_of(0, aborted);
        call.findings = findings_of(new_found_inf, sum_squares);
        to->inspect(table, call, launch_of(stream, max_blocks));
      },
      ReleaseGil(), py::arg("table"), py::arg("image"), py::kw_only(), py::arg("gradients") = 0,
      py::arg("flags") = 0, py::arg("scale") = 1.0, py::arg("loss_scale") = 0,
      py::arg("aborted") = 0, py::arg("new_found_inf") = 0, py::arg("sum_squares") = 0,
      py::arg("stream") = 0, py::arg("max_blocks") = 0);

  m.def(
      "close_step",
      [to](const std::vector<UpdateRule>& rules, Address found_inf, Address aborted,
           Address stream) {
        to->close_step(rules.data(), rules.size(), gate_of(found_inf, aborted),
                       launch_of(stream, 0));
      },
      ReleaseGil(), py::arg("rules"), py::kw_only(), py::arg("found_inf") = 0,
      py::arg("aborted") = 0, py::arg("stream") = 0);

  m.def(
      "clip",
      [to](Address sum_squares, double max_norm, Address factor, Address stream) {
        to->clip(pointer<double>(sum_squares), max_norm, pointer<double>(factor),
                 launch_of(stream, 0));
      },
      ReleaseGil(), py::arg("sum_squares"), py::arg("max_norm"), py::arg("factor"), py::kw_only(),
      py::arg("stream") = 0);
}

}  // namespace

void bind_cuda(py::module_& m) {
  auto kernels = py::reinterpret_borrow<py::module_>(m.attr("kernels"));
  bind_tables(kernels);
  py::module_ twin = m.def_submodule("cuda_twin");
  bind_launchers(twin, cuda_twin());
#ifdef PYALLREDUCE_HAVE_CUDA
  m.attr("has_cuda") = true;
  m.def("cuda_device_count", &device_count);
  py::module_ cuda = m.def_submodule("cuda");
  bind_launchers(cuda, cuda_kernels());
  cuda.def("device_count", &device_count);
#else
  m.attr("has_cuda") = false;
  m.def("cuda_device_count", [] { return 0; });
#endif
}

}  // namespace pyar
