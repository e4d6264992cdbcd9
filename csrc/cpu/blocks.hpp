// Chunks -> blocks of up to 2,048 elements, the unit that the loops of a CPU target work on.
//
// Noise goes to a buffer that stays in the first-level cache (8 KiB; noise_loops.hpp), then one
// pass over the block uses it (weight_loops.hpp), so that noises, dtypes and kernels combine at run
// time instead of multiplying in code. Only plain C types live in these headers: a standard
// container compiled with one target's flags could be the copy that the linker keeps for all.
#pragma once

#include <cstdlib>
#include <cstring>

#include "../kernels.hpp"
#include "../lanes/scalar.hpp"
#include "target.hpp"

namespace esfast::ESFAST_LANES {

constexpr int kTile = 128;    // elements of one Rademacher counter; blocks start on a tile
constexpr int kBlock = 2048;  // 16 tiles
constexpr int kSlack = 256;   // the last batch of counters may write past the block's end

template <class L>
constexpr int kStep = L::vectors * L::width;  // weights handled together

struct Buffers {
  alignas(64) float noise[kBlock + kSlack];
  alignas(64) float anchor[kBlock];
  alignas(64) uint32_t random[(kBlock + kSlack) / 2];
  alignas(64) uint8_t gathered[4 * kBlock];
  Stream* streams;     // of an update's sources, for one tensor and one high counter word
  int32_t* tables;     // Hadamard look-up tables of all groups
  int32_t table_base;  // what a sum over all of them starts from
  uint32_t tensor;
  uint64_t high;
  bool ready;
};

struct Block {
  uint64_t index;  // logical index of its first element
  int count;
  uint8_t* live;
  uint8_t* base;
  const uint8_t* anchor;
  int lead() const { return static_cast<int>(index % kTile); }
  int tiles() const { return (lead() + count + kTile - 1) / kTile; }
  uint64_t tile() const { return index / kTile; }
};

// The arrays that the pass over a block will touch, asked for while its noise is made: noise leaves
// the memory idle, and a pass leaves idle what makes noise. All of them, written ones too, since
// one that is waited for holds up the others. A Hadamard update in shadow memory takes 0.83 of its
// time so, a Gaussian perturbation 0.95 (Zen 4; docs/benchmarks.md).
struct Ahead {
  uint64_t from[6];  // addresses of runs that take 2 bytes an element of the block's tiles
  int runs;

  void add(const uint8_t* array, int bytes, const Block& b) {
    const uint64_t start =
        reinterpret_cast<uint64_t>(array) - static_cast<uint64_t>(b.lead() * bytes);
    for (int k = 0; 2 * k < bytes; ++k)
      from[runs++] = start + static_cast<uint64_t>(2 * k * b.tiles() * kTile);
  }

  // The lines of `count` elements from `first` on; an address beyond an array's end does no harm.
  // Unrolled, these two lines cost the loops around them registers, and more than they gain.
  ESFAST_METHOD void ask(int first, int count) const {
    ESFAST_ROLL
    for (int at = 2 * first; at < 2 * (first + count); at += 64) {
      ESFAST_ROLL
      for (int k = 0; k < runs; ++k)
        __builtin_prefetch(reinterpret_cast<const void*>(from[k] + static_cast<uint64_t>(at)));
    }
  }
};

static Ahead ahead_of(const Segment& s, const Block& b, bool anchored) {
  Ahead ahead{};
  ahead.add(b.live, bytes_of(s.live_dtype), b);
  if (b.base != b.live) ahead.add(b.base, bytes_of(s.base_dtype), b);
  if (anchored) ahead.add(b.anchor, bytes_of(s.anchor_dtype), b);
  return ahead;
}

template <bool gather>
static void copy_strided(uint8_t* packed, uint8_t* strided, int count, int64_t step, int bytes) {
  for (int i = 0; i < count; ++i) {
    uint8_t* element = strided + static_cast<int64_t>(i) * step * bytes;
    memcpy(gather ? packed + i * bytes : element, gather ? element : packed + i * bytes,
           static_cast<size_t>(bytes));
  }
}

// Calls `body` for each block of the chunk. A strided row is gathered, then scattered if written.
template <class Body>
static void for_blocks(const Segment& s, const Chunk& c, uint8_t* gathered, bool writes,
                       Body&& body) {
  const int live_bytes = bytes_of(s.live_dtype), base_bytes = bytes_of(s.base_dtype);
  const int anchor_bytes = bytes_of(s.anchor_dtype);
  const int64_t step = s.live_column_stride;
  for (uint64_t row = c.row; row < c.row + c.rows; ++row) {
    for (uint64_t column = c.column; column < c.column + c.columns;) {
      Block b;
      b.index = s.origin + row * s.canonical_row_stride + column;
      uint64_t count = c.column + c.columns - column;
      const uint64_t room = static_cast<uint64_t>(kBlock - b.lead());
      const uint64_t before_carry = (1ull << 32) - (b.index & 0xFFFFFFFFull);
      count = count < room ? count : room;
      count = count < before_carry ? count : before_carry;
      b.count = static_cast<int>(count);
      const int64_t r = static_cast<int64_t>(row), k = static_cast<int64_t>(column);
      uint8_t* live =
          reinterpret_cast<uint8_t*>(s.live) + (r * s.live_row_stride + k * step) * live_bytes;
      b.live = step == 1 ? live : gathered;
      b.base = s.base == s.live
                   ? b.live
                   : reinterpret_cast<uint8_t*>(s.base) + (r * s.base_row_stride + k) * base_bytes;
      b.anchor =
          reinterpret_cast<const uint8_t*>(s.anchor) + (r * s.anchor_row_stride + k) * anchor_bytes;
      if (step != 1) copy_strided<true>(gathered, live, b.count, step, live_bytes);
      body(b);
      if (step != 1 && writes) copy_strided<false>(gathered, live, b.count, step, live_bytes);
      column += count;
    }
  }
}

}  // namespace esfast::ESFAST_LANES
