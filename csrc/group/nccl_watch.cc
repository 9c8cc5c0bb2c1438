#include "group/nccl_watch.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <new>
#include <thread>
#include <utility>

#include "base/clock.h"

namespace pyar {
namespace {

constexpr uint64_t kNever = std::numeric_limits<uint64_t>::max();  // no call has this number

std::chrono::duration<double> duration(double seconds) {
  return std::chrono::duration<double>(seconds);
}

template <typename Body>
std::exception_ptr error_of(Body body) {
  try {
    body();
  } catch (...) {
    return std::current_exception();
  }
  return nullptr;
}

}  // namespace

NcclWatch::NcclWatch(const NcclLibrary& nccl, std::shared_ptr<NcclLane> lane,
                     std::shared_ptr<Control> control)
    : nccl_(nccl),
      lane_(std::move(lane)),
      control_(std::move(control)),
      flag_(cuda_, sizeof(std::atomic<uint32_t>)),
      aborted_(new (flag_.data()) std::atomic<uint32_t>(0)) {}

// ---------------------------------------------------------------------------------------------------------------
// Errors

void NcclWatch::check_locked() const {
  if (first_error_) std::rethrow_exception(first_error_);
}

void NcclWatch::check() const {
  const std::lock_guard lock(mutex_);
  check_locked();
}

void NcclWatch::guarded(const std::function<void()>& body) {
  check();
  const std::exception_ptr error = error_of(body);
  if (!error) return;
  Lock lock(mutex_);
  fail(lock, error);
  check_locked();
}

void NcclWatch::end_by(const Error& cause) {
  Lock lock(mutex_);
  if (over_) return;
  fail(lock, error_of([&] { throw_error(cause.cause(), cause.what(), cause.peers()); }));
}

// The first error stays. The watching thread aborts, since that may take its time: not before the
// other groups of the lane know.
void NcclWatch::fail(Lock& lock, std::exception_ptr error) {
  if (first_error_) return;
  first_error_ = error;
  // Before the abort, which lets flights end and what is queued behind them begin.
  mark_aborted();
  lane_->mark_aborted();
  changed_.notify_all();
  lock.unlock();
  const auto tell = [&](const Error& cause) {
    lane_->fail(cause);
    control_->report(cause);
  };
  try {
    std::rethrow_exception(error);
  } catch (const Error& known) {
    tell(known);
  } catch (const std::exception& unknown) {
    tell(Error(unknown.what()));
  }
  lock.lock();
}

// ---------------------------------------------------------------------------------------------------------------
// Calls

int NcclWatch::within(Lock& lock, const std::function<int(NcclComm)>& body) {
  check_locked();
  if (!comm_) throw Error("the communicator has been closed");
  ++num_calls_;
  const NcclComm comm = comm_;
  lock.unlock();
  const int status = body(comm);
  lock.lock();
  --num_calls_;
  changed_.notify_all();
  return status;
}

int NcclWatch::wait_until_done(int status, const char* function, uint64_t number,
                               const Call& call) {
  const auto is_done = [&] {
    if (status != kNcclInProgress) return true;
    Lock lock(mutex_);
    const int asked = within(
        lock, [&](NcclComm comm) { return nccl_.comm_get_async_error.status(comm, &status); });
    nccl_.comm_get_async_error.check(asked);
    return status != kNcclInProgress;
  };
  const auto sleep = [&](double slice_s) {
    std::this_thread::sleep_for(duration(std::min(slice_s, kPollS)));
  };
  const auto watch = [&](bool late) {
    control_->check_peers(number, function);
    if (control_->is_interrupted())
      throw Error(std::string(function) + " was under way when the communicator was closed");
    if (late)
      throw TimeoutError(std::string(function) + " was not done after " +
                             seconds(call.deadline.timeout_s()) +
                             ": NCCL does not reach all ranks (NCCL_DEBUG=INFO says more)",
                         {});
  };
  await(call.deadline, Patience{.spins = 0, .yield_s = 0}, is_done, sleep, watch);
  return status;
}

void NcclWatch::connect(NcclComm comm, const char* function, int status, const Call& call) {
  {
    const std::lock_guard lock(mutex_);
    comm_ = comm;
  }
  status = wait_until_done(status, function, kNever, call);
  if (status != kNcclSuccess) throw nccl_.error(function, status);
}

void NcclWatch::call(const char* function, const std::function<int(NcclComm)>& begin,
                     const Call& call) {
  const std::lock_guard one_at_a_time(call_mutex_);
  int status;
  {
    Lock lock(mutex_);
    status = within(lock, begin);
  }
  status = wait_until_done(status, function, num_launched_ + 1, call);
  if (status != kNcclSuccess) throw nccl_.error(function, status);
}

void NcclWatch::call_if_alive(const std::function<int(NcclComm)>& begin) {
  const std::lock_guard one_at_a_time(call_mutex_);
  Lock lock(mutex_);
  if (comm_ && !first_error_) within(lock, begin);
}

// ---------------------------------------------------------------------------------------------------------------
// Flights

NcclWatch::Flight NcclWatch::begin_flight(const Fingerprint& mine, const Call& call) {
  const auto begun = std::make_shared<Event>(cuda_, Event::Timing::kYes);
  begun->record(lane_->stream());
  const std::lock_guard lock(mutex_);
  launching_ = lane_->next_place();
  note_place();
  return {.call = mine,
          .subject = std::string(call.subject),
          .number = num_launched_ + 1,
          .place = launching_,
          .timeout_s = call.deadline.timeout_s(),
          .late_s = now_s() + call.deadline.remaining_s(),
          .marks = {.begun = begun, .ended = nullptr}};
}

FlightMarks NcclWatch::end_flight(Flight flight) {
  const auto ended = std::make_shared<Event>(cuda_, Event::Timing::kYes);
  ended->record(lane_->stream());
  flight.marks.ended = ended;
  const FlightMarks marks = flight.marks;
  ++num_launched_;
  const std::lock_guard lock(mutex_);
  flights_.push_back(std::move(flight));
  launching_ = NcclLane::kNoPlace;
  note_place();
  changed_.notify_all();
  return marks;
}

// They run on one stream: the latest ends last.
const NcclWatch::Flight* NcclWatch::latest_until(uint64_t sequence) const {
  for (auto flight = flights_.rbegin(); flight != flights_.rend(); ++flight)
    if (flight->call.sequence <= sequence) return &*flight;
  return nullptr;
}

void NcclWatch::note_place() {
  place_.store(flights_.empty() ? launching_ : flights_.front().place, std::memory_order_relaxed);
}

void NcclWatch::hold_back(CudaStream stream, uint64_t sequence) {
  const std::lock_guard lock(mutex_);
  check_locked();
  if (const Flight* const latest = latest_until(sequence)) latest->marks.ended->hold_back(stream);
}

bool NcclWatch::has_ended(uint64_t sequence) {
  const std::lock_guard lock(mutex_);
  if (first_error_) return flights_.empty();
  const Flight* const latest = latest_until(sequence);
  return !latest || latest->marks.ended->has_passed();
}

// Flights end in the order in which they were launched.
void NcclWatch::retire() {
  for (const Flight& flight : flights_) {
    if (!flight.marks.begun->has_passed()) break;
    progress_.begun = flight.number;
  }
  while (!flights_.empty() && flights_.front().marks.ended->has_passed()) {
    progress_.ended = flights_.front().number;
    flights_.pop_front();
  }
  note_place();
  control_->tell(progress_);
}

// ---------------------------------------------------------------------------------------------------------------
// The watching thread

void NcclWatch::run() {
  // Or a look at an event would break the capture of a graph in another thread.
  int mode = kCudaCaptureModeRelaxed;
  cuda_.exchange_capture_mode.status(&mode);
  Lock lock(mutex_);
  while (!closing_ && !first_error_) {
    changed_.wait(lock, [&] { return closing_ || first_error_ || !flights_.empty(); });
    if (!closing_ && !first_error_) look(lock);
    changed_.wait_for(lock, duration(kWatchSliceS), [&] { return closing_ || first_error_; });
  }
  if (!first_error_) let_end(lock);
  abort(lock);
  over_ = true;
  changed_.notify_all();
}

void NcclWatch::look(Lock& lock) {
  std::exception_ptr suspicion;
  const std::exception_ptr certainty = error_of([&] { suspicion = find_trouble(lock); });
  if (certainty) return fail(lock, certainty);
  if (!suspicion) {
    suspected_s_ = 0;
    if (const std::exception_ptr late = find_late()) fail(lock, late);
  } else if (suspected_s_ == 0) {
    suspected_s_ = now_s();
  } else if (now_s() >= suspected_s_ + kGraceS) {
    fail(lock, suspicion);
  }
}

// Throws if the device, or NCCL, is of no use any more; returns what may still turn out otherwise.
// NCCL is asked before flights are retired: what has ended with an error must not pass for well
// ended. A peer that is gone matters only to flights, and says more than NCCL's error.
std::exception_ptr NcclWatch::find_trouble(Lock& lock) {
  int status = kNcclSuccess;
  nccl_.comm_get_async_error.check(within(
      lock, [&](NcclComm comm) { return nccl_.comm_get_async_error.status(comm, &status); }));
  const bool is_broken = status != kNcclSuccess && status != kNcclInProgress;
  retire();
  if (flights_.empty() && !is_broken) return nullptr;

  const uint64_t number = flights_.empty() ? kNever : flights_.front().number;
  const std::string during = flights_.empty() ? "a collective" : flights_.front().what();
  lock.unlock();
  const std::exception_ptr missed = error_of([&] { control_->check_peers(number, during); });
  lock.lock();
  if (missed || !is_broken) return missed;
  return std::make_exception_ptr(nccl_.error("NCCL, during " + during, status));
}

// Who is late, all ranks say alike: those whose devices have not begun.
std::exception_ptr NcclWatch::find_late() const {
  if (flights_.empty() || now_s() < flights_.front().late_s) return nullptr;
  const Flight& flight = flights_.front();
  std::vector<int> absent;
  for (int r = 0; r < control_->size(); ++r) {
    const uint64_t begun = r == control_->rank() ? progress_.begun : control_->progress_of(r).begun;
    if (begun < flight.number) absent.push_back(control_->global_ranks()[static_cast<size_t>(r)]);
  }
  const std::string late = flight.what() + " after " + seconds(flight.timeout_s);
  if (absent.empty())
    return std::make_exception_ptr(TimeoutError("all devices had begun, and not ended, " + late +
                                                    ": the network between them, or NCCL, is stuck",
                                                {}));
  return std::make_exception_ptr(
      TimeoutError("the devices of " + names_of(absent) + " had not begun " + late +
                       ": stopped, or still busy; a longer timeout_s can be given to init()",
                   absent));
}

template <typename IsOver>
void NcclWatch::wait(Lock& lock, double limit_s, IsOver is_over) {
  const Deadline deadline(limit_s);
  while (!is_over() && !deadline.passed()) changed_.wait_for(lock, duration(kPollS));
}

// An abort is local; to finalize or to destroy a communicator may wait for peers. But peers may
// still read out of this rank's buffers when its own flights have ended.
void NcclWatch::let_end(Lock& lock) {
  const int me = control_->global_ranks()[static_cast<size_t>(control_->rank())];
  const std::exception_ptr trouble = error_of([&] {
    wait(lock, kOwnEndS, [&] {
      retire();
      return flights_.empty() || first_error_;
    });
    if (!flights_.empty())
      throw PeerError(names_of({me}) + " closed the communicator during " + flights_.front().what(),
                      {me});
    wait(lock, kPeersEndS, [&] {
      for (int r = 0; r < control_->size(); ++r)
        if (r != control_->rank() && control_->progress_of(r).ended < progress_.ended) return false;
      return true;
    });
  });
  if (!flights_.empty()) fail(lock, trouble);
}

void NcclWatch::let_those_behind_abort() {
  const Deadline deadline(kBehindS);
  while (lane_->has_group_behind(place()) && !deadline.passed())
    std::this_thread::sleep_for(duration(kPollS));
}

void NcclWatch::abort(Lock& lock) {
  changed_.wait_for(lock, duration(kCallEndsS), [&] { return num_calls_ == 0; });
  const NcclComm comm = std::exchange(comm_, nullptr);
  lock.unlock();
  let_those_behind_abort();
  if (comm) nccl_.comm_abort.status(comm);
  lane_->leave(*this);
  lock.lock();
  // What has been aborted ends soon, and only then leaves the caller's memory alone. Peers are not
  // told that it has ended: it has not ended well.
  error_of([&] {
    wait(lock, kAbortedEndS, [&] {
      while (!flights_.empty() && flights_.front().marks.ended->has_passed()) flights_.pop_front();
      note_place();
      return flights_.empty();
    });
  });
}

bool NcclWatch::close() {
  Lock lock(mutex_);
  closing_ = true;
  changed_.notify_all();
  return changed_.wait_for(lock, duration(kCloseS), [&] { return over_; });
}

}  // namespace pyar
