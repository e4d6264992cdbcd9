// What a kernel sees of a model: segments, and the chunks that the work is split into.
//
// A segment is a rows x cols piece of one canonical tensor, wherever and however it lies in memory.
// Its element (r, c) has the logical index origin + r * canonical_row_stride + c. A contiguous
// tensor is one row; a fused or row-sharded one too; a column shard has a row a canonical row.
#pragma once

#include <cstdint>
#include <vector>

namespace esfast {

enum class Dtype : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };
enum class Noise : int32_t { gaussian = 0, rademacher = 1, hadamard = 2 };
constexpr int kNoises = 3;
enum class Decay : int32_t { none = 0, l1 = 1, l2 = 2 };

inline int bytes_of(Dtype dtype) {
  return dtype == Dtype::float32 ? 4 : 2;
}

// Addresses are integers: the caller owns the memory and keeps it alive. Strides in elements.
struct Segment {
  uint64_t live, base, anchor;  // base and anchor may be 0
  int64_t live_row_stride, live_column_stride;
  int64_t base_row_stride, anchor_row_stride;  // their columns are contiguous
  uint64_t rows, cols;
  uint64_t origin, canonical_row_stride;
  uint32_t tensor;  // id: the first four bytes of SHA-256 of the canonical name
  Dtype live_dtype, base_dtype, anchor_dtype;
  // The read-only mapping of a file that the anchor lies in, whose pages a pass on the CPU gives
  // back; 0 for any other memory, which would lose its contents. Set by who made the mapping.
  uint64_t anchor_map, anchor_map_end;
};

// A part of one segment that one thread handles at a time: whole rows, or a part of one row.
struct Chunk {
  uint32_t segment;
  uint32_t rows;
  uint64_t row, column, columns;
};

constexpr uint64_t kChunk = 1u << 16;  // elements: 2,052 chunks in a 135M-parameter model

// Splits every segment into chunks of about kChunk elements, cut at canonical multiples of it.
std::vector<Chunk> split(const std::vector<Segment>& segments);

}  // namespace esfast
