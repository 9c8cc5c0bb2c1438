// Which core a thread is on.
#pragma once

#include <vector>

namespace pyar {

int current_cpu();
// Where the calling thread may run; ascending.
std::vector<int> allowed_cpus();
// The calling thread goes to `cpu` at once; where it may run later stays as it was. False if it may
// not run there.
bool move_to_cpu(int cpu);

}  // namespace pyar
