// The collectives of tensors, for Python: the same on the host and on a device.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/convert.h"
#include "group/group.h"

namespace pyar {

// Self::call(body, layout, async, where...) runs `body(Group&, const Call&)`. `Where`: what every
// call is told besides, as its last arguments; on a device the caller's stream.
template <typename... Where, typename Self>
void bind_collectives(pybind11::class_<Self>& self) {
  self.def("all_reduce", [](Self& me, Address data, size_t num_elems, DType dtype, Op op,
                            uint64_t layout, bool async, Where... where) {
    const Span span{pointer(data), num_elems, dtype};
    return me.call([=](Group& group, const Call& call) { group.all_reduce(span, op, call); },
                   layout, async, where...);
  });
  self.def("reduce_scatter", [](Self& me, Address output, Address input, size_t num_elems,
                                DType dtype, Op op, bool async, Where... where) {
    const Span to{pointer(output), num_elems, dtype};
    return me.call(
        [=](Group& group, const Call& call) {
          const auto ranks = static_cast<size_t>(group.size());
          group.reduce_scatter(to, {pointer(input), num_elems * ranks, dtype}, op, call);
        },
        0, async, where...);
  });
  self.def("all_gather", [](Self& me, Address output, Address input, size_t num_elems, DType dtype,
                            bool async, Where... where) {
    const ConstSpan from{pointer(input), num_elems, dtype};
    return me.call(
        [=](Group& group, const Call& call) {
          const auto ranks = static_cast<size_t>(group.size());
          group.all_gather({pointer(output), num_elems * ranks, dtype}, from, call);
        },
        0, async, where...);
  });
  self.def("broadcast", [](Self& me, Address data, size_t num_elems, DType dtype, int root,
                           uint64_t layout, bool async, Where... where) {
    const Span span{pointer(data), num_elems, dtype};
    return me.call([=](Group& group, const Call& call) { group.broadcast(span, root, call); },
                   layout, async, where...);
  });
}

}  // namespace pyar
