#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <string>

#include "bindings/rooms.h"
#include "schedules/registry.h"

namespace py = pybind11;

namespace pyar {
namespace {

template <typename T>
py::tuple tuple_of(const std::vector<T>& values) {
  py::tuple result(values.size());
  for (size_t i = 0; i < values.size(); ++i) result[i] = py::cast(values[i]);
  return result;
}

}  // namespace

void bind_schedules(py::module_& m) {
  py::module_ s = m.def_submodule("schedules");

  py::class_<Transfer>(s, "Transfer")
      .def(py::init([](int peer, int begin, int end, bool reduce) {
             return Transfer{peer, begin, end, reduce};
           }),
           py::arg("peer"), py::arg("begin"), py::arg("end"), py::arg("reduce"))
      .def_readonly("peer", &Transfer::peer)
      .def_readonly("begin", &Transfer::begin)
      .def_readonly("end", &Transfer::end)
      .def_readonly("reduce", &Transfer::reduce)
      .def(
          "__eq__", [](const Transfer& a, const Transfer& b) { return a == b; }, py::is_operator())
      .def("__repr__", [](const Transfer& t) {
        return py::str("Transfer(peer={}, begin={}, end={}, reduce={})")
            .format(t.peer, t.begin, t.end, t.reduce);
      });

  py::class_<Step>(s, "Step")
      .def(py::init([](std::vector<Transfer> sends, std::vector<Transfer> recvs) {
             return Step{std::move(sends), std::move(recvs)};
           }),
           py::arg("sends"), py::arg("recvs"))
      .def_property_readonly("sends", [](const Step& step) { return tuple_of(step.sends); })
      .def_property_readonly("recvs", [](const Step& step) { return tuple_of(step.recvs); })
      .def(
          "__eq__", [](const Step& a, const Step& b) { return a == b; }, py::is_operator())
      .def("__repr__", [](const Step& step) {
        return py::str("Step(sends={}, recvs={})")
            .format(tuple_of(step.sends), tuple_of(step.recvs));
      });

  py::class_<Schedule>(s, "Schedule")
      .def(py::init([](int rank, int size, int num_chunks, std::vector<Step> steps) {
             return Schedule{rank, size, num_chunks, std::move(steps)};
           }),
           py::arg("rank"), py::arg("size"), py::arg("num_chunks"), py::arg("steps"))
      .def_readonly("rank", &Schedule::rank)
      .def_readonly("size", &Schedule::size)
      .def_readonly("num_chunks", &Schedule::num_chunks)
      .def_property_readonly("steps", [](const Schedule& x) { return tuple_of(x.steps); })
      .def(
          "__eq__", [](const Schedule& a, const Schedule& b) { return a == b; }, py::is_operator())
      .def("__repr__", [](const Schedule& x) {
        return py::str("Schedule(rank={}, size={}, num_chunks={}, steps={})")
            .format(x.rank, x.size, x.num_chunks, tuple_of(x.steps));
      });

  for (const Algorithm& a : algorithms())
    s.def(
        a.name, [name = a.name](int rank, int size) { return generate(name, rank, size); },
        py::arg("rank"), py::arg("size"));

  s.def("names", [] {
    std::vector<std::string> names;
    for (const Algorithm& a : algorithms()) names.emplace_back(a.name);
    return tuple_of(names);
  });
  s.def(
      "cost",
      [](const std::string& name, int size, double bytes, double alpha_s, double beta_s_per_byte) {
        return cost(name, size, bytes, {alpha_s, beta_s_per_byte});
      },
      py::arg("name"), py::arg("size"), py::arg("bytes"), py::arg("alpha_s"),
      py::arg("beta_s_per_byte"));
  s.def(
      "select",
      [](int size, double bytes, double alpha_s, double beta_s_per_byte) {
        return select(size, bytes, {alpha_s, beta_s_per_byte}).name;
      },
      py::arg("size"), py::arg("bytes"), py::arg("alpha_s"), py::arg("beta_s_per_byte"));
  s.def("ring_reduce_scatter", &ring_reduce_scatter, py::arg("rank"), py::arg("size"));
  s.def("ring_all_gather", &ring_all_gather, py::arg("rank"), py::arg("size"));
  s.def("halving_reduce_scatter", &halving_reduce_scatter, py::arg("rank"), py::arg("size"));
  s.def("doubling_all_gather", &doubling_all_gather, py::arg("rank"), py::arg("size"));
  s.def("direct_reduce_scatter", &direct_reduce_scatter, py::arg("rank"), py::arg("size"));
  s.def("binomial_tree", &binomial_tree, py::arg("rank"), py::arg("size"), py::arg("root"));
}

}  // namespace pyar
