#include "group/host_memory.h"

#include <cstring>

#include "kernels/kernels.h"

namespace pyar {

std::byte* Scratch::at_least(size_t bytes) {
  if (bytes > bytes_) {
    data_.reset();  // first, so that both never exist at once
    bytes_ = 0;
    data_ = std::make_unique_for_overwrite<std::byte[]>(bytes);
    bytes_ = bytes;
  }
  return data_.get();
}

void assign(Span to, ConstSpan from) {
  if (from.num_elems == 0 || to.data == from.data) return;
  if (to.dtype == from.dtype)
    std::memcpy(to.data, from.data, from.bytes());
  else
    convert(from.dtype, from.data, to.dtype, to.data, from.num_elems);
}

}  // namespace pyar
