// How much memory can still be reserved.
#pragma once

#include <cstddef>

namespace pyar {

// What the machine and the control groups of this process (container, job; version 1 or 2) can
// still give. The page cache counts as free: the kernel takes it back. Costs a few small files.
size_t available_bytes();

}  // namespace pyar
