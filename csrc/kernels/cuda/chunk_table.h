// Tables that tell one launch about many spans: spans are cut into chunks of equal size, so that
// blocks have equal work whatever the sizes of the parameters. Built once per bucket; an *image* is
// the bytes that go to the device. C++17.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/dtype.h"

namespace pyar {

// Of the widest type that a chunk holds. 4 accesses of 16 bytes for each of 256 threads: smaller
// ones cost more reads of the table, larger ones leave some of a GPU's 1,000 blocks without work at
// the end of a bucket of 25 MB. Not tuned on a GPU yet.
inline constexpr size_t kChunkBytes = size_t{16} << 10;

// How far all spans of a chunk are from a boundary of `width` elements.
class CommonHead {
 public:
  CommonHead(size_t width, size_t num_elems) : width_(width), num_elems_(num_elems) {}
  // UsageError unless `address` is a multiple of elem_bytes.
  void add(uint64_t address, size_t elem_bytes);
  // Elements before the first at which every span has such a boundary; all of them if none is.
  size_t elems() const;

 private:
  size_t width_, num_elems_, phase_ = 0;
  bool is_first_ = true, is_common_ = true;
};

struct SpanChunk {
  uint64_t source, destination;  // bytes from the bases of the call, which may be 0
  uint32_t num_elems, head;
};

struct TableSpan {
  uint64_t source, destination;
  size_t num_elems;
};

class SpanTable {
 public:
  // Types are equal and floating, or float32 and a 16-bit float. chunk_elems 0: kChunkBytes.
  SpanTable(DType from, DType to, const std::vector<TableSpan>& spans, size_t chunk_elems = 0);
  DType from() const { return from_; }
  DType to() const { return to_; }
  size_t num_chunks() const { return chunks_.size(); }
  std::vector<char> image() const;

 private:
  DType from_, to_;
  std::vector<SpanChunk> chunks_;
};

inline constexpr uint64_t kNoSpan = ~uint64_t{0};

struct UpdateChunk {
  uint64_t weight, momentum, gradient, copy;  // bytes from the bases of the call, or kNoSpan
  uint32_t num_elems, head;
  uint32_t piece, group;
};

// One parameter. Without a momentum its SGD has none; a copy is of the gradient's type.
struct TablePiece {
  uint64_t weight, momentum, gradient, copy;
  size_t num_elems;
  uint32_t group;
};

// What a block found among the gradients of a chunk.
struct Finding {
  double sum_squares;
  uint32_t nonfinite;
  uint32_t unused;  // no padding in an image
};

// Its image: the chunks, a Finding for each, one word for `aborted` (16 bytes). The last two are
// the kernels' own: updates with one image must not overlap.
class UpdateTable {
 public:
  // Types are equal and floating, or float32 weights with 16-bit gradients.
  UpdateTable(DType gradient, DType weight, const std::vector<TablePiece>& pieces,
              size_t chunk_elems = 0);
  DType gradient() const { return gradient_; }
  DType weight() const { return weight_; }
  size_t num_chunks() const { return chunks_.size(); }
  size_t num_groups() const { return num_groups_; }  // the largest index + 1
  std::vector<char> image() const;

  size_t findings_begin() const { return chunks_.size() * sizeof(UpdateChunk); }
  size_t aborted_begin() const { return findings_begin() + chunks_.size() * sizeof(Finding); }

 private:
  DType gradient_, weight_;
  size_t num_groups_ = 0;
  std::vector<UpdateChunk> chunks_;
};

}  // namespace pyar
