// The kernels on the host: Note [Twin] in grid.cuh. For tests and dry runs; nothing here is fast.
#include "kernels/cuda/launchers.cuh"

namespace pyar {
namespace {

// Few, so that small spans have blocks with several parts, and odd, so that they have unequal work.
constexpr size_t kDefaultBlocks = 3;

struct HostGrid {
  template <typename Body>
  static void run(const typename Body::Arguments& arguments, size_t num_parts,
                  const Launch& launch) {
    const size_t most = launch.max_blocks ? launch.max_blocks : kDefaultBlocks;
    const size_t count = std::min(num_parts, most);
    for (size_t index = 0; index < count; ++index) {
      typename Body::Shared shared;
      Body::run(HostBlock(index, count), arguments, shared);
    }
  }
};

}  // namespace

const CudaKernels& cuda_twin() {
  static constexpr CudaKernels kKernels = Launchers<HostGrid>::table();
  return kKernels;
}

}  // namespace pyar
