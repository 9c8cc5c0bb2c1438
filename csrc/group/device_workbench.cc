#include "group/device_workbench.h"

#include <utility>

namespace pyar {

DeviceWorkbench::~DeviceWorkbench() {
  for (auto& memory : scratch_) outgrown_.keep(std::move(memory));
}

void DeviceWorkbench::follow(void* ready) {
  const NcclLane& lane = *group_.lane();
  if (ready) lane.cuda().stream_wait_event(lane.stream(), ready, 0);
}

void* DeviceWorkbench::scratch(Use use, size_t bytes) {
  std::shared_ptr<NcclBuffer>& memory = scratch_[use];
  if (bytes > (memory ? memory->bytes() : 0)) {
    outgrown_.keep(std::exchange(memory, nullptr));
    memory = group_.allocate(bytes);
  }
  return memory ? memory->data() : nullptr;
}

void DeviceWorkbench::assign(Span to, ConstSpan from) {
  if (from.num_elems == 0 || to.data == from.data) return;
  const NcclLane& lane = *group_.lane();
  lane.cuda().memcpy_async(to.data, from.data, from.bytes(), kCudaMemcpyDefault, lane.stream());
}

}  // namespace pyar
