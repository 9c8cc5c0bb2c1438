// One rank's engine over the ranks of its host.
#include <atomic>
#include <optional>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <thread>

#include "base/error.h"
#include "base/fork.h"
#include "bindings/rooms.h"
#include "engine/engine.h"
#include "group/shared_memory_group.h"

namespace py = pybind11;

namespace pyar {
namespace {

// Threads of Python inside the core without the GIL.
std::atomic<int> num_callers{0};

struct Caller {
  Caller() { ++num_callers; }
  ~Caller() { --num_callers; }
};

// Lets Python handle signals while a call waits without the GIL. A handler that raises (Ctrl-C)
// ends the wait: the core sees an Error, the caller of this call the exception of the handler.
class SignalCheck {
 public:
  explicit SignalCheck(int rank) : rank_(rank) {}

  template <typename Body>
  void run(Body body) {
    const Caller caller;
    try {
      const py::gil_scoped_release release;
      body(std::function<void()>([this] { check(); }));
    } catch (const Error&) {
      if (!raised_) throw;
      throw std::move(*raised_);
    }
  }

 private:
  void check() {
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() == 0) return;
    raised_.emplace();
    throw PeerError("rank " + std::to_string(rank_) +
                        " was interrupted by a signal; its communicator cannot be used any more",
                    {rank_});
  }
  int rank_;  // for its peers, who lose it
  std::optional<py::error_already_set> raised_;
};

Patience patience_for(int local_size) {
  cpu_set_t cores;
  const bool known = sched_getaffinity(0, sizeof cores, &cores) == 0;
  const int count =
      known ? CPU_COUNT(&cores) : static_cast<int>(std::thread::hardware_concurrency());
  return local_size <= count ? kSpinFirst : kYieldFirst;
}

class Communicator {
 public:
  Communicator(int local_rank, std::vector<int> global_ranks, const std::string& name,
               const std::string& token, double timeout_s, const std::function<void()>& on_slice) {
    const Deadline deadline(timeout_s, &on_slice);
    const Patience patience = patience_for(static_cast<int>(global_ranks.size()));
    auto group = std::make_unique<SharedMemoryGroup>(
        HostLink(local_rank, std::move(global_ranks), name, token, deadline), deadline);
    group_ = group.get();
    engine_.reset(new Engine(std::move(group), timeout_s, patience));
  }
  ~Communicator() { close(); }

  std::shared_ptr<Work> call(Engine::Task task, uint64_t layout, bool async) {
    if (async) return engine_->submit(std::move(task), layout);
    SignalCheck(global_rank()).run([&](const std::function<void()>& on_slice) {
      engine_->run(task, layout, on_slice);
    });
    return nullptr;
  }

  std::shared_ptr<Work> submit(Engine::Task task, uint64_t layout, const Findings& wanted,
                               std::string subject) {
    return engine_->submit(std::move(task), layout, wanted, std::move(subject));
  }

  std::shared_ptr<SymmetricBuffer> allocate(size_t num_elems, DType dtype, bool one_copy) {
    std::shared_ptr<SymmetricBuffer> buffer;
    call(
        [&, group = group_](Group&, const Call& call) {
          buffer = group->allocate(num_elems, dtype, one_copy, call);
        },
        0, false);
    return buffer;
  }

  int local_rank() const { return group_->rank(); }
  int global_rank() const { return group_->global_rank(); }
  SharedMemoryGroup& group() { return *group_; }

  void refuse_forked_child() const { engine_->refuse_forked_child(); }
  void check_not_failed() { engine_->check_not_failed(); }

  void close() {
    if (engine_->is_forked_child()) return;  // it is the parent's
    engine_->close([this] { group_->interrupt(); });
    group_->leave();
  }

