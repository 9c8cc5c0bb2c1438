#include "kernels/cpu/loops.h"

namespace pyar {

constinit const KernelTable kBaselineTable = table_of_this_file("baseline");

}  // namespace pyar
