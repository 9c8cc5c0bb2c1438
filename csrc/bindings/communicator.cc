#include "bindings/communicator.h"

#include <atomic>
#include <pybind11/stl.h>
#include <sched.h>
#include <thread>

#include "base/error.h"
#include "bindings/collectives.h"
#include "bindings/convert.h"
#include "bindings/rooms.h"

namespace py = pybind11;

namespace pyar {
namespace {

// Threads of Python inside the core without the GIL.
std::atomic<int> num_callers{0};

Patience patience_for(int local_size) {
  cpu_set_t cores;
  const bool known = sched_getaffinity(0, sizeof cores, &cores) == 0;
  const int count =
      known ? CPU_COUNT(&cores) : static_cast<int>(std::thread::hardware_concurrency());
  return local_size <= count ? kSpinFirst : kYieldFirst;
}

}  // namespace

Caller::Caller() { ++num_callers; }
Caller::~Caller() { --num_callers; }

void SignalCheck::check() {
  const py::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() == 0) return;
  raised_.emplace();
  throw PeerError("rank " + std::to_string(rank_) +
                      " was interrupted by a signal; its communicator cannot be used any more",
                  {rank_});
}

void wait_for(Work& work) {
  const Caller caller;
  bool done = false;
  while (!done) {
    {
      const py::gil_scoped_release release;
      done = work.wait_for(kWatchSliceS);
    }
    if (!done && PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

Communicator::Communicator(int local_rank, std::vector<int> global_ranks, const std::string& name,
                           const std::string& token, double timeout_s,
                           const std::function<void()>& on_slice) {
  const Deadline deadline(timeout_s, &on_slice);
  const Patience patience = patience_for(static_cast<int>(global_ranks.size()));
  group_ = std::make_shared<SharedMemoryGroup>(
      HostLink(local_rank, std::move(global_ranks), name, token, deadline), deadline);
  engine_.reset(new Engine(group_, timeout_s, patience));
}

std::shared_ptr<Work> Communicator::call(Engine::Task task, uint64_t layout, bool async) {
  if (async) return engine_->submit(std::move(task), layout);
  SignalCheck(global_rank()).run([&](const std::function<void()>& on_slice) {
    engine_->run(task, layout, on_slice);
  });
  return nullptr;
}

std::shared_ptr<SymmetricBuffer> Communicator::allocate(size_t num_elems, DType dtype,
                                                        bool one_copy) {
  std::shared_ptr<SymmetricBuffer> buffer;
  call([&](Group&,
           const Call& call) { buffer = group_->allocate(num_elems, dtype, one_copy, call); },
       0, false);
  return buffer;
}

DeviceSide& Communicator::open_device(const CudaRuntime& cuda, int device, const Connect& connect) {
  refuse_forked_child();
  if (device_) throw UsageError("this communicator has opened its device already");
  device_.reset(new DeviceSide(cuda, device, [control = group_, connect](const Call& call) {
    return connect(control, call);
  }));
  return *device_;
}

void Communicator::check_not_failed() {
  engine_->check_not_failed();
  if (device_) device_->check();
}

void Communicator::close() {
  if (engine_->is_forked_child()) return;  // it is the parent's
  const auto interrupt = [this] { group_->interrupt(); };
  if (device_)
    engine_->close(interrupt, [this] { device_->leave(); });  // NCCL may hang in a call
  else
    engine_->close(interrupt);
  group_->leave();
}

namespace {

// What symmetric_empty gives to Python: this rank's part as a writable buffer of bytes.
struct Part {
  std::shared_ptr<SymmetricBuffer> buffer;
  int rank;
};

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
      .def("wait", &wait_for)
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
  py::class_<C> communicator(m, "Communicator");
  bind_collectives(communicator);
  communicator
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
      .def("barrier",
           [](C& self, uint64_t layout) {
             self.call([](Group& group, const Call& call) { group.barrier(call); }, layout, false);
           })
      .def("raise_mismatch",
           [](C& self, const std::string& message, const std::vector<int>& peers) {
             self.call([=](Group&, const Call&) { throw MismatchError(message, peers); }, 0, false);
           })
      .def("aggregate",
           [](C& self, Address data, size_t num_elems, DType dtype, Op op, uint64_t layout,
              size_t watched_elems, bool norm_is_wanted, std::string subject) {
             const Span span{pointer(data), num_elems, dtype};
             return self.submit(
                 [=](Group& group, const Call& call) { group.all_reduce(span, op, call); }, layout,
                 {.num_elems = watched_elems, .norm_is_wanted = norm_is_wanted},
                 std::move(subject));
           })
      .def("update",
           [](C& self, const UpdatePlan& plan, const std::vector<GroupFactors>& groups,
              Address gradients, size_t num_elems, Address weights, Address momentum, DType dtype,
              double scale, bool is_reduced, uint64_t layout, std::string subject) {
             return self.submit(
                 [=, &group = self.group(), pieces = pieces_of(plan, groups),
                  flags_begin = plan.flags_begin](Group&, const Call& call) {
                   group.update({.gradients = {pointer(gradients), num_elems, dtype},
                                 .weights = {pointer(weights), flags_begin, dtype},
                                 .momentum = pointer(momentum),
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
