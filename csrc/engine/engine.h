// When, not how: one order on all ranks, one collective at a time, the first error wins. Knows
// nothing but Group.
#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/fork.h"
#include "group/group.h"

namespace pyar {

// One collective on its way; also its entry in the event record. Times are seconds of now_s(), 0
// until they happen.
class Work {
 public:
  struct Times {
    double enqueued_s = 0, start_s = 0, end_s = 0;
    std::vector<double>
        arrivals_s;  // [size]: when each rank arrived; empty if the group does not tell
  };

  // Waits for at most slice_s; true when finished. Rethrows the collective's error. UsageError in a
  // forked child, where it never finishes.
  bool wait_for(double slice_s);
  bool done() const;
  // The how-manyeth collective of the communicator it is.
  uint64_t sequence() const { return sequence_; }
  // Valid once done.
  const Times& times() const { return times_; }
  const Findings& findings() const { return findings_; }

 private:
  friend class Engine;
  void await_end();

  OwnerProcess owner_;
  std::function<void(Group&, const Call&)> task_;
  uint64_t sequence_ = 0, layout_ = 0;
  std::string subject_;
  Times times_;
  Findings findings_;
  mutable std::mutex mutex_;
  std::condition_variable finished_;
  bool done_ = false;
  std::exception_ptr error_;
};

// Asynchronous collectives run on a worker thread, also where it competes with compute for the
// cores: running each on the training thread when its bucket completes was no faster (ResNet-50, 64
// px, 2 ranks on 2 cores, eager: 238 to 260 ms a step with the worker, 231 to 267 without, by
// bucket size and run), and hooks would wait for peers.
//
// Where the process may fork, its owner is a unique_ptr<Engine, DeleteByOwner>; a forked child is
// refused.
class Engine {
 public:
  using Task = std::function<void(Group&, const Call&)>;

  // `patience` of a caller's own thread. The worker sleeps soon until all ranks have come, since it
  // competes with compute; then the others are at work too, and it waits like a caller.
  Engine(std::shared_ptr<Group> group, double timeout_s, Patience patience);
  ~Engine();

  // Queues a collective. Calls must come in the same order on all ranks. Throws the first error if
  // one has happened. `wanted`: what the collective is to look out for.
  // `subject`: what the data are, for messages.
  std::shared_ptr<Work> submit(Task task, uint64_t layout, const Findings& wanted = {},
                               std::string subject = {});
  // The same and waits; on an idle engine it runs on the calling thread, without hand-over.
  // on_slice runs now and then while it waits, and may throw: that is an error of the collective.
  void run(const Task& task, uint64_t layout, const std::function<void()>& on_slice);

  // Refuses further calls, ends the worker within a watch slice once `interrupt` has been called on
  // the group. Idempotent, from any thread. Unfinished collectives end with an Error. `end_calls`,
  // if given, ends those of somebody else's library that no interrupt reaches; runs at most once
  // per close, and without it such a call would be waited for.
  void close(const std::function<void()>& interrupt, const std::function<void()>& end_calls = {});

  // Makes `error` the first one, if there is none: waits in progress end with it, and so do all
  // calls to come.
  void fail(std::exception_ptr error);
  void check_not_failed();  // throws the first error, if one has happened

  bool is_forked_child() const { return !owner_.is_this_one(); }
  void refuse_forked_child() const;  // throws UsageError

 private:
  bool run_here(const Task& task, uint64_t layout, const std::function<void()>& on_slice);
  void execute(Work& work);
  void work_loop();
  void check_usable() const;  // under mutex_

  std::shared_ptr<Group> group_;
  const double timeout_s_;
  const Patience patience_;
  const OwnerProcess owner_;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<Work>> queue_;
  bool busy_ = false;  // somebody executes: the worker, or a caller inside run()
  bool closed_ = false;
  std::exception_ptr first_error_;
  uint64_t sequence_ = 0;
  std::thread worker_;     // started by the first submit()
  std::mutex join_mutex_;  // two threads may close at once; only one can join
};

}  // namespace pyar
