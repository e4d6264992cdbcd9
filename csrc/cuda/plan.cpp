// Segments to spans: pieces inside which counters do not carry, and the tiles that number their
// work.
#include <limits>
#include <stdexcept>

#include "mapping.hpp"

namespace esfast::cuda {
namespace {

// A rows x cols part of a segment, from (row, column).
struct Part {
  uint64_t row, column, rows, cols;
};

uint64_t moved(uint64_t address, int64_t elements, Dtype dtype) {
  return address ? address + static_cast<uint64_t>(elements * bytes_of(dtype)) : 0;
}

uint64_t origin_of(const Segment& s, const Part& p) {
  return s.origin + p.row * s.canonical_row_stride + p.column;
}

uint64_t units_per_row(const Segment& s, const Part& p) {
  const bool same_lead = p.rows == 1 || s.canonical_row_stride % kUnit == 0;
  const uint64_t lead = same_lead ? origin_of(s, p) % kUnit : kUnit - 1;
  return (lead + p.cols + kUnit - 1) / kUnit;
}

bool fits(const Segment& s, const Part& p) {
  const uint64_t first = origin_of(s, p);
  const uint64_t last = first + (p.rows - 1) * s.canonical_row_stride + p.cols - 1;
  constexpr uint64_t most = std::numeric_limits<int32_t>::max();
  return first / kWindow == last / kWindow && p.rows <= most / units_per_row(s, p);
}

// Whole tiles of what `dense_unit_of` describes.
uint32_t dense_tiles(const Span& s) {
  const bool dense = s.rows == 1 && s.live_column_stride == 1 && s.origin % kUnit == 0 &&
                     s.live % 16 == 0 && s.base % 16 == 0 && s.live_dtype == Dtype::bfloat16 &&
                     s.base_dtype == Dtype::bfloat16;
  return dense ? static_cast<uint32_t>(s.cols / (kTileUnits * kUnit)) : 0;
}

Span make_span(const Segment& s, const Part& p) {
  const int64_t row = static_cast<int64_t>(p.row), column = static_cast<int64_t>(p.column);
  Span out{};
  out.live = moved(s.live, row * s.live_row_stride + column * s.live_column_stride, s.live_dtype);
  out.base =
      s.base == s.live ? out.live : moved(s.base, row * s.base_row_stride + column, s.base_dtype);
  out.anchor = moved(s.anchor, row * s.anchor_row_stride + column, s.anchor_dtype);
  out.live_row_stride = s.live_row_stride;
  out.live_column_stride = s.live_column_stride;
  out.base_row_stride = s.base == s.live ? s.live_row_stride : s.base_row_stride;
  out.anchor_row_stride = s.anchor_row_stride;
  out.cols = p.cols;
  out.origin = origin_of(s, p);
  out.canonical_row_stride = s.canonical_row_stride;
  out.rows = static_cast<uint32_t>(p.rows);
  out.units_per_row = static_cast<uint32_t>(units_per_row(s, p));
  out.tensor = s.tensor;
  out.live_dtype = s.live_dtype;
  out.base_dtype = s.base_dtype;
  out.anchor_dtype = s.anchor_dtype;
  out.dense_tiles = dense_tiles(out);
  return out;
}

// Halves rows, then cuts columns at windows, until a part fits a span: at most 33 calls deep.
void add_parts(const Segment& s, const Part& p, std::vector<Span>& spans) {
  if (fits(s, p)) {
    spans.push_back(make_span(s, p));
  } else if (p.rows > 1) {
    const uint64_t half = p.rows / 2;
    add_parts(s, {p.row, p.column, half, p.cols}, spans);
    add_parts(s, {p.row + half, p.column, p.rows - half, p.cols}, spans);
  } else {
    const uint64_t end = p.column + p.cols;
    for (uint64_t column = p.column; column < end;) {
      const uint64_t room = kWindow - origin_of(s, {p.row, column, 1, 1}) % kWindow;
      const uint64_t cols = end - column < room ? end - column : room;
      spans.push_back(make_span(s, {p.row, column, 1, cols}));
      column += cols;
    }
  }
}

}  // namespace

Plan make_plan(const std::vector<Segment>& segments) {
  Plan plan;
  for (const Segment& s : segments)
    if (s.rows && s.cols) add_parts(s, {0, 0, s.rows, s.cols}, plan.spans);
  uint64_t tiles = 0;
  for (Span& s : plan.spans) {
    s.first_tile = static_cast<uint32_t>(tiles);
    const uint64_t units = static_cast<uint64_t>(s.rows) * s.units_per_row;
    tiles += (units + kTileUnits - 1) / kTileUnits;
    if (tiles > std::numeric_limits<uint32_t>::max())
      throw std::invalid_argument("the table has more than 2^32 tiles of 512 elements; split it");
  }
  plan.tiles = static_cast<uint32_t>(tiles);
  return plan;
}

}  // namespace esfast::cuda
