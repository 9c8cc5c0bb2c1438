// Threads do not survive fork(): the child of a process with a communicator must not touch it.
#pragma once

namespace pyar {

// How many forks lie between this process and the one that loaded the library. Cheaper than
// getpid().
unsigned fork_generation();

}  // namespace pyar
