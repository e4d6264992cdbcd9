// The loop of every kernel over tiles: a warp keeps its span, in shared memory, until a tile lies
// beyond it. (In registers a span would take 28 of the 64 that full occupancy leaves a thread.)
#pragma once

#include "tiles.hpp"

namespace esfast::cuda {

// Calls body(span, tile, lane number) for tiles first, first + every, ... of this warp; `stride`
// looks at every stride-th tile of the table only. `threads`: of the block.
template <int threads, class Body>
__device__ __forceinline__ void for_tiles(const Tiles& table, uint32_t stride, Body&& body) {
  constexpr uint32_t kWords = sizeof(Span) / 4;
  static_assert(kWords <= kWarp, "a lane copies a word");
  __shared__ Span spans[threads / kWarp];
  const uint32_t lane = threadIdx.x % kWarp;
  Span& span = spans[threadIdx.x / kWarp];
  const uint32_t every = gridDim.x * (threads / kWarp) * stride;
  uint64_t tile = static_cast<uint64_t>(warp_of(blockIdx.x, threadIdx.x, threads)) * stride;
  uint32_t number = 0, end = 0;
  for (; tile < table.tiles; tile += every) {
    const uint32_t t = static_cast<uint32_t>(tile);
    if (t >= end) {
      number = find_span(table.spans, table.count, number, t);
      end = number + 1 < table.count ? table.spans[number + 1].first_tile : table.tiles;
      __syncwarp();
      if (lane < kWords)
        reinterpret_cast<uint32_t*>(&span)[lane] =
            reinterpret_cast<const uint32_t*>(table.spans + number)[lane];
      __syncwarp();
    }
    body(const_cast<const Span&>(span), t, lane);
  }
}

}  // namespace esfast::cuda
