#include "group/staged_group.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "base/error.h"

namespace pyar {

StagedGroup::StagedGroup(std::unique_ptr<Group> inner, NcclGroup& beside)
    : inner_(std::move(inner)),
      beside_(beside),
      lane_(beside.lane()),
      mark_([&] {
        const DeviceScope scope(lane_->cuda(), lane_->device());
        return Event(lane_->cuda(), Event::Timing::kNo);
      }()),
      outgrown_(lane_) {}

StagedGroup::~StagedGroup() {
  for (Room& room : rooms_) outgrown_.keep(std::move(room.memory));
}

void StagedGroup::all_reduce(Span data, Op op, const Call& call) {
  const Span staged = room(kOutput, data);
  copy(staged, data);
  wait_for_device(call);
  inner_->all_reduce(staged, op, call);
  copy(data, staged);
}

void StagedGroup::reduce_scatter(Span output, ConstSpan input, Op op, const Call& call) {
  const Span staged = room(kOutput, output), staged_input = room(kInput, input);
  copy(staged_input, input);
  wait_for_device(call);
  inner_->reduce_scatter(staged, staged_input, op, call);
  copy(output, staged);
}

void StagedGroup::all_gather(Span output, ConstSpan input, const Call& call) {
  const Span staged = room(kOutput, output), staged_input = room(kInput, input);
  copy(staged_input, input);
  wait_for_device(call);
  inner_->all_gather(staged, staged_input, call);
  copy(output, staged);
}

void StagedGroup::broadcast(Span data, int root, const Call& call) {
  const Span staged = room(kOutput, data);
  if (rank() == root) copy(staged, data);
  wait_for_device(call);
  inner_->broadcast(staged, root, call);
  if (rank() != root) copy(data, staged);
}

Span StagedGroup::room(Side side, ConstSpan data) {
  Room& room = rooms_[side];
  if (data.bytes() > room.bytes) {
    outgrown_.keep(std::move(room.memory));
    room = {};
    room = {std::make_shared<PinnedMemory>(lane_->cuda(), data.bytes()), data.bytes()};
  }
  return {room.memory ? room.memory->data() : nullptr, data.num_elems, data.dtype};
}

void StagedGroup::copy(Span to, ConstSpan from) {
  if (from.num_elems == 0) return;
  lane_->cuda().memcpy_async(to.data, from.data, from.bytes(), kCudaMemcpyDefault, lane_->stream());
}

void StagedGroup::wait_for_device(const Call& call) {
  mark_.record(lane_->stream());
  const auto sleep = [](double slice_s) {
    std::this_thread::sleep_for(std::chrono::duration<double>(std::min(slice_s, kPollS)));
  };
  const auto watch = [&](bool late) {
    beside_.check();
    if (late)
      throw TimeoutError(
          "this rank's device had not finished what comes before a collective "
          "between nodes after " +
              seconds(call.deadline.timeout_s()),
          {});
  };
  await(call.deadline, call.patience, [&] { return mark_.has_passed(); }, sleep, watch);
  beside_.check();  // an abort, too, lets the device go on
}

}  // namespace pyar
