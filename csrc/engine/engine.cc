#include "engine/engine.h"

#include <utility>

#include "base/error.h"

namespace pyar {
namespace {

// Comes before every lock, which one of the parent's threads may have held at the fork.
void refuse_child_of(const OwnerProcess& owner) {
  if (!owner.is_this_one())
    throw UsageError(
        "this communicator belongs to the parent process; a forked child (a DataLoader worker?) "
        "must not call it");
}

}  // namespace

bool Work::wait_for(double slice_s) {
  refuse_child_of(owner_);
  std::unique_lock lock(mutex_);
  finished_.wait_for(lock, std::chrono::duration<double>(slice_s), [&] { return done_; });
  if (done_ && error_) std::rethrow_exception(error_);
  return done_;
}

bool Work::done() const {
  refuse_child_of(owner_);
  const std::lock_guard lock(mutex_);
  return done_;
}

void Work::await_end() {
  std::unique_lock lock(mutex_);
  finished_.wait(lock, [&] { return done_; });
}

void Engine::refuse_forked_child() const { refuse_child_of(owner_); }

Engine::Engine(std::shared_ptr<Group> group, double timeout_s, Patience patience)
    : group_(std::move(group)), timeout_s_(timeout_s), patience_(patience) {}

Engine::~Engine() {
  if (worker_.joinable()) worker_.join();
}

void Engine::check_usable() const {
  if (first_error_) std::rethrow_exception(first_error_);
  if (closed_) throw UsageError("the communicator has been closed");
}

std::shared_ptr<Work> Engine::submit(Task task, uint64_t layout, const Findings& wanted,
                                     std::string subject) {
  refuse_forked_child();
  const std::shared_ptr<Work> work(new Work, DeleteByOwner());
  work->task_ = std::move(task);
  work->layout_ = layout;
  work->findings_ = wanted;
  work->subject_ = std::move(subject);
  work->times_.enqueued_s = now_s();
  const std::lock_guard lock(mutex_);
  check_usable();
  work->sequence_ = ++sequence_;
  queue_.push_back(work);
  if (!worker_.joinable()) worker_ = std::thread([this] { work_loop(); });
  changed_.notify_all();
  return work;
}

void Engine::run(const Task& task, uint64_t layout, const std::function<void()>& on_slice) {
  refuse_forked_child();
  if (run_here(task, layout, on_slice)) return;
  const std::shared_ptr<Work> work = submit(task, layout);
  while (!work->wait_for(kWatchSliceS)) {
    try {
      on_slice();
    } catch (...) {
      fail(std::current_exception());
      work->await_end();  // until then the worker uses the caller's memory
      throw;
    }
  }
}

void Engine::fail(std::exception_ptr error) {
  refuse_forked_child();
  const std::lock_guard lock(mutex_);
  if (!first_error_) first_error_ = std::move(error);
}

void Engine::check_not_failed() {
  const std::lock_guard lock(mutex_);
  if (first_error_) std::rethrow_exception(first_error_);
}

// False if the engine is not idle. No Work, no times: nobody would read them, and a small
// collective lasts as long as a few looks at the clock.
bool Engine::run_here(const Task& task, uint64_t layout, const std::function<void()>& on_slice) {
  std::unique_lock lock(mutex_);
  check_usable();
  if (busy_ || !queue_.empty()) return false;
  busy_ = true;
  const uint64_t sequence = ++sequence_;
  lock.unlock();
  const std::function<void()> on_each_slice = [&] {
    check_not_failed();
    on_slice();
  };
  std::exception_ptr error;
  try {
    task(*group_, Call{.sequence = sequence,
                       .layout = layout,
                       .deadline = Deadline(timeout_s_, &on_each_slice),
                       .patience = patience_,
                       .present_patience = patience_});
  } catch (...) {
    error = std::current_exception();
  }
  lock.lock();
  busy_ = false;
  if (error && !first_error_) first_error_ = error;
  if (!queue_.empty() || closed_) changed_.notify_all();
  lock.unlock();
  if (error) std::rethrow_exception(error);
  return true;
}

void Engine::execute(Work& work) {
  work.times_.start_s = now_s();
  work.times_.arrivals_s.resize(static_cast<size_t>(group_->size()));
  const std::function<void()> on_slice = [this] { check_not_failed(); };
  try {
    work.task_(*group_, Call{.sequence = work.sequence_,
                             .layout = work.layout_,
                             .deadline = Deadline(timeout_s_, &on_slice),
                             .patience = kSleepSoon,
                             .present_patience = patience_,
                             .arrivals_s = work.times_.arrivals_s.data(),
                             .findings = &work.findings_,
                             .subject = work.subject_});
  } catch (...) {
    work.error_ = std::current_exception();
  }
  work.task_ = nullptr;  // releases what it keeps alive
  work.times_.end_s = now_s();
}

void Engine::work_loop() {
  for (;;) {
    std::shared_ptr<Work> work;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return !busy_ && (!queue_.empty() || closed_); });
      if (queue_.empty()) return;
      work = std::move(queue_.front());
      queue_.pop_front();
      busy_ = true;
      if (first_error_) work->error_ = first_error_;
    }
    if (!work->error_) execute(*work);
    {
      const std::lock_guard lock(mutex_);
      busy_ = false;
      if (work->error_ && !first_error_) first_error_ = work->error_;
      changed_.notify_all();
    }
    {
      const std::lock_guard lock(work->mutex_);
      work->done_ = true;
    }
    work->finished_.notify_all();
  }
}

void Engine::close(const std::function<void()>& interrupt, const std::function<void()>& end_calls) {
  if (is_forked_child()) return;
  // An interrupt is obeyed within a slice; what outlasts several hangs in a call.
  const double interrupted_s = end_calls ? 5 * kWatchSliceS : 1.0;
  {
    std::unique_lock lock(mutex_);
    closed_ = true;
    interrupt();
    changed_.notify_all();
    // A caller inside run() leaves within a slice; the group must not be taken from under it.
    changed_.wait_for(lock, std::chrono::duration<double>(interrupted_s),
                      [&] { return !busy_ && queue_.empty(); });
  }
  if (end_calls) end_calls();
  const std::lock_guard lock(join_mutex_);
  if (worker_.joinable()) worker_.join();
}

}  // namespace pyar
