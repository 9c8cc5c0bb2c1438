#include "transport/inproc.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>
#include <string>

namespace pyar {
namespace {

std::vector<int> first_ranks(int size) {
  if (size < 1) throw UsageError("a world of " + std::to_string(size) + " ranks: at least 1");
  std::vector<int> ranks(static_cast<size_t>(size));
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}

}  // namespace

InprocWorld::InprocWorld(int size) : InprocWorld(first_ranks(size)) {}

InprocWorld::InprocWorld(std::vector<int> global_ranks) : global_ranks_(std::move(global_ranks)) {
  if (global_ranks_.empty()) throw UsageError("a world of 0 ranks: at least 1");
  for (size_t rank = 0; rank < global_ranks_.size(); ++rank) {
    inboxes_.push_back(std::make_unique<Inbox>());
    inboxes_.back()->from.resize(global_ranks_.size());
  }
}

void InprocWorld::notify(Inbox& inbox) {
  inbox.news.fetch_add(1, std::memory_order_relaxed);
  inbox.changed.notify_one();
}

// Who is waited for is not always who is late: follow the waits to those who wait for nobody.
std::vector<int> InprocWorld::missing_for(int rank) const {
  const auto awaited = [&](int r) { return inboxes_[static_cast<size_t>(r)]->awaited; };
  std::vector<bool> seen(inboxes_.size());
  std::vector<int> missing, frontier = awaited(rank);
  seen[static_cast<size_t>(rank)] = true;
  while (!frontier.empty()) {
    const int peer = frontier.back();
    frontier.pop_back();
    if (seen[static_cast<size_t>(peer)]) continue;
    seen[static_cast<size_t>(peer)] = true;
    const std::vector<int> next = awaited(peer);
    if (next.empty()) missing.push_back(peer);
    frontier.insert(frontier.end(), next.begin(), next.end());
  }
  if (missing.empty()) missing = awaited(rank);  // all are here, waiting in a circle
  return missing;
}

std::vector<int> InprocWorld::global_ranks_of(std::vector<int> ranks) const {
  for (int& rank : ranks) rank = global_ranks_[static_cast<size_t>(rank)];
  std::ranges::sort(ranks);
  return ranks;
}

void InprocWorld::fail(const Error& cause) {
  if (!failure_) {
    failure_ = cause;
    for (const auto& inbox : inboxes_) notify(*inbox);
  }
  throw_failure();
}

void InprocWorld::throw_failure() const {
  throw_error(failure_->cause(), failure_->what(), failure_->peers());
}

InprocTransport::InprocTransport(std::shared_ptr<InprocWorld> world, int rank)
    : Transport(rank, world->global_ranks()), world_(std::move(world)) {
  if (rank < 0 || rank >= size())
    throw UsageError("rank " + std::to_string(rank) + " in a world of " + std::to_string(size()) +
                     ": must be in 0.." + std::to_string(size() - 1));
}

InprocTransport::~InprocTransport() {
  const std::lock_guard lock(world_->mutex_);
  mine().left = true;
  for (const auto& inbox : world_->inboxes_) world_->notify(*inbox);
}

void InprocTransport::fail(const Error& cause) {
  const std::lock_guard lock(world_->mutex_);
  world_->fail(cause);
}

bool InprocTransport::exchange(std::span<const Outgoing> outgoing, std::span<Incoming> incoming,
                               const Deadline& deadline, Patience patience) {
  std::vector<InprocWorld::Message> messages;
  for (const Outgoing& out : outgoing)
    messages.push_back({out.header, {out.payload.begin(), out.payload.end()}});
  {
    const std::lock_guard lock(world_->mutex_);
    if (world_->failure_) world_->throw_failure();
    for (size_t i = 0; i < outgoing.size(); ++i) {
      InprocWorld::Inbox& inbox = *world_->inboxes_[static_cast<size_t>(outgoing[i].peer)];
      inbox.from[static_cast<size_t>(rank())].push_back(std::move(messages[i]));
      world_->notify(inbox);
    }
  }

  uint64_t seen = mine().news.load(std::memory_order_relaxed);
  const auto has_news = [&] { return mine().news.load(std::memory_order_relaxed) != seen; };
  const auto ready = [&] {
    if (!has_news()) return false;
    seen = mine().news.load(std::memory_order_relaxed);
    return take(incoming);
  };
  const auto sleep = [&](double slice_s) {
    std::unique_lock lock(world_->mutex_);
    mine().changed.wait_for(lock, std::chrono::duration<double>(slice_s), has_news);
  };
  if (!take(incoming))
    await(deadline, patience, ready, sleep, [&](bool late) { watch(deadline, late); });
  return std::ranges::none_of(
      incoming, [](const Incoming& in) { return in.state == Incoming::State::kRefused; });
}

// Takes what has arrived. True when that decides the exchange: nothing is pending, or something was
// refused.
bool InprocTransport::take(std::span<Incoming> incoming) {
  using State = Incoming::State;
  std::vector<std::pair<Incoming*, InprocWorld::Message>> arrived;
  bool decided = false;
  {
    const std::lock_guard lock(world_->mutex_);
    mine().awaited.clear();
    for (Incoming& in : incoming) {
      if (in.state != State::kPending) continue;
      auto& queue = mine().from[static_cast<size_t>(in.peer)];
      if (queue.empty()) {
        mine().awaited.push_back(in.peer);
        continue;
      }
      InprocWorld::Message& message = queue.front();
      const bool expected =
          message.header == in.header && message.payload.size() == in.payload.size();
      in.state = expected ? State::kTaken : State::kRefused;
      in.header = message.header;
      arrived.emplace_back(&in, std::move(message));
      queue.pop_front();
      decided |= !expected;
    }
    decided |= mine().awaited.empty();
    if (decided) mine().awaited.clear();
  }
  for (const auto& [in, message] : arrived)
    if (in->state == State::kTaken && !message.payload.empty())
      std::memcpy(in->payload.data(), message.payload.data(), message.payload.size());
  return decided;
}

void InprocTransport::watch(const Deadline& deadline, bool late) {
  const std::lock_guard lock(world_->mutex_);
  if (world_->failure_) world_->throw_failure();
  std::vector<int> gone;
  for (const int peer : mine().awaited)
    if (world_->inboxes_[static_cast<size_t>(peer)]->left &&
        mine().from[static_cast<size_t>(peer)].empty())
      gone.push_back(peer);
  const std::string self = names_of(world_->global_ranks_of({rank()}));
  if (!gone.empty()) {
    gone = world_->global_ranks_of(std::move(gone));
    world_->fail(
        PeerError(names_of(gone) + " left before sending what " + self + " waits for", gone));
  }
  if (late) {
    const std::vector<int> missing = world_->global_ranks_of(world_->missing_for(rank()));
    world_->fail(TimeoutError(names_of(missing) + " had not arrived when " + self + " had waited " +
                                  seconds(deadline.timeout_s()),
                              missing));
  }
}

}  // namespace pyar
