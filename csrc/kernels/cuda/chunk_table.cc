#include "kernels/cuda/chunk_table.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>

#include "base/error.h"

namespace pyar {
namespace {

static_assert(sizeof(SpanChunk) == 24 && sizeof(UpdateChunk) == 48 && sizeof(Finding) == 16);

constexpr size_t kImageAlign = 16;

bool is_half(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

size_t width_of(DType a, DType b) { return 16 / std::max(size_of(a), size_of(b)); }

// Whole accesses: see head_of_chunk().
size_t chunk_elems_of(size_t wanted, DType a, DType b) {
  const size_t width = width_of(a, b);
  const size_t elems = wanted ? wanted : kChunkBytes / std::max(size_of(a), size_of(b));
  if (elems > std::numeric_limits<uint32_t>::max() - width)
    throw UsageError("a chunk of " + std::to_string(elems) + " elements is too large");
  return (elems + width - 1) / width * width;
}

// Calls add(begin, num_elems) for each chunk of a span.
template <typename Add>
void cut(size_t num_elems, size_t chunk_elems, Add add) {
  for (size_t begin = 0; begin < num_elems; begin += chunk_elems)
    add(begin, static_cast<uint32_t>(std::min(chunk_elems, num_elems - begin)));
}

// Chunks are whole accesses long: each begins as far from a boundary as its span.
uint32_t head_of_chunk(const CommonHead& head, uint32_t num_elems) {
  return static_cast<uint32_t>(std::min<size_t>(head.elems(), num_elems));
}

uint64_t advanced(uint64_t span, size_t elems, DType dtype) {
  return span == kNoSpan ? kNoSpan : span + elems * size_of(dtype);
}

template <typename Chunk>
std::vector<char> bytes_of(const std::vector<Chunk>& chunks, size_t image_bytes) {
  static_assert(std::is_trivially_copyable_v<Chunk>);
  std::vector<char> image(image_bytes);
  if (!chunks.empty()) std::memcpy(image.data(), chunks.data(), chunks.size() * sizeof(Chunk));
  return image;
}

}  // namespace

void CommonHead::add(uint64_t address, size_t elem_bytes) {
  if (address % elem_bytes != 0)
    throw UsageError("address " + std::to_string(address) + " is not aligned to its elements of " +
                     std::to_string(elem_bytes) + " bytes");
  const size_t phase = address / elem_bytes % width_;
  is_common_ = is_common_ && (is_first_ || phase == phase_);
  phase_ = phase;
  is_first_ = false;
}

size_t CommonHead::elems() const {
  return is_common_ ? std::min(num_elems_, (width_ - phase_) % width_) : num_elems_;
}

SpanTable::SpanTable(DType from, DType to, const std::vector<TableSpan>& spans, size_t chunk_elems)
    : from_(from), to_(to) {
  const bool is_known = (from == to && is_floating(from)) ||
                        (from == DType::kFloat32 && is_half(to)) ||
                        (to == DType::kFloat32 && is_half(from));
  if (!is_known)
    throw UsageError(std::string("no CUDA kernel casts ") + name_of(from) + " to " + name_of(to));
  const size_t size = chunk_elems_of(chunk_elems, from, to);
  for (const TableSpan& span : spans) {
    CommonHead head(width_of(from, to), span.num_elems);
    head.add(span.source, size_of(from));
    head.add(span.destination, size_of(to));
    cut(span.num_elems, size, [&](size_t begin, uint32_t num_elems) {
      chunks_.push_back({advanced(span.source, begin, from), advanced(span.destination, begin, to),
                         num_elems, head_of_chunk(head, num_elems)});
    });
  }
}

std::vector<char> SpanTable::image() const {
  return bytes_of(chunks_, chunks_.size() * sizeof(SpanChunk));
}

UpdateTable::UpdateTable(DType gradient, DType weight, const std::vector<TablePiece>& pieces,
                         size_t chunk_elems)
    : gradient_(gradient), weight_(weight) {
  const bool is_mixed = weight == DType::kFloat32 && is_half(gradient);
  if (!is_mixed && !(gradient == weight && is_floating(weight)))
    throw UsageError(std::string("no CUDA kernel updates ") + name_of(weight) + " weights with " +
                     name_of(gradient) + " gradients");
  const size_t size = chunk_elems_of(chunk_elems, gradient, weight);
  for (size_t i = 0; i < pieces.size(); ++i) {
    const TablePiece& piece = pieces[i];
    if (piece.copy != kNoSpan && !is_mixed)
      throw UsageError("only float32 weights with 16-bit gradients have a copy in 16 bits");
    num_groups_ = std::max(num_groups_, size_t{piece.group} + 1);
    const std::pair<uint64_t, size_t> spans[] = {{piece.weight, size_of(weight)},
                                                 {piece.momentum, size_of(weight)},
                                                 {piece.gradient, size_of(gradient)},
                                                 {piece.copy, size_of(gradient)}};
    CommonHead head(width_of(gradient, weight), piece.num_elems);
    for (const auto& [address, elem_bytes] : spans)
      if (address != kNoSpan) head.add(address, elem_bytes);
    cut(piece.num_elems, size, [&](size_t begin, uint32_t num_elems) {
      chunks_.push_back(
          {advanced(piece.weight, begin, weight), advanced(piece.momentum, begin, weight),
           advanced(piece.gradient, begin, gradient), advanced(piece.copy, begin, gradient),
           num_elems, head_of_chunk(head, num_elems), static_cast<uint32_t>(i), piece.group});
    });
  }
}

std::vector<char> UpdateTable::image() const {
  return bytes_of(chunks_, aborted_begin() + kImageAlign);
}

}  // namespace pyar
