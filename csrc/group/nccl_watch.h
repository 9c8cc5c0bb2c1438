// A communicator of NCCL, what has been launched on it, and who watches over both. NCCL waits for
// ever for a peer that is dead, stopped or somewhere else; a thread of ours looks at the peers, at
// NCCL's own errors and at the time, and aborts. Vocabulary: a *flight* is a collective from its
// launch to its end on the device.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/error.h"
#include "device/cuda_runtime.h"
#include "group/control.h"
#include "group/nccl_lane.h"
#include "group/nccl_library.h"

namespace pyar {

// Of a flight, on the stream; with timing. Null where nothing was launched.
struct FlightMarks {
  std::shared_ptr<const Event> begun, ended;
};

class NcclWatch {
 public:
  // The caller makes it enter the lane, which it leaves by itself.
  NcclWatch(const NcclLibrary& nccl, std::shared_ptr<NcclLane> lane,
            std::shared_ptr<Control> control);

  // --- for the thread that makes calls ---

  // Runs the part of a call that may fail; a failure is the first error, or repeats it.
  void guarded(const std::function<void()>& body);
  // Takes a communicator over, and waits until it is made. `status`: of the call that began it.
  void connect(NcclComm comm, const char* function, int status, const Call& call);
  // Calls NCCL, `begin(comm)` returning a status, and waits until NCCL is done with the call. It
  // may be still at work when its function returns: where a connection is needed for the first
  // time.
  void call(const char* function, const std::function<int(NcclComm)>& begin, const Call& call);
  // The same, unless there is no communicator any more.
  void call_if_alive(const std::function<int(NcclComm)>& begin);

  struct Flight {
    Fingerprint call;
    std::string subject;
    uint64_t number;           // of this group, from 1: sequence numbers repeat, see Call::part_of
    uint64_t place;            // in the lane
    double timeout_s, late_s;  // late_s: clock of now_s()
    FlightMarks marks;
    std::string what() const { return describe(call, subject); }
  };
  // Marks the beginning on the stream.
  Flight begin_flight(const Fingerprint& mine, const Call& call);
  // Marks the end; from now on it is watched.
  FlightMarks end_flight(Flight flight);

  // --- for any thread ---

  // Throws the first error, if one has happened.
  void check() const;
  // The stream goes on only once all flights up to `sequence` have ended. Throws the first error.
  void hold_back(CudaStream stream, uint64_t sequence);
  // True once all flights up to `sequence` have ended: nothing reads or writes their memory any
  // more. After an error: all flights.
  bool has_ended(uint64_t sequence);
  // Makes `cause` the first error, if there is none.
  void end_by(const Error& cause);
  void mark_aborted() { aborted_->store(1, std::memory_order_release); }
  // Of the first flight that has not ended; NcclLane::kNoPlace: all have.
  uint64_t place() const { return place_.load(std::memory_order_relaxed); }
  // Not zero once what the flights have left in memory is worthless. Kernels may read it.
  const std::atomic<uint32_t>& aborted() const { return *aborted_; }
  // Gives flights a little time to end, here and at the peers, then lets go of the communicator.
  // False if NCCL has not returned from that after kCloseS. Nobody calls anything afterwards.
  bool close();

  // Of the watching thread; returns after close(), or after an error.
  void run();

 private:
  using Lock = std::unique_lock<std::mutex>;

  // Time for a flight to end although a peer is gone, and for the control to say which peer it is
  // that NCCL misses. Deaths must be known everywhere within a second.
  static constexpr double kGraceS = 0.25;
  // NCCL answers at once unless it is stuck; then only an abort under the call helps.
  static constexpr double kCallEndsS = 0.2;
  // See Note [Groups of one lane fail together].
  static constexpr double kBehindS = 0.1;
  // To close: for flights here, at the peers, after an abort, and in all.
  static constexpr double kOwnEndS = 0.3, kPeersEndS = 0.2, kAbortedEndS = 0.1, kCloseS = 0.95;
  // How often a communicator under construction is asked whether it is there.
  static constexpr double kPollS = 5e-4;

  int within(Lock& lock, const std::function<int(NcclComm)>& body);
  // Peers are needed until their devices have ended flight `number`.
  int wait_until_done(int status, const char* function, uint64_t number, const Call& call);
  void fail(Lock& lock, std::exception_ptr error);
  void check_locked() const;
  // Null: none. Both under mutex_.
  const Flight* latest_until(uint64_t sequence) const;
  void note_place();
  void retire();
  void look(Lock& lock);
  std::exception_ptr find_trouble(Lock& lock);
  std::exception_ptr find_late() const;  // under mutex_
  template <typename IsOver>
  void wait(Lock& lock, double limit_s, IsOver is_over);
  void let_end(Lock& lock);
  void let_those_behind_abort();
  void abort(Lock& lock);

  const NcclLibrary& nccl_;
  const std::shared_ptr<NcclLane> lane_;
  const CudaRuntime& cuda_ = lane_->cuda();
  const std::shared_ptr<Control> control_;
  PinnedMemory flag_;
  std::atomic<uint32_t>* const aborted_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  // One thread at a time may use a communicator. Not held to abort it: that ends calls that hang.
  std::mutex call_mutex_;
  NcclComm comm_ = nullptr;
  int num_calls_ = 0;  // inside NCCL; comm_ must not be freed under them
  std::exception_ptr first_error_;
  bool closing_ = false, over_ = false;

  uint64_t num_launched_ = 0;  // of the thread that makes calls
  std::deque<Flight> flights_;
  uint64_t launching_ = NcclLane::kNoPlace;  // of the flight that has begun and is not in flights_
  // Changes with flights_ and launching_. Orders nothing: who asks does so for kBehindS.
  std::atomic<uint64_t> place_{NcclLane::kNoPlace};
  Progress progress_{};
  double suspected_s_ = 0;  // since when something is wrong; 0: nothing is
};

}  // namespace pyar
