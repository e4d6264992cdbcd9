// Which thread handles which element: pure arithmetic, the same on the host, where it is tested.
//
// A unit is 8 elements with consecutive logical indices that start at a multiple of 8: two counters
// of Gaussian or Hadamard noise, one counter of rounding bits, one 16-byte access of a 16-bit
// dtype. The first and the last unit of a row may be partly outside it. A span is a segment (or a
// part of one, so that no 32-bit counter carries inside it) whose units are numbered row by row; a
// tile is 64 neighbouring units of one span, and one warp takes a tile at a time: lane l its units
// l and 32 + l. Warp w of W takes tiles w, w + W, ...: even work whatever the tensor sizes, and all
// warps read near each other, which spares the address translation. A tensor of one element costs
// one tile.
#pragma once

#include <vector>

#include "../segments.hpp"
#include "../target.hpp"

namespace esfast::cuda {

constexpr uint32_t kUnit = 8;
constexpr uint32_t kWarp = 32;
constexpr uint32_t kSteps = 2;  // units of a thread in a tile: two loads in flight
constexpr uint32_t kTileUnits = kWarp * kSteps;
constexpr uint64_t kWindow = 1ull << 33;  // elements: no span crosses a canonical multiple of it

// As Segment, but addresses and origin are those of its own first element.
struct Span {
  uint64_t live, base, anchor;
  int64_t live_row_stride, live_column_stride, base_row_stride, anchor_row_stride;
  uint64_t cols, origin, canonical_row_stride;
  uint32_t rows;
  uint32_t units_per_row;  // the most that a row touches; rows * units_per_row fits 31 bits
  uint32_t first_tile;     // of the table
  uint32_t tensor;
  Dtype live_dtype, base_dtype, anchor_dtype;
  uint32_t dense_tiles;  // so many of its first tiles are `Dense`
};
static_assert(sizeof(Span) == 112, "copied to the device as bytes");

// Slot e, for first <= e < end, is the element of logical index 8 * block + e, in column `column +
// e` of row `row`; the other slots lie outside the row.
struct Unit {
  uint64_t block;
  int64_t column;
  uint32_t row;
  int first, end;
};

ESFAST_FN Unit unit_of(const Span& s, uint32_t number) {
  Unit u;
  u.row = s.rows == 1 ? 0 : number / s.units_per_row;
  const uint32_t k = number - u.row * s.units_per_row;
  const uint64_t start = s.origin + u.row * s.canonical_row_stride;
  const uint32_t lead = static_cast<uint32_t>(start) % kUnit;
  const uint64_t past =
      lead + s.cols - 1;  // from slot 0 of the row's first unit to its last element
  const uint64_t last = past / kUnit;
  u.block = start / kUnit + k;
  u.column = static_cast<int64_t>(k) * kUnit - lead;
  u.first = k == 0 ? static_cast<int>(lead) : 0;
  u.end = k < last ? static_cast<int>(kUnit) : static_cast<int>(past % kUnit) + 1;
  if (k > last || u.row >= s.rows) u.end = u.first = 0;
  return u;
}

// A unit of a dense tile: one row of bf16 weights from a multiple of 8 on, base and live weights on
// 16-byte boundaries. Most weights of most models lie so, and a lane that knows it needs half of
// the instructions that `unit_of` and what follows from it take.
ESFAST_FN Unit dense_unit_of(const Span& s, uint32_t number) {
  const int64_t column = static_cast<int64_t>(number) * kUnit;
  return {s.origin / kUnit + number, column, 0, 0, static_cast<int>(kUnit)};
}

// A warp's place in a grid, and the number of a lane's unit in a tile.
ESFAST_FN uint32_t warp_of(uint32_t block, uint32_t thread, uint32_t threads) {
  return block * (threads / kWarp) + thread / kWarp;
}

ESFAST_FN uint32_t unit_in_span(const Span& s, uint32_t tile, uint32_t step, uint32_t lane) {
  return (tile - s.first_tile) * kTileUnits + step * kWarp + lane;
}

// The span that holds `tile`, at or after span `from`.
ESFAST_FN uint32_t find_span(const Span* spans, uint32_t count, uint32_t from, uint32_t tile) {
  uint32_t low = from, high = count;  // the answer is in [low, high)
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    if (spans[middle].first_tile <= tile)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// The table as a kernel sees it; `spans` is the caller's device memory.
struct Tiles {
  const Span* spans;
  uint32_t count, tiles;
};

struct Plan {
  std::vector<Span> spans;
  uint32_t tiles = 0;
};

// Throws std::invalid_argument for a table of more than 2^32 - 1 tiles.
Plan make_plan(const std::vector<Segment>& segments);

}  // namespace esfast::cuda
