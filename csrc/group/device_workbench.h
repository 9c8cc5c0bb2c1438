// The workbench of groups on one lane: it queues its work on their stream.
#pragma once

#include <array>
#include <memory>

#include "group/hierarchical_group.h"
#include "group/nccl_group.h"
#include "group/outgrown.h"

namespace pyar {

// Partial sums keep the dtype: NCCL rounds its own way anyway.
//
// All that uses the scratch is queued on one stream: the phases of a collective, and the next one,
// find it free when their turn comes, without the host or an event between them. Only giving it
// back needs more, and Outgrown does that: memory that has become too small is kept until the
// stream has passed its last use (so that while it grows, both exist), and all of it when the
// workbench goes, which outlives the groups.
class DeviceWorkbench final : public Workbench {
 public:
  // `group` gives the memory, registered with it, and must live during all calls.
  explicit DeviceWorkbench(NcclGroup& group) : group_(group), outgrown_(group.lane()) {}
  ~DeviceWorkbench() override;

  void check_op(Op op) const override { group_.check_op(op); }
  void follow(void* ready) override;
  void* scratch(Use use, size_t bytes) override;
  DType partial_of(DType dtype) const override { return dtype; }
  void assign(Span to, ConstSpan from) override;
  void scale(Span data, double factor) override { group_.scale(data, factor); }

 private:
  NcclGroup& group_;
  Outgrown outgrown_;
  std::array<std::shared_ptr<NcclBuffer>, kNumUses> scratch_;
};

}  // namespace pyar
