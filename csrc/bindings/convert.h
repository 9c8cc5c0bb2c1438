// What Python passes to kernels: addresses as integers, dtypes and operations by name.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/error.h"

namespace pyar {

using Address = uintptr_t;

inline DType dtype_named(const std::string& name) {
  for (uint32_t i = 0; i < kNumDTypes; ++i)
    if (name == name_of(static_cast<DType>(i))) return static_cast<DType>(i);
  throw UsageError("unknown dtype " + name);
}

inline Op op_named(const std::string& name) {
  for (uint32_t i = 0; i < kNumOps; ++i)
    if (name == name_of(static_cast<Op>(i))) return static_cast<Op>(i);
  throw UsageError("unknown op " + name);
}

// 0 is nullptr.
template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline std::vector<void*> pointers(const std::vector<Address>& addresses) {
  std::vector<void*> result;
  for (const Address address : addresses) result.push_back(pointer(address));
  return result;
}

}  // namespace pyar
