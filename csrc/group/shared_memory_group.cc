#include "group/shared_memory_group.h"

#include <algorithm>
#include <cstring>

#include "kernels/kernels.h"

namespace pyar {
namespace {

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

SharedMemoryGroup::SharedMemoryGroup(HostLink link, const Deadline& deadline)
    : link_(std::move(link)), control_([&] {
        static_assert(sizeof(Page) % 4096 == 0);
        const size_t ranks = static_cast<size_t>(link_.local_size());
        // Zeroed: a valid state of every page.
        return link_.share(ranks * (sizeof(Page) + 2 * kTurnBytes), deadline);
      }()) {}

char* SharedMemoryGroup::slot(int rank, unsigned turn) const {
  const size_t index = 2 * static_cast<size_t>(rank) + turn % 2;
  return control_.data() + static_cast<size_t>(size()) * sizeof(Page) + index * kTurnBytes;
}

// ---------------------------------------------------------------------------------------------------------------
// Agreement and waiting

SharedMemoryGroup::Places SharedMemoryGroup::arrive(const Fingerprint& mine, const Location& where,
                                                    const Call& call) {
  current_ = mine;
  const size_t parity = num_calls_++ % 2;
  const uint64_t buffer_id = where.buffer ? where.buffer->id : 0;
  page(rank()).notices[parity] = {mine, buffer_id, where.offset_bytes, now_s()};
  char* const subject = page(rank()).subjects[parity];
  subject[call.subject.copy(subject, kSubjectBytes - 1)] = '\0';
  if (call.patience.is_crowded()) spread_out();
  next_phase(call, call.patience);

  bool agreed = true, same_place = buffer_id != 0, ordinary = true;
  for (int r = 0; r < size(); ++r) {
    const Notice& notice = page(r).notices[parity];
    agreed &= notice.fingerprint == mine;
    same_place &= notice.buffer_id == buffer_id && notice.offset_bytes == where.offset_bytes;
    ordinary &= notice.buffer_id == 0;
    if (call.arrivals_s) call.arrivals_s[r] = notice.arrived_s;
  }
  if (agreed) return same_place ? Places::kSame : ordinary ? Places::kOrdinary : Places::kMixed;
  std::vector<Fingerprint> by_rank;
  std::vector<std::string> subjects;
  for (int r = 0; r < size(); ++r) {
    by_rank.push_back(page(r).notices[parity].fingerprint);
    subjects.push_back(subject_of(r, parity));
  }
  throw_mismatch(rank(), by_rank, link_.global_ranks(), subjects);
}

// Written by another process: bounded before use.
std::string SharedMemoryGroup::subject_of(int rank, size_t parity) const {
  const char* const text = page(rank).subjects[parity];
  return {text, strnlen(text, kSubjectBytes)};
}

void SharedMemoryGroup::next_phase(const Call& call, Patience patience) {
  const uint32_t phase = ++phase_;
  page(rank()).flag.publish(phase);
  bool failed = false;
  for (int r = 0; r < size(); ++r) {
    PhaseFlag& flag = page(r).flag;
    await(
        call.deadline, patience, [&] { return flag.reached(phase); },
        [&](double slice_s) { flag.sleep_until(phase, slice_s); },
        [&](bool late) { watch(phase, late, call); });
    failed |= flag.failed.load(std::memory_order_relaxed) != 0;
  }
  // All have come, but some have given up since, on this late rank for example.
  if (failed) watch(phase, /*late=*/false, call);
}

void SharedMemoryGroup::spread_out() {
  const auto cpu_of = [&](int r) { return page(r).flag.cpu.load(std::memory_order_relaxed); };
  const int here = current_cpu();
  page(rank()).flag.cpu.store(here, std::memory_order_relaxed);
  // Of several that want to go, the last goes.
  for (int r = rank() + 1; r < size(); ++r)
    if (cpu_of(r) == here) return;
  const auto ranks_on = [&](int cpu) {
    int count = 0;
    for (int r = 0; r < size(); ++r) count += cpu_of(r) == cpu;
    return count;
  };
  const int crowd = ranks_on(here);
  if (crowd * static_cast<int>(cpus_.size()) <= size()) return;  // not more than its share
  if (now_s() < moved_s_ + kMoveIntervalS) return;
  moved_s_ = now_s();
  for (const int cpu : cpus_)
    if (ranks_on(cpu) + 2 <= crowd && move_to_cpu(cpu)) return;
}

template <typename Needed>
void SharedMemoryGroup::check_ranks(std::string_view during, Needed is_needed) const {
  // The dead first: what a rank reported before it died is then certain to be seen, and is the
  // better cause.
  std::vector<int> dead, gone;
  for (const int r : link_.dead_ranks())
    if (is_needed(r)) dead.push_back(link_.global_ranks()[r]);
  for (int r = 0; r < size(); ++r) {
    if (r != rank() && page(r).flag.failed.load(std::memory_order_acquire))
      throw_reported(page(r).report, link_.global_ranks(), link_.global_ranks()[r]);
    const bool has_left = page(r).has_left.load(std::memory_order_acquire) != 0;
    if (has_left && is_needed(r)) gone.push_back(link_.global_ranks()[r]);
  }
  if (!gone.empty())
    throw PeerError(names_of(gone) + " closed the communicator before " + std::string(during),
                    gone);
  if (!dead.empty())
    throw PeerError(names_of(dead) + " died: the process ended during " + std::string(during) +
                        "; see its log for the reason",
                    dead);
}

void SharedMemoryGroup::watch(uint32_t phase, bool late, const Call& call) {
  const std::string where = describe(current_, call.subject);
  const auto is_absent = [&](int r) { return !page(r).flag.reached(phase); };
  check_ranks(where, is_absent);
  if (interrupted_.load(std::memory_order_relaxed))
    throw PeerError(names_of({global_rank()}) + " closed the communicator during " + where,
                    {global_rank()});
  if (!late) return;
  std::vector<int> absent;
  for (int r = 0; r < size(); ++r)
    if (is_absent(r)) absent.push_back(link_.global_ranks()[r]);
  if (!absent.empty())
    throw TimeoutError(names_of(absent) + " had not arrived at " + where + " after " +
                           seconds(call.deadline.timeout_s()) +
                           ": stopped, slow, or somewhere else in the program; a longer "
                           "timeout_s can be given to init()",
                       absent);
}

void SharedMemoryGroup::report(const Error& error) {
  const std::lock_guard lock(report_mutex_);
  if (page(rank()).flag.failed.load(std::memory_order_relaxed)) return;
  // It ends because it is being closed, which leave() tells, and which is no failure of this rank.
  if (interrupted_.load(std::memory_order_relaxed)) return;
  page(rank()).report = report_of(error, link_.global_ranks()[rank()]);
  // Publishes the report: pairs with the acquire in check_ranks().
  page(rank()).flag.failed.store(1, std::memory_order_release);
}

void SharedMemoryGroup::leave() {
  // Publishes all phases reached before: pairs with the acquire in check_ranks().
  page(rank()).has_left.store(1, std::memory_order_release);
}

// ---------------------------------------------------------------------------------------------------------------
// Control of what devices do. Progress orders nothing else; what a rank has told before it left is
// known to who knows that it has left.

void SharedMemoryGroup::agree(const Fingerprint& mine, const Call& call) {
  guarded([&] { arrive(mine, {}, call); });
}

void SharedMemoryGroup::tell(Progress mine) {
  page(rank()).begun.store(mine.begun, std::memory_order_relaxed);
  page(rank()).ended.store(mine.ended, std::memory_order_relaxed);
}

Progress SharedMemoryGroup::progress_of(int rank) const {
  return {page(rank).begun.load(std::memory_order_relaxed),
          page(rank).ended.load(std::memory_order_relaxed)};
}

void SharedMemoryGroup::check_peers(uint64_t number, std::string_view during) const {
  check_ranks(during, [&](int r) { return r != rank() && progress_of(r).ended < number; });
}

// ---------------------------------------------------------------------------------------------------------------
// Symmetric memory

std::shared_ptr<SymmetricBuffer> SharedMemoryGroup::allocate(size_t num_elems, DType dtype,
                                                             bool one_copy, const Call& call) {
  auto buffer = std::shared_ptr<SymmetricBuffer>();
  guarded([&] {
    arrive(fingerprint(Kind::kAllocate, num_elems, dtype, kNoOp, one_copy ? 0 : kNoRoot, call), {},
           call);
    const size_t part_bytes = num_elems * size_of(dtype);
    const size_t part_stride = one_copy ? 0 : round_up(part_bytes, sizeof(Page));
    const size_t bytes = one_copy ? part_bytes : part_stride * static_cast<size_t>(size());
    Segment segment = [&] {
      if (rank() != 0) {
        next_phase(call);  // so that a failed reservation of rank 0 is told by its report
        return link_.take(bytes, call.deadline);
      }
      Segment created = Segment::create(bytes);
      link_.give(created, call.deadline);
      next_phase(call);
      return created;
    }();
    next_phase(call);  // so that a rank that could not map it is told by its report
    buffer = std::make_shared<SymmetricBuffer>(
        SymmetricBuffer{std::move(segment), ++num_allocated_, part_stride, part_bytes});
  });
  const std::lock_guard lock(buffers_mutex_);
  std::erase_if(buffers_, [](const auto& weak) { return weak.expired(); });
  buffers_.push_back(buffer);
  return buffer;
}

SharedMemoryGroup::Location SharedMemoryGroup::locate(const void* data, size_t bytes) {
  const std::lock_guard lock(buffers_mutex_);
  for (const auto& weak : buffers_) {
    std::shared_ptr<SymmetricBuffer> buffer = weak.lock();
    if (!buffer || bytes == 0) continue;
    const char* begin = buffer->part(rank());
    const auto* wanted = static_cast<const char*>(data);
    if (wanted >= begin && wanted + bytes <= begin + buffer->part_bytes)
      return {std::move(buffer), static_cast<size_t>(wanted - begin)};
  }
  return {};
}

}  // namespace pyar
