// Collectives of tensors on a device.
#include <limits>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "base/env.h"
#include "bindings/collectives.h"
#include "bindings/communicator.h"
#include "bindings/convert.h"
#include "bindings/rooms.h"
#include "kernels/cuda/cuda_kernels.h"

namespace py = pybind11;

namespace pyar {
namespace {

// What computes on the device's memory. Tasks hold it by value: they may outlive who submits them.
class Kernels {
 public:
  // `is_mocked`: device memory is the host's, for tests.
  Kernels(const CudaRuntime& cuda, bool is_mocked) : cuda_(&cuda), is_mocked_(is_mocked) {
    if (is_mocked) table_ = &cuda_twin();
#ifdef PYALLREDUCE_HAVE_CUDA
    if (!is_mocked) table_ = &cuda_kernels();
#endif
  }

  // Not where CUDA was not compiled in.
  bool exist() const { return table_ != nullptr; }
  const CudaKernels* operator->() const { return table_; }
  Launch on(CudaStream stream) const {
    // The twin computes at once.
    if (is_mocked_) cuda_->stream_synchronize(stream);
    return {.stream = stream, .max_blocks = 0};
  }

 private:
  const CudaRuntime* cuda_;
  bool is_mocked_;
  const CudaKernels* table_ = nullptr;
};

NcclGroup::Scale scale_by(const Kernels& kernels) {
  if (!kernels.exist()) return nullptr;
  return [kernels](Span data, double factor, CudaStream stream) {
    const ReduceSpans spans{&data.data, 1, &data.data, 1, data.num_elems, nullptr};
    kernels->reduce(data.dtype, factor, spans, kernels.on(stream));
  };
}

// A task on its way to the device.
class DeviceWork {
 public:
  DeviceWork(std::shared_ptr<Work> work, DeviceSide& side, std::shared_ptr<DeviceTimes> times)
      : work_(std::move(work)), side_(side), times_(std::move(times)) {}

  // Until it has been launched; from then on `stream` waits for it.
  void wait(Address stream) {
    wait_for(*work_);
    side_.hold_back(pointer(stream), work_->sequence());
  }
  // Also of what a task has queued behind its collective.
  void wait_launched() { wait_for(*work_); }
  bool done() const { return work_->done() && side_.has_ended(work_->sequence()); }
  // As Work's; start and end are the device's, None before it has got there.
  py::tuple times() const {
    const Work::Times& host = work_->times();
    const auto begun = times_->begun.passed_s(), ended = times_->ended.passed_s();
    return py::make_tuple(host.enqueued_s, begun, ended, host.arrivals_s);
  }

 private:
  std::shared_ptr<Work> work_;
  DeviceSide& side_;
  std::shared_ptr<DeviceTimes> times_;
};

// The device's half of a communicator.
class Device {
 public:
  Device(Communicator& comm, const CudaRuntime& cuda, const NcclLibrary& nccl, int device,
         bool is_mocked)
      : comm_(comm),
        kernels_(cuda, is_mocked),
        side_(comm.open_device(cuda, device,
                               [&cuda, &nccl, device, scale = scale_by(kernels_)](
                                   std::shared_ptr<Control> control, const Call& call) {
                                 return std::make_unique<NcclGroup>(
                                     nccl, cuda, device, std::move(control), scale, call);
                               })) {}

  std::unique_ptr<DeviceWork> call(DeviceSide::Body body, uint64_t layout, bool async,
                                   Address stream) {
    if (async) return submit(std::move(body), layout, stream, "");
    comm_.refuse_forked_child();  // before CUDA, which does not work there
    // Nobody asks when a synchronous call began or ended.
    comm_.call(side_.task(pointer(stream), std::move(body)), layout, /*async=*/false);
    side_.hold_back(pointer(stream), kAllSoFar);
    return nullptr;
  }

  std::unique_ptr<DeviceWork> submit(DeviceSide::Body body, uint64_t layout, Address stream,
                                     std::string subject) {
    comm_.refuse_forked_child();
    auto times = std::make_shared<DeviceTimes>();
    Engine::Task task = side_.task(pointer(stream), std::move(body), times);
    return std::make_unique<DeviceWork>(
        comm_.submit(std::move(task), layout, {}, std::move(subject)), side_, std::move(times));
  }

