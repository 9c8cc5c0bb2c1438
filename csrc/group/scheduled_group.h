// Schedule x transport x kernels: the collectives between ranks that share no memory.
#pragma once

#include <memory>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "base/error.h"
#include "group/fingerprint.h"
#include "group/group.h"
#include "group/host_memory.h"
#include "schedules/schedule.h"
#include "transport/transport.h"

namespace pyar {

class ScheduledGroup final : public Group {
 public:
  // `schedule` names the all-reduce (schedules/registry.h), on all ranks the same one. The other
  // collectives are rings and a tree. UsageError for a name that is not there.
  ScheduledGroup(std::unique_ptr<Transport> transport, std::string_view schedule);

  int rank() const override { return transport_->rank(); }
  int size() const override { return transport_->size(); }

  void all_reduce(Span data, Op op, const Call& call) override;
  void reduce_scatter(Span output, ConstSpan input, Op op, const Call& call) override;
  void all_gather(Span output, ConstSpan input, const Call& call) override;
  void broadcast(Span data, int root, const Call& call) override;
  void barrier(const Call& call) override;
  void fail(const Error& cause) override;

 private:
  struct Plan {
    explicit Plan(Schedule schedule);
    Schedule schedule;
    // By chunk: the last step in which this rank takes part in adding it up, be it that it passes
    // its partial sum on or that it receives what makes the total. Chunks that are received
    // together become totals together.
    std::vector<int> last_reducing_step;
  };

  // Returns only after every rank has made the same call: none may leave a collective unaware that
  // another disagrees. An all-reduce proves that by its own messages, every other kind calls this
  // first. It sends bare headers along the all-reduce schedule, so that ranks that disagree start
  // out listening to the same peers, and one of them hears it; two different patterns could wait
  // for each other until the deadline.
  void agree(const Fingerprint& mine, const Call& call);
  // In place on `data`, cut into the schedule's chunks.
  void execute(const Plan& plan, Span data, Op op, const Fingerprint& mine, const Call& call);
  void combine(const Plan& plan, int step_index, Span data, Op op);
  MismatchError mismatch(const Fingerprint& mine) const;

  std::unique_ptr<Transport> transport_;
  Plan all_reduce_, reduce_scatter_, all_gather_;
  Scratch wide_;   // 16-bit floats while they are float32; the input of reduce_scatter
  Scratch inbox_;  // what waits to be combined
  std::vector<Outgoing> outgoing_;
  std::vector<Incoming> incoming_;
  std::vector<std::pair<int, const void*>> contributions_;  // with the rank they come from
  std::vector<const void*> sources_;
};

}  // namespace pyar
