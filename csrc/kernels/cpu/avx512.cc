// Empty on other machines, so that a build lists the same sources everywhere.
#if defined(__x86_64__)
#include "kernels/cpu/loops.h"

#if !defined(__AVX512BW__) || !defined(__AVX512DQ__) || !defined(__AVX512VL__)
#error "compile with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mf16c"
#endif

namespace pyar {

constinit const KernelTable kAvx512Table = table_of_this_file("avx512");

}  // namespace pyar

#endif