  DeviceSide& side() { return side_; }
  const Kernels& kernels() const { return kernels_; }

 private:
  static constexpr uint64_t kAllSoFar = std::numeric_limits<uint64_t>::max();

  Communicator& comm_;
  const Kernels kernels_;
  DeviceSide& side_;
};

struct Memory {
  std::shared_ptr<NcclBuffer> buffer;
};

using Folders = std::vector<std::string>;

}  // namespace

void bind_device_side(py::module_& m) {
  py::class_<Mark>(m, "Mark").def("passed_s", &Mark::passed_s);

  using ReleaseGil = py::call_guard<py::gil_scoped_release>;
  py::class_<DeviceWork>(m, "DeviceWork")
      .def("wait", &DeviceWork::wait, py::arg("stream"))
      .def("wait_launched", &DeviceWork::wait_launched)
      .def("done", &DeviceWork::done)
      .def("times", &DeviceWork::times);

  py::class_<Memory>(m, "DeviceMemory")
      .def_property_readonly(
          "address",
          [](const Memory& memory) { return reinterpret_cast<Address>(memory.buffer->data()); })
      .def_property_readonly("bytes", [](const Memory& memory) { return memory.buffer->bytes(); });

  py::class_<Device> device(m, "Device");
  bind_collectives<Address>(device);
  device
      .def(py::init([](Communicator& comm, int index, const Folders& runtime_folders,
                       const Folders& nccl_folders, bool is_mocked) {
             const Env env = read_env();
             return std::make_unique<Device>(comm, CudaRuntime::load(env.cudart, runtime_folders),
                                             NcclLibrary::load(env.nccl, nccl_folders), index,
                                             is_mocked);
           }),
           py::keep_alive<1, 2>(), py::arg("comm"), py::arg("index"), py::arg("runtime_folders"),
           py::arg("nccl_folders"), py::arg("is_mocked") = false)
      .def_property_readonly("index", [](Device& self) { return self.side().device(); })
      .def_property_readonly("has_kernels", [](Device& self) { return self.kernels().exist(); })
      .def("aggregate",
           [](Device& self, Address data, size_t num_elems, DType dtype, Op op, uint64_t layout,
              std::string subject, Address stream) {
             const Span span{pointer(data), num_elems, dtype};
             return self.submit(
                 [=](Group& group, const Call& call) { group.all_reduce(span, op, call); }, layout,
                 stream, std::move(subject));
           })
      // Sums the ranks' gradients, then runs `table` over them: the arguments of the kernel that
      // are equal in all iterations come with it. It must live until the work is done.
      .def(
          "update",
          [](Device& self, const UpdateTable& table, Address image,
             const std::vector<UpdateRule>& rules, Address gradients, size_t num_elems, DType dtype,
             size_t flags_begin, double scale, uint64_t layout, std::string subject,
             Address stream) {
            const Span span{pointer(gradients), num_elems, dtype};
            const Kernels kernels = self.kernels();
            if (!kernels.exist())
              throw UsageError(
                  "this needs the CUDA kernels, without which this installation was built; install "
                  "with nvcc on PATH");
            auto body = [=, &table](NcclGroup& group, const Call& call) {
              group.all_reduce(span, Op::kSum, call);
              UpdateCall update{.table = pointer(image)};
              update.flags = pointer<char>(gradients) + flags_begin * size_of(dtype);
              update.rules = rules.data();
              update.num_rules = rules.size();
              update.scale = scale;
              update.zero_gradients = true;
              update.gate.aborted = reinterpret_cast<const uint32_t*>(&group.aborted());
              kernels->update(table, update, kernels.on(group.stream()));
            };
            return self.submit(std::move(body), layout, stream, std::move(subject));
          })
      // Of all that has been launched, with what was queued behind it.
      .def("hold_back",
           [](Device& self, Address stream) { self.side().hold_back(pointer(stream)); })
      .def("mark", [](Device& self, Address stream) { return self.side().mark(pointer(stream)); })
      .def_property_readonly(
          "aborted", [](Device& self) { return reinterpret_cast<Address>(&self.side().aborted()); })
      .def(
          "allocate",
          [](Device& self, size_t bytes) { return Memory{self.side().allocate(bytes)}; },
          ReleaseGil());
}

}  // namespace pyar
