#include "group/nccl_group.h"

#include <utility>

#include "base/error.h"

namespace pyar {

NcclGroup::NcclGroup(Parts parts) : parts_(std::move(parts)) {
  try {
    const DeviceScope scope(parts_.cuda, parts_.device);
    lane_ = parts_.lane ? parts_.lane : std::make_shared<NcclLane>(parts_.cuda, parts_.device);
    watch_ = std::make_shared<NcclWatch>(nccl_, lane_, parts_.control);
    lane_->enter(watch_);
  } catch (const Error& error) {
    control_.report(error);  // or the others would wait for this rank
    throw;
  }
  watching_ = std::thread([watch = watch_] { watch->run(); });
}

NcclGroup::NcclGroup(const NcclLibrary& nccl, const CudaRuntime& cuda, int device,
                     std::shared_ptr<Control> control, Scale scale, const Call& call)
    : NcclGroup(Parts{nccl, cuda, device, std::move(control), std::move(scale), nullptr}) {
  watch_->guarded([&] { connect(call); });
}

// Ranks that have found different versions hear of it here, from all; NCCL would tell some.
void NcclGroup::connect(const Call& call) {
  const std::string subject = "the unique id of NCCL " + NcclLibrary::name_of(nccl_.version());
  Call announced = call;
  announced.layout = static_cast<uint64_t>(nccl_.version());
  announced.subject = subject;
  NcclUniqueId id{};
  if (rank() == 0) nccl_.get_unique_id(&id);
  control_.broadcast({&id, sizeof id, DType::kUInt8}, 0, announced);

  const DeviceScope scope(parts_.cuda, parts_.device);
  // Not blocking: or neither the deadline nor a death would end it, and an abort would not be safe.
  wanted_ = std::make_unique<Wanted>(NcclConfig{.blocking = 0});
  const int status = nccl_.comm_init.status(&wanted_->comm, size(), id, rank(), &wanted_->config);
  watch_->connect(wanted_->comm, nccl_.comm_init.name(), status, call);
}

NcclGroup::~NcclGroup() { leave(); }

void NcclGroup::fail(const Error& cause) { watch_->end_by(cause); }

void NcclGroup::leave() {
  if (!owner_.is_this_one()) return;
  const std::lock_guard lock(leaving_);
  if (!watching_.joinable()) return;
  const bool is_over = watch_->close();
  control_.leave();
  // NCCL may not come back from an abort; the thread keeps alive what it needs.
  is_over ? watching_.join() : watching_.detach();
}

// ---------------------------------------------------------------------------------------------------------------
// Collectives

void NcclGroup::launch(const char* function, const Fingerprint& mine, const Call& call,
                       const std::function<int(NcclComm)>& begin, Span result, Op op) {
  watch_->guarded([&] {
    control_.agree(mine, call);
    if (mine.num_elems == 0) return;
    const DeviceScope scope(parts_.cuda, parts_.device);
    if (call.ready) parts_.cuda.stream_wait_event(stream(), call.ready, 0);
    NcclWatch::Flight flight = watch_->begin_flight(mine, call);
    watch_->call(function, begin, call);
    if (op == Op::kAvg) scale(result, 1.0 / size());
    latest_ = watch_->end_flight(std::move(flight));
  });
}

// Before anything is sent.
void NcclGroup::check_op(Op op) const {
  if (op == Op::kAvg && !parts_.scale)
    throw UsageError(
        "an average on a device needs the CUDA kernels, without which this installation was built; "
        "sum, and scale the result");
}

void NcclGroup::scale(Span data, double factor) {
  const DeviceScope scope(parts_.cuda, parts_.device);
  parts_.scale(data, factor, stream());
}

void NcclGroup::all_reduce(Span data, Op op, const Call& call) {
  check_op(op);
  launch(
      nccl_.all_reduce.name(),
      fingerprint(Kind::kAllReduce, data.num_elems, data.dtype, static_cast<uint32_t>(op), kNoRoot,
                  call),
      call,
      [&](NcclComm comm) {
        return nccl_.all_reduce.status(data.data, data.data, data.num_elems, nccl_dtype(data.dtype),
                                       nccl_op(op), comm, stream());
      },
      data, op);
}

void NcclGroup::reduce_scatter(Span output, ConstSpan input, Op op, const Call& call) {
  check_op(op);
  launch(
      nccl_.reduce_scatter.name(),
      fingerprint(Kind::kReduceScatter, input.num_elems, input.dtype, static_cast<uint32_t>(op),
                  kNoRoot, call),
      call,
      [&](NcclComm comm) {
        return nccl_.reduce_scatter.status(input.data, output.data, output.num_elems,
                                           nccl_dtype(output.dtype), nccl_op(op), comm, stream());
      },
      output, op);
}

void NcclGroup::all_gather(Span output, ConstSpan input, const Call& call) {
  launch(nccl_.all_gather.name(),
         fingerprint(Kind::kAllGather, output.num_elems, output.dtype, kNoOp, kNoRoot, call), call,
         [&](NcclComm comm) {
           return nccl_.all_gather.status(input.data, output.data, input.num_elems,
                                          nccl_dtype(input.dtype), comm, stream());
         });
}

void NcclGroup::broadcast(Span data, int root, const Call& call) {
  const int global_root = control_.global_ranks()[static_cast<size_t>(root)];
  launch(nccl_.broadcast.name(),
         fingerprint(Kind::kBroadcast, data.num_elems, data.dtype, kNoOp, global_root, call), call,
         [&](NcclComm comm) {
           return nccl_.broadcast.status(data.data, data.data, data.num_elems,
                                         nccl_dtype(data.dtype), root, comm, stream());
         });
}

void NcclGroup::barrier(const Call& call) {
  watch_->guarded([&] {
    control_.agree(fingerprint(Kind::kBarrier, 0, DType::kUInt8, kNoOp, kNoRoot, call), call);
  });
}

// ---------------------------------------------------------------------------------------------------------------
// Smaller groups, and memory

std::unique_ptr<NcclGroup> NcclGroup::split(int color, std::shared_ptr<Control> control,
                                            const Call& call) {
  std::unique_ptr<NcclGroup> part;
  watch_->guarded([&] {
    control_.agree(fingerprint(Kind::kSplit, 0, DType::kUInt8, kNoOp, kNoRoot, call), call);
    if (!nccl_.comm_split)
      throw Error("NCCL at " + nccl_.library().path() + " lacks ncclCommSplit");
    const DeviceScope scope(parts_.cuda, parts_.device);
    // Nothing shared: closing one leaves the other alone.
    wanted_ = std::make_unique<Wanted>(NcclConfig{.blocking = 0, .split_share = 0});
    const int key = control ? control->rank() : 0;
    watch_->call(
        nccl_.comm_split.name(),
        [&](NcclComm comm) {
          return nccl_.comm_split.status(comm, color, key, &wanted_->comm, &wanted_->config);
        },
        call);
    if (color == kNoColor) return;
    part.reset(new NcclGroup(
        Parts{nccl_, parts_.cuda, parts_.device, std::move(control), parts_.scale, lane_}));
    part->watch_->guarded([&] {
      part->watch_->connect(wanted_->comm, nccl_.comm_split.name(), kNcclInProgress, call);
    });
  });
  return part;
}

std::shared_ptr<NcclBuffer> NcclGroup::allocate(size_t bytes) {
  if (!nccl_.mem_alloc || !nccl_.mem_free)
    throw Error("NCCL at " + nccl_.library().path() + " lacks ncclMemAlloc");
  const DeviceScope scope(parts_.cuda, parts_.device);
  return std::shared_ptr<NcclBuffer>(new NcclBuffer(nccl_, watch_, bytes));
}

NcclBuffer::NcclBuffer(const NcclLibrary& nccl, std::shared_ptr<NcclWatch> watch, size_t bytes)
    : nccl_(nccl), watch_(std::move(watch)), bytes_(bytes) {
  nccl_.mem_alloc(&data_, bytes);
  if (nccl_.comm_register && nccl_.comm_deregister)
    watch_->call_if_alive([&](NcclComm comm) {
      // Memory that cannot be registered is still memory.
      return nccl_.comm_register.status(comm, data_, bytes, &registration_);
    });
}

NcclBuffer::~NcclBuffer() {
  if (!owner_.is_this_one()) return;
  if (registration_)
    watch_->call_if_alive(
        [&](NcclComm comm) { return nccl_.comm_deregister.status(comm, registration_); });
  nccl_.mem_free.status(data_);
}

}  // namespace pyar