 private:
  std::unique_ptr<Engine, DeleteByOwner> engine_;  // owns the group
  SharedMemoryGroup* group_;
};

// What symmetric_empty gives to Python: this rank's part as a writable buffer of bytes.
struct Part {
  std::shared_ptr<SymmetricBuffer> buffer;
  int rank;
};

void* address(uintptr_t value) { return reinterpret_cast<void*>(value); }

// The parameters of a bucket, fixed when the aggregator is built; scalars come anew with each
// update.
struct UpdatePlan {
  struct Entry {
    size_t begin, num_elems, group;
  };
  std::vector<Entry> entries;
  size_t flags_begin;
};

// Of a param group: the rule's factors, and what an unused parameter's momentum is multiplied by.
using GroupFactors = std::pair<SgdScalars, double>;

std::vector<UpdatePiece> pieces_of(const UpdatePlan& plan,
                                   const std::vector<GroupFactors>& groups) {
  std::vector<UpdatePiece> pieces;
  pieces.reserve(plan.entries.size());
  for (const auto& entry : plan.entries) {
    const auto& [scalars, idle_scale] = groups.at(entry.group);
    pieces.push_back({entry.begin, entry.num_elems, scalars, idle_scale});
  }
  return pieces;
}

}  // namespace

void bind_communicator(py::module_& m) {
  m.def("num_callers", [] { return num_callers.load(); });
  m.def("forget_callers", [] { num_callers = 0; });

  py::class_<Work, std::shared_ptr<Work>>(m, "Work")
      .def("wait",
           [](Work& work) {
             const Caller caller;
             bool done = false;
             while (!done) {
               {
                 const py::gil_scoped_release release;
                 done = work.wait_for(kWatchSliceS);
               }
               if (!done && PyErr_CheckSignals() != 0) throw py::error_already_set();
             }
           })
      .def("done", &Work::done)
      .def("times",
           [](const Work& work) {
             const Work::Times& times = work.times();
             return py::make_tuple(times.enqueued_s, times.start_s, times.end_s, times.arrivals_s);
           })
      .def("findings", [](const Work& work) {
        const Findings& f = work.findings();
        py::object nonfinite = py::none();
        if (f.has_nonfinite) {
          const bool known = f.nonfinite_rank != Findings::kNoRank;
          nonfinite =
              py::make_tuple(known ? py::cast(f.nonfinite_rank) : py::none(), f.nonfinite_elem);
        }
        return py::make_tuple(f.sum_squares, nonfinite);
      });

  py::class_<Part>(m, "Part", py::buffer_protocol()).def_buffer([](Part& part) {
    return py::buffer_info(part.buffer->part(part.rank), 1, "B",
                           static_cast<py::ssize_t>(part.buffer->part_bytes));
  });

  py::class_<UpdatePlan>(m, "UpdatePlan")
      .def(py::init(
          [](const std::vector<std::tuple<size_t, size_t, size_t>>& entries, size_t flags_begin) {
            UpdatePlan plan{{}, flags_begin};
            for (const auto& [begin, num_elems, group] : entries)
              plan.entries.push_back({begin, num_elems, group});
            return plan;
          }));

  using C = Communicator;
  py::class_<C>(m, "Communicator")
      .def(py::init([](int local_rank, const std::vector<int>& global_ranks,
                       const std::string& name, const std::string& token, double timeout_s) {
             std::unique_ptr<C> made;
             const int rank = global_ranks.at(static_cast<size_t>(local_rank));
             SignalCheck(rank).run([&](const std::function<void()>& on_slice) {
               made =
                   std::make_unique<C>(local_rank, global_ranks, name, token, timeout_s, on_slice);
             });
             return made;
           }),
           py::arg("local_rank"), py::arg("global_ranks"), py::arg("name"), py::arg("token"),
           py::arg("timeout_s"))
      .def("all_reduce",
           [](C& self, uintptr_t data, size_t num_elems, DType dtype, Op op, uint64_t layout,
              bool async) {
             const Span span{address(data), num_elems, dtype};
             return self.call(
                 [=](Group& group, const Call& call) { group.all_reduce(span, op, call); }, layout,
                 async);
           })
      .def("reduce_scatter",
           [](C& self, uintptr_t output, uintptr_t input, size_t num_elems, DType dtype, Op op,
              bool async) {
             const Span to{address(output), num_elems, dtype};
             return self.call(
                 [=](Group& group, const Call& call) {
                   const auto ranks = static_cast<size_t>(group.size());
                   group.reduce_scatter(to, {address(input), num_elems * ranks, dtype}, op, call);
                 },
                 0, async);
           })
      .def("all_gather",
           [](C& self, uintptr_t output, uintptr_t input, size_t num_elems, DType dtype,
              bool async) {
             const ConstSpan from{address(input), num_elems, dtype};
             return self.call(
                 [=](Group& group, const Call& call) {
                   const auto ranks = static_cast<size_t>(group.size());
                   group.all_gather({address(output), num_elems * ranks, dtype}, from, call);
                 },
                 0, async);
           })
      .def("broadcast",
           [](C& self, uintptr_t data, size_t num_elems, DType dtype, int root, uint64_t layout,
              bool async) {
             const Span span{address(data), num_elems, dtype};
             return self.call(
                 [=](Group& group, const Call& call) { group.broadcast(span, root, call); }, layout,
                 async);
           })
      .def("barrier",
           [](C& self, uint64_t layout) {
             self.call([](Group& group, const Call& call) { group.barrier(call); }, layout, false);
           })
      .def("raise_mismatch",
           [](C& self, const std::string& message, const std::vector<int>& peers) {
             self.call([=](Group&, const Call&) { throw MismatchError(message, peers); }, 0, false);
           })
      .def("aggregate",
           [](C& self, uintptr_t data, size_t num_elems, DType dtype, Op op, uint64_t layout,
              size_t watched_elems, bool norm_is_wanted, std::string subject) {
             const Span span{address(data), num_elems, dtype};
             return self.submit(
                 [=](Group& group, const Call& call) { group.all_reduce(span, op, call); }, layout,
                 {.num_elems = watched_elems, .norm_is_wanted = norm_is_wanted},
                 std::move(subject));
           })
      .def("update",
           [](C& self, const UpdatePlan& plan, const std::vector<GroupFactors>& groups,
              uintptr_t gradients, size_t num_elems, uintptr_t weights, uintptr_t momentum,
              DType dtype, double scale, bool is_reduced, uint64_t layout, std::string subject) {
             return self.submit(
                 [=, &group = self.group(), pieces = pieces_of(plan, groups),
                  flags_begin = plan.flags_begin](Group&, const Call& call) {
                   group.update({.gradients = {address(gradients), num_elems, dtype},
                                 .weights = {address(weights), flags_begin, dtype},
                                 .momentum = address(momentum),
                                 .pieces = pieces,
                                 .flags_begin = flags_begin,
                                 .is_reduced = is_reduced,
                                 .scale = scale},
                                call);
                 },
                 layout, {}, std::move(subject));
           })
      .def("allocate",
           [](C& self, size_t num_elems, DType dtype, bool one_copy) {
             return Part{self.allocate(num_elems, dtype, one_copy), self.local_rank()};
           })
      .def("refuse_forked_child", &C::refuse_forked_child)
      .def("check_not_failed", &C::check_not_failed)
      .def("close", &C::close, py::call_guard<py::gil_scoped_release>());

  py::enum_<DType> dtype(m, "DType");
  for (int i = 0; i < kNumDTypes; ++i)
    dtype.value(name_of(static_cast<DType>(i)), static_cast<DType>(i));
  py::enum_<Op> op(m, "Op");
  for (int i = 0; i < kNumOps; ++i) op.value(name_of(static_cast<Op>(i)), static_cast<Op>(i));
}

}  // namespace pyar
