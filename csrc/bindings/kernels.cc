// Kernels over raw addresses (bfloat16 has no buffer format): for tests, benchmarks and par.SGD.
#include "kernels/kernels.h"

#include <cstdint>
#include <optional>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/error.h"
#include "bindings/convert.h"
#include "bindings/rooms.h"

namespace py = pybind11;

namespace pyar {
namespace {

using SgdSpan = std::tuple<Address, Address, Address, size_t>;  // weight, momentum or 0, gradient

const KernelTable* table_named(const std::string& isa) {
  const KernelTable* table = isa.empty() ? nullptr : table_for(isa);
  if (!isa.empty() && !table) throw UsageError("this CPU does not run kernels for " + isa);
  return table;
}

// (element, source or None if only the sum is not finite), or None.
using Blame = std::optional<std::pair<size_t, std::optional<size_t>>>;

Blame blame_of(const NonFinite& found) {
  if (found.elem == NonFinite::kNone) return {};
  if (found.source == NonFinite::kNone) return {{found.elem, {}}};
  return {{found.elem, found.source}};
}

Blame reduce_at(const std::vector<Address>& sources, const std::vector<Address>& destinations,
                size_t num_elems, const std::string& dtype, const std::string& op, double scale,
                const std::string& isa) {
  const std::vector<void*> from = pointers(sources), to = pointers(destinations);
  NonFinite nonfinite;
  reduce(dtype_named(dtype), op_named(op), scale,
         {from.data(), from.size(), to.data(), to.size(), num_elems, &nonfinite}, table_named(isa));
  return blame_of(nonfinite);
}

double sum_squares_at(Address data, size_t num_elems, const std::string& dtype,
                      const std::string& isa) {
  return sum_squares(dtype_named(dtype), pointer(data), num_elems, table_named(isa));
}

// What one hash covers: addresses and bytes, each hashed with the hash before it as the seed.
using ByteSpans = std::vector<std::pair<Address, size_t>>;

void hash_many(const std::vector<ByteSpans>& entries, Address hashes) {
  auto* to = static_cast<uint64_t*>(pointer(hashes));
  for (const ByteSpans& entry : entries) {
    uint64_t chained = 0;
    for (const auto& [address, num_bytes] : entry)
      chained = hash(pointer(address), num_bytes, chained);
    *to++ = chained;
  }
}

void convert_at(const std::string& from, Address source, const std::string& to, Address destination,
                size_t num_elems, const std::string& isa) {
  convert(dtype_named(from), pointer(source), dtype_named(to), pointer(destination), num_elems,
          table_named(isa));
}

Blame sgd_at(const std::vector<Address>& gradients, const std::vector<Address>& weights,
             Address momentum, size_t num_elems, const std::string& dtype,
             const SgdScalars& scalars, double scale, bool zero_gradients, const std::string& isa) {
  const std::vector<void*> g = pointers(gradients), w = pointers(weights);
  NonFinite nonfinite;
  sgd(dtype_named(dtype), scalars, scale,
      {g.data(), g.size(), w.data(), w.size(), pointer(momentum), num_elems, zero_gradients,
       &nonfinite},
      table_named(isa));
  return blame_of(nonfinite);
}

void sgd_many(const std::vector<SgdSpan>& spans, const std::string& dtype,
              const SgdScalars& scalars, double scale, bool zero_gradients,
              const std::string& isa) {
  const DType type = dtype_named(dtype);
  const KernelTable* table = table_named(isa);
  for (const auto& [weight, momentum, gradient, num_elems] : spans) {
    void *w = pointer(weight), *g = pointer(gradient);
    sgd(type, scalars, scale, {&g, 1, &w, 1, pointer(momentum), num_elems, zero_gradients}, table);
  }
}

}  // namespace

void bind_kernels(py::module_& m) {
  py::module_ k = m.def_submodule("kernels");
  using ReleaseGil = py::call_guard<py::gil_scoped_release>;

  k.def("isas", &isas, "Instruction sets that this CPU runs, the best first.");
  k.def("active_isa", &active_isa);

  py::class_<SgdScalars>(k, "SgdScalars", "The factors of csrc/kernels/sgd_rule.h.")
      .def(py::init([](double decay, double history, double gain, double momentum, double rate,
                       bool nesterov) {
             return SgdScalars{decay, history, gain, momentum, rate, nesterov};
           }),
           py::kw_only(), py::arg("decay"), py::arg("history"), py::arg("gain"),
           py::arg("momentum"), py::arg("rate"), py::arg("nesterov"))
      .def_readonly("decay", &SgdScalars::decay)
      .def_readonly("history", &SgdScalars::history)
      .def_readonly("gain", &SgdScalars::gain)
      .def_readonly("momentum", &SgdScalars::momentum)
      .def_readonly("rate", &SgdScalars::rate)
      .def_readonly("nesterov", &SgdScalars::nesterov);

  k.def("reduce", &reduce_at, ReleaseGil(), py::arg("sources"), py::arg("destinations"),
        py::arg("num_elems"), py::arg("dtype"), py::arg("op"), py::arg("scale") = 1.0,
        py::arg("isa") = "");
  k.def("sum_squares", &sum_squares_at, ReleaseGil(), py::arg("data"), py::arg("num_elems"),
        py::arg("dtype"), py::arg("isa") = "");
  k.def("hash_many", &hash_many, ReleaseGil(), py::arg("entries"), py::arg("hashes"),
        "One uint64 per entry goes to address `hashes`: over its (address, num_bytes) spans in "
        "order, 0 without any.");
  k.def("convert", &convert_at, ReleaseGil(), py::arg("from_dtype"), py::arg("source"),
        py::arg("to_dtype"), py::arg("destination"), py::arg("num_elems"), py::arg("isa") = "");
  k.def("sgd", &sgd_at, ReleaseGil(), py::arg("gradients"), py::arg("weights"), py::arg("momentum"),
        py::arg("num_elems"), py::arg("dtype"), py::arg("scalars"), py::arg("scale") = 1.0,
        py::arg("zero_gradients") = false, py::arg("isa") = "");
  k.def("sgd_many", &sgd_many, ReleaseGil(), py::arg("spans"), py::arg("dtype"), py::arg("scalars"),
        py::arg("scale") = 1.0, py::arg("zero_gradients") = false, py::arg("isa") = "",
        "One update per (weight, momentum or 0, gradient, num_elems): addresses and a count.");
}

}  // namespace pyar
