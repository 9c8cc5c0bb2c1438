// One rank's engine, with the group of its host's ranks and, once opened, its device.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <pybind11/pybind11.h>
#include <string>
#include <utility>
#include <vector>

#include "base/fork.h"
#include "engine/device_side.h"
#include "engine/engine.h"
#include "group/shared_memory_group.h"

namespace pyar {

// A thread of Python inside the core without the GIL.
struct Caller {
  Caller();
  ~Caller();
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
      const pybind11::gil_scoped_release release;
      body(std::function<void()>([this] { check(); }));
    } catch (const Error&) {
      if (!raised_) throw;
      throw std::move(*raised_);
    }
  }

 private:
  void check();
  int rank_;  // for its peers, who lose it
  std::optional<pybind11::error_already_set> raised_;
};

// Waits without the GIL, and lets Python handle signals, which do not end the work.
void wait_for(Work& work);

class Communicator {
 public:
  Communicator(int local_rank, std::vector<int> global_ranks, const std::string& name,
               const std::string& token, double timeout_s, const std::function<void()>& on_slice);
  ~Communicator() { close(); }

  std::shared_ptr<Work> call(Engine::Task task, uint64_t layout, bool async);
  std::shared_ptr<Work> submit(Engine::Task task, uint64_t layout, const Findings& wanted,
                               std::string subject) {
    return engine_->submit(std::move(task), layout, wanted, std::move(subject));
  }
  std::shared_ptr<SymmetricBuffer> allocate(size_t num_elems, DType dtype, bool one_copy);

  // Once; `connect` gets the host's group as control.
  using Connect = std::function<std::unique_ptr<NcclGroup>(std::shared_ptr<Control>, const Call&)>;
  DeviceSide& open_device(const CudaRuntime& cuda, int device, const Connect& connect);

  int local_rank() const { return group_->rank(); }
  int global_rank() const { return group_->global_rank(); }
  SharedMemoryGroup& group() { return *group_; }

  void refuse_forked_child() const { engine_->refuse_forked_child(); }
  void check_not_failed();
  void close();

 private:
  std::shared_ptr<SharedMemoryGroup> group_;
  std::unique_ptr<DeviceSide, DeleteByOwner> device_;
  std::unique_ptr<Engine, DeleteByOwner> engine_;  // first to go: its worker uses the others
};

}  // namespace pyar
