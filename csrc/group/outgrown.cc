#include "group/outgrown.h"

#include <chrono>
#include <thread>
#include <utility>

#include "base/error.h"
#include "base/wait.h"

namespace pyar {
namespace {

void never_give_back(std::shared_ptr<const void> memory) {
  new std::shared_ptr<const void>(std::move(memory));
}

}  // namespace

Outgrown::~Outgrown() {
  if (!owner_.is_this_one()) return;
  const Deadline deadline(kEndS);
  for (release(); !kept_.empty() && !deadline.passed(); release())
    std::this_thread::sleep_for(std::chrono::duration<double>(kPollS));
  for (Memory& memory : kept_) never_give_back(std::move(memory.owner));
}

void Outgrown::keep(std::shared_ptr<const void> memory) noexcept {
  if (!memory || !owner_.is_this_one()) return;
  release();
  try {
    const DeviceScope scope(lane_->cuda(), lane_->device());
    auto mark = std::make_unique<Event>(lane_->cuda(), Event::Timing::kNo);
    mark->record(lane_->stream());
    kept_.push_back({memory, std::move(mark)});
  } catch (const Error&) {  // of a broken device: nobody knows what it does
    never_give_back(std::move(memory));
  }
}

// Of a broken device nobody knows.
bool Outgrown::is_unused(const Memory& memory) const try {
  return memory.mark->has_passed();
} catch (const Error&) {
  return false;
}

void Outgrown::release() {
  std::erase_if(kept_, [&](const Memory& memory) { return is_unused(memory); });
}

}  // namespace pyar
