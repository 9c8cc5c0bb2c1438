// Empty on other machines, so that a build lists the same sources everywhere.
#if defined(__x86_64__)
#include "kernels/cpu/loops.h"

#if !defined(__AVX2__) || defined(__AVX512F__)
#error "compile with -mavx2 -mf16c"
#endif

namespace pyar {

constinit const KernelTable kAvx2Table = table_of_this_file("avx2");

}  // namespace pyar

#endif
