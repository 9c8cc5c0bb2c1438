// Halving-doubling: 2 log2(p) steps and 2(p-1)/p of the bytes for p a power of two. Any other p by
// binary blocks: two more steps; a rank sends at most twice the bytes.
#include <algorithm>
#include <bit>

#include "schedules/algorithms.h"

namespace pyar {
namespace {

// Ranks [first, first + size), size = 2^levels. After its own reduce-scatter each rank owns
// num_chunks / size chunks.
struct Block {
  int first, size;
  int levels() const { return std::countr_zero(static_cast<unsigned>(size)); }
};

// The binary digits of p, largest first.
std::vector<Block> blocks_of(int size) {
  std::vector<Block> blocks;
  for (int first = 0; first < size; first += blocks.back().size)
    blocks.push_back(
        {first, static_cast<int>(std::bit_floor(static_cast<unsigned>(size - first)))});
  return blocks;
}

// The rank of `block` that owns `chunk`: halving decides the highest bit of the chunk by the lowest
// bit of the rank.
int owner_of(int chunk, const Block& block, int num_chunks) {
  int local = 0;
  for (int level = 0, half = num_chunks / 2; level < block.levels(); ++level, half /= 2)
    local |= (chunk / half % 2) << level;
  return block.first + local;
}

}  // namespace

// Inside each block, the ranks at distance 1, 2, 4... swap halves of what they still own. Then
// partial sums climb from the smallest block to the largest: a block passes on, in step log2(size
// of the next larger), what it has received in step log2(its own size), so that the whole climb
// takes one step more than the largest block needs.
Schedule halving_reduce_scatter(int rank, int size) {
  const std::vector<Block> blocks = blocks_of(size);
  const auto mine =
      std::ranges::find_if(blocks, [=](const Block& b) { return rank < b.first + b.size; });
  const int num_chunks = blocks.front().size, local = rank - mine->first;
  Schedule s{rank, size, num_chunks, {}};
  s.steps.resize(static_cast<size_t>(blocks.front().levels() + (blocks.size() > 1 ? 1 : 0)));
  const auto step = [&](int index) -> Step& { return s.steps[static_cast<size_t>(index)]; };

  int begin = 0, end = num_chunks;  // what I own
  for (int level = 0; level < mine->levels(); ++level) {
    const int partner = mine->first + (local ^ (1 << level)), middle = (begin + end) / 2;
    if (local >> level & 1) {
      step(level) = {{add(partner, begin, middle)}, {add(partner, middle, end)}};
      begin = middle;
    } else {
      step(level) = {{add(partner, middle, end)}, {add(partner, begin, middle)}};
      end = middle;
    }
  }

  if (mine + 1 != blocks.end())
    step(mine->levels()).recvs = {add(owner_of(begin, mine[1], num_chunks), begin, end)};
  if (mine != blocks.begin()) {
    const Block& larger = mine[-1];
    const int width = num_chunks / larger.size;
    for (int chunk = begin; chunk < end; chunk += width)
      step(larger.levels())
          .sends.push_back(add(owner_of(chunk, larger, num_chunks), chunk, chunk + width));
  }
  return s;
}

Schedule doubling_all_gather(int rank, int size) {
  return mirrored(halving_reduce_scatter(rank, size));
}

Schedule halving_doubling(int rank, int size) {
  return then(halving_reduce_scatter(rank, size), doubling_all_gather(rank, size));
}

// Exact for powers of two, else an upper bound: a block is taken to be ready to pass on when its
// own halving is done and all sums of the smaller block have arrived at all of its ranks.
double halving_doubling_cost(int size, double bytes, Link link) {
  const std::vector<Block> blocks = blocks_of(size);
  double ready_s = 0;
  for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
    if (block != blocks.rbegin()) {
      const Block& smaller = block[-1];
      ready_s += link.time_s(block->size / smaller.size, bytes / smaller.size);
    }
    ready_s = std::max(ready_s, link.time_s(block->levels(), bytes - bytes / block->size));
  }
  return 2 * ready_s;
}

}  // namespace pyar
