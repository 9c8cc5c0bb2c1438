// What we use of NCCL's interface, declared by ourselves: nothing of NCCL is needed to build.
// Source: nccl.h of 2.18 to 2.30 (tests/test_nccl.py compares with the installed one). NCCL breaks
// binary compatibility with its major number only.
#pragma once

#include <climits>
#include <cstddef>
#include <type_traits>

#include "base/dtype.h"

namespace pyar {

using NcclComm = void*;  // ncclComm_t

// ncclUniqueId: how ranks of a new communicator find each other.
struct NcclUniqueId {
  char bytes[128];
};
static_assert(sizeof(NcclUniqueId) == 128 && alignof(NcclUniqueId) == 1);
static_assert(std::is_trivially_copyable_v<NcclUniqueId>);

// ncclResult_t
inline constexpr int kNcclSuccess = 0;
inline constexpr int kNcclInProgress = 7;  // not an error: of communicators that do not block

// ncclDataType_t
constexpr int nccl_dtype(DType dtype) {
  switch (dtype) {
    case DType::kUInt8:
      return 1;
    case DType::kInt32:
      return 2;
    case DType::kInt64:
      return 4;
    case DType::kFloat16:
      return 6;
    case DType::kFloat32:
      return 7;
    case DType::kFloat64:
      return 8;
    case DType::kBFloat16:
      return 9;
  }
  return -1;
}

// ncclRedOp_t. An average is the sum, scaled afterwards: NCCL's own keeps it from its fast paths
// (NVLS, symmetric memory, PAT), which know sums only.
constexpr int nccl_op(Op op) {
  switch (op) {
    case Op::kSum:
    case Op::kAvg:
      return 0;
    case Op::kProd:
      return 1;
    case Op::kMax:
      return 2;
    case Op::kMin:
      return 3;
  }
  return -1;
}

// ncclConfig_t as of 2.18. Later ones have more fields at the end; a library copies `size` bytes
// over its own defaults.
struct NcclConfig {
  static constexpr int kUndefined = INT_MIN;

  size_t size = sizeof(NcclConfig);
  unsigned magic = 0xcafebeef;
  unsigned version = 21800;
  int blocking = kUndefined;
  int cga_cluster_size = kUndefined;
  int min_ctas = kUndefined;
  int max_ctas = kUndefined;
  const char* net_name = nullptr;
  int split_share = kUndefined;
  int traffic_class = kUndefined;  // padding until 2.27, which takes it for this
};
static_assert(sizeof(NcclConfig) == 48);
static_assert(offsetof(NcclConfig, magic) == 8 && offsetof(NcclConfig, version) == 12);
static_assert(offsetof(NcclConfig, blocking) == 16 && offsetof(NcclConfig, cga_cluster_size) == 20);
static_assert(offsetof(NcclConfig, min_ctas) == 24 && offsetof(NcclConfig, max_ctas) == 28);
static_assert(offsetof(NcclConfig, net_name) == 32 && offsetof(NcclConfig, split_share) == 40);
static_assert(offsetof(NcclConfig, traffic_class) == 44);

}  // namespace pyar
