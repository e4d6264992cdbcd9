// The split of a model into chunks: even work for threads whatever the tensor sizes.
#include "segments.hpp"

#include "cpu/target.hpp"

namespace esfast {

// A row's parts end at canonical multiples of kChunk, so that no part starts inside a tile.
static void split_row(const Segment& s, uint32_t number, uint64_t row, std::vector<Chunk>& chunks) {
  const uint64_t start = s.origin + row * s.canonical_row_stride;
  for (uint64_t column = 0; column < s.cols;) {
    const uint64_t room = kChunk - (start + column) % kChunk, left = s.cols - column;
    const uint64_t columns = left < room ? left : room;
    chunks.push_back({number, 1, row, column, columns});
    column += columns;
  }
}

std::vector<Chunk> split(const std::vector<Segment>& segments) {
  std::vector<Chunk> chunks;
  for (uint32_t number = 0; number < segments.size(); ++number) {
    const Segment& s = segments[number];
    if (s.rows == 0 || s.cols == 0) continue;
    if (s.rows == 1 || s.cols >= kChunk) {
      for (uint64_t row = 0; row < s.rows; ++row) split_row(s, number, row, chunks);
      continue;
    }
    const uint64_t step = kChunk / s.cols;
    for (uint64_t row = 0; row < s.rows; row += step) {
      const uint64_t rows = s.rows - row < step ? s.rows - row : step;
      chunks.push_back({number, static_cast<uint32_t>(rows), row, 0, s.cols});
    }
  }
  return chunks;
}

size_t record_bound(const Segment& s, const Chunk& c) {
  constexpr uint64_t block = 2048;  // blocks start on a tile, so a row adds up to two
  const uint64_t masks = c.columns / 64 + 2 * (c.columns / block + 2);
  return c.rows * (8 * masks + c.columns * static_cast<uint64_t>(bytes_of(s.live_dtype))) +
         kRecordSlack;
}

}  // namespace esfast
