// Threads as ranks, for tests: groups over the in-process transport, on integer addresses.
#include "transport/inproc.h"

#include <cstdint>
#include <memory>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "bindings/rooms.h"
#include "group/hierarchical_group.h"
#include "group/scheduled_group.h"

namespace py = pybind11;

namespace pyar {
namespace {

template <typename Enum>
Enum parse(const std::string& name, int count, const char* what) {
  for (int i = 0; i < count; ++i)
    if (name == name_of(static_cast<Enum>(i))) return static_cast<Enum>(i);
  throw UsageError(std::string(what) + " '" + name + "' is unknown");
}

class InprocGroup {
 public:
  explicit InprocGroup(std::unique_ptr<Group> group) : group_(std::move(group)) {}

  void all_reduce(uintptr_t data, size_t num_elems, const std::string& dtype, const std::string& op,
                  double timeout_s) {
    group_->all_reduce(span(data, num_elems, dtype), op_of(op), next_call(timeout_s));
  }
  void reduce_scatter(uintptr_t output, uintptr_t input, size_t output_elems,
                      const std::string& dtype, const std::string& op, double timeout_s) {
    group_->reduce_scatter(span(output, output_elems, dtype),
                           span(input, output_elems * size(), dtype), op_of(op),
                           next_call(timeout_s));
  }
  void all_gather(uintptr_t output, uintptr_t input, size_t input_elems, const std::string& dtype,
                  double timeout_s) {
    group_->all_gather(span(output, input_elems * size(), dtype), span(input, input_elems, dtype),
                       next_call(timeout_s));
  }
  void broadcast(uintptr_t data, size_t num_elems, const std::string& dtype, int root,
                 double timeout_s) {
    group_->broadcast(span(data, num_elems, dtype), root, next_call(timeout_s));
  }
  void barrier(double timeout_s) { group_->barrier(next_call(timeout_s)); }

 private:
  size_t size() const { return static_cast<size_t>(group_->size()); }
  static Op op_of(const std::string& name) { return parse<Op>(name, kNumOps, "op"); }
  static Span span(uintptr_t address, size_t num_elems, const std::string& dtype) {
    return {reinterpret_cast<void*>(address), num_elems, parse<DType>(dtype, kNumDTypes, "dtype")};
  }
  Call next_call(double timeout_s) {
    return {.sequence = ++sequence_,
            .layout = 0,
            .deadline = Deadline(timeout_s),
            .patience = kSleepSoon,
            .present_patience = kSleepSoon};
  }

  std::unique_ptr<Group> group_;
  uint64_t sequence_ = 0;
};

using SharedWorld = std::shared_ptr<InprocWorld>;

std::unique_ptr<Group> scheduled(SharedWorld world, int rank, const std::string& schedule) {
  return std::make_unique<ScheduledGroup>(std::make_unique<InprocTransport>(std::move(world), rank),
                                          schedule);
}

}  // namespace

void bind_inproc(py::module_& m) {
  py::module_ s = m.def_submodule("inproc");
  using ReleaseGil = py::call_guard<py::gil_scoped_release>;

  py::class_<InprocGroup>(s, "Group")
      .def("all_reduce", &InprocGroup::all_reduce, py::arg("address"), py::arg("num_elems"),
           py::arg("dtype"), py::arg("op"), py::arg("timeout_s"), ReleaseGil())
      .def("reduce_scatter", &InprocGroup::reduce_scatter, py::arg("output"), py::arg("input"),
           py::arg("output_elems"), py::arg("dtype"), py::arg("op"), py::arg("timeout_s"),
           ReleaseGil())
      .def("all_gather", &InprocGroup::all_gather, py::arg("output"), py::arg("input"),
           py::arg("input_elems"), py::arg("dtype"), py::arg("timeout_s"), ReleaseGil())
      .def("broadcast", &InprocGroup::broadcast, py::arg("address"), py::arg("num_elems"),
           py::arg("dtype"), py::arg("root"), py::arg("timeout_s"), ReleaseGil())
      .def("barrier", &InprocGroup::barrier, py::arg("timeout_s"), ReleaseGil());

  py::class_<InprocWorld, SharedWorld>(s, "World")
      .def(py::init<int>(), py::arg("size"))
      .def(py::init<std::vector<int>>(), py::arg("global_ranks"))
      .def_property_readonly("size", &InprocWorld::size)
      .def(
          "group",
          [](SharedWorld world, int rank, const std::string& schedule) {
            return std::make_unique<InprocGroup>(scheduled(std::move(world), rank, schedule));
          },
          py::arg("rank"), py::arg("schedule"));

  s.def(
      "hierarchical_group",
      [](SharedWorld local, int local_rank, SharedWorld across, std::vector<int> node_sizes,
         int node, const std::string& local_schedule, const std::string& across_schedule,
         size_t leaders_up_to_bytes, double timeout_s) {
        return std::make_unique<InprocGroup>(std::make_unique<HierarchicalGroup>(
            scheduled(std::move(local), local_rank, local_schedule),
            across ? scheduled(std::move(across), node, across_schedule) : nullptr,
            Nodes{std::move(node_sizes), node}, leaders_up_to_bytes, Deadline(timeout_s)));
      },
      py::arg("local"), py::arg("local_rank"), py::arg("across").none(true), py::arg("node_sizes"),
      py::arg("node"), py::arg("local_schedule"), py::arg("across_schedule"),
      py::arg("leaders_up_to_bytes"), py::arg("timeout_s"), ReleaseGil());
}

}  // namespace pyar
