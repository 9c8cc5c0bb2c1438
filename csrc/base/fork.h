// What fork() leaves in the child: the memory, as it happened to be; all descriptors; of the
// threads only the one that forked. So a child may neither lock, nor wait for, nor destroy what its
// parent's threads share.
#pragma once

namespace pyar {

// How many forks lie between this process and the one that loaded the library. Cheaper than
// getpid().
unsigned fork_generation();

// The process that an object belongs to, told from its forked children.
class OwnerProcess {
 public:
  bool is_this_one() const { return generation_ == fork_generation(); }

 private:
  unsigned generation_ = fork_generation();
};

// Deletes in the owner's process only. A child leaks its copy: a mutex may be locked for ever, a
// condition variable has waiters that its destructor would wait for, a list is half written, a
// thread is the parent's.
struct DeleteByOwner {
  OwnerProcess owner;
  template <typename T>
  void operator()(T* object) const {
    if (owner.is_this_one()) delete object;
  }
};

// Every forked child closes `fd` at once, so that it cannot hide from the peers that its parent has
// died.
void close_in_children(int fd);
// Closes a descriptor that close_in_children() knows.
void close_descriptor(int fd);

}  // namespace pyar
