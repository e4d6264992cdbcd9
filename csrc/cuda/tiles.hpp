// What one lane does with its units of a tile, for every kernel. Host-and-device: a kernel is a
// loop over tiles around one of these, which the tests run on the CPU.
//
// Lean memory. Perturb leaves, in memory that the caller gives: a byte of marks a unit (which of
// its 8 weights subtraction does not find back), and those weights themselves, tile by tile, packed
// in the order of (lane, step, slot) from a word of `values` that `offsets` names. A warp reserves
// room in slabs by one atomic addition, so that a tile costs no traffic of its own (8 million
// same-address atomics would take as long as the perturbation of 8 billion weights). A tile whose
// room is not there is left unperturbed and says so in `offsets`; the counter goes on counting, so
// that one look at it tells how much is needed, and the caller restores, grows and perturbs again.
// Nothing is ever dropped.
#pragma once

#include "../cpu/target.hpp"
#include "unit_values.hpp"

namespace esfast::device {

using cuda::kSteps;
using cuda::kTileUnits;
using cuda::kUnit;

constexpr uint32_t kNoRoom = 0xFFFFFFFFu;  // in `offsets`: the tile is not perturbed

// Lean memory's buffers: kTileUnits bytes of marks and one offset a tile, words of exceptions.
struct Lists {
  uint8_t* marks;
  uint32_t* offsets;
  uint32_t* values;
  uint64_t capacity;           // of values, in words of 4 bytes
  unsigned long long* demand;  // words asked for by all warps together
  uint32_t slab;               // words that a warp reserves at least
};

// A draw whose keys are kernel parameters, which instructions read where they lie.
struct KeyedDraw {
  Stream keys;
  uint32_t purpose;
};

static inline KeyedDraw keyed_draw_of(const Source& s) {
  return {keys_of(s.seed), s.purpose};
}

ESFAST_FN Stream stream_of(const KeyedDraw& d, uint32_t tensor, uint32_t high) {
  return place_stream(d.keys, high, tensor, d.purpose);
}

struct Perturbation {
  KeyedDraw draw;
  uint32_t row;  // Hadamard
  float scale;
};

static inline Perturbation perturbation_of(const PerturbCall& call) {
  return {keyed_draw_of(call.source), call.source.row, call.scale};
}

template <Noise noise>
ESFAST_FN Stream stream_of(const Perturbation& p, const Span& s) {
  return stream_of(p.draw, s.tensor, high_word(noise, s));
}

// A lane's units of a tile.
template <class Layout>
struct Lane {
  Unit unit[kSteps];
};

template <class Layout>
ESFAST_FN Lane<Layout> lane_of(const Span& s, uint32_t tile, uint32_t lane) {
  Lane<Layout> out;
  ESFAST_UNROLL
  for (uint32_t j = 0; j < kSteps; ++j) {
    const uint32_t number = cuda::unit_in_span(s, tile, j, lane);
    out.unit[j] = Layout::dense ? cuda::dense_unit_of(s, number) : cuda::unit_of(s, number);
  }
  return out;
}

// Calls f(lane) with a lane's units of a tile.
template <class F>
ESFAST_FN void with_lane(const Span& s, uint32_t tile, uint32_t number, F&& f) {
  with_layout(s, tile, [&](auto layout) { f(lane_of<decltype(layout)>(s, tile, number)); });
}

// All of a lane's units, so that their loads are in flight together.
template <class Layout>
ESFAST_FN void load_live(const Span& s, const Lane<Layout>& lane, Raw (&raw)[kSteps]) {
  ESFAST_UNROLL
  for (uint32_t j = 0; j < kSteps; ++j)
    raw[j] = load_raw(live_of<Layout>(s, lane.unit[j]), live_dtype<Layout>(s));
}

template <class Layout>
ESFAST_FN void load_base(const Span& s, const Lane<Layout>& lane, Raw (&raw)[kSteps]) {
  ESFAST_UNROLL
  for (uint32_t j = 0; j < kSteps; ++j)
    raw[j] = load_raw(base_of<Layout>(s, lane.unit[j]), base_dtype<Layout>(s));
}

// ---- shadow memory: live = round(base + scale * noise), base read once, live written once

template <Noise noise, class Layout>
ESFAST_FN void perturb_tile(const Span& s, const Lane<Layout>& lane, const Perturbation& p) {
  const Stream stream = stream_of<noise>(p, s);
  Raw raw[kSteps];
  load_base(s, lane, raw);
  ESFAST_UNROLL
  for (uint32_t j = 0; j < kSteps; ++j) {
    float z[2][4];
    unit_noise<noise>(stream, p.row, lane.unit[j].block, z);
    with_dtypes<Layout>(s, [&](auto live, auto base) {
      raw[j] = perturb_unit<decltype(live), decltype(base)>(raw[j], z, p.scale);
    });
    store_raw(live_of<Layout>(s, lane.unit[j]), live_dtype<Layout>(s), raw[j]);
  }
}

// ---- lean memory

struct Recorded {
  Raw old[kSteps], now[kSteps];
  uint32_t marks[kSteps];
  int count;
};

ESFAST_FN int count_bits(uint32_t bits) {
  return static_cast<int>(Scalar::popcount(bits));
}

ESFAST_FN uint32_t inside(const Unit& u) {
  return (1u << u.end) - (1u << u.first);
}

template <Noise noise, class Layout>
ESFAST_FN Recorded record_tile(const Span& s, const Lane<Layout>& lane, const Perturbation& p) {
  const Stream stream = stream_of<noise>(p, s);
  Recorded r;
  r.count = 0;
  load_live(s, lane, r.old);
  ESFAST_UNROLL
  for (uint32_t j = 0; j < kSteps; ++j) {
    float z[2][4];
    unit_noise<noise>(stream, p.row, lane.unit[j].block, z);
    with_dtype<Layout>(s.live_dtype, [&](auto t) {
      using T = decltype(t);
      r.now[j] = perturb_unit<T, T>(r.old[j], z, p.scale);
      r.marks[j] = lost<T>(r.old[j], r.now[j], z, p.scale) & inside(lane.unit[j]);
    });
    r.count += count_bits(r.marks[j]);
  }
  return r;
}

// Words of 4 bytes that `count` exceptions of a tile take.
ESFAST_FN uint32_t words_for(const Span& s, uint32_t count) {
  return s.live_dtype == Dtype::float32 ? count : (count + 1) / 2;
}

// `before`: exceptions of the lanes before this one. The weights are written after their record.
template <class Layout>
ESFAST_FN void commit_tile(const Span& s, const Lane<Layout>& lane, const Recorded& r,
                           const Lists& lists, uint32_t tile, uint32_t number, uint32_t offset,
                           int before) {
  uint32_t* words = lists.values + offset;
  uint16_t* halves = reinterpret_cast<uint16_t*>(words);
  ESFAST_UNROLL
  for (uint32_t j = 0; j < kSteps; ++j) {
    const uint64_t at = static_cast<uint64_t>(tile) * kTileUnits + j * cuda::kWarp + number;
    lists.marks[at] = static_cast<uint8_t>(r.marks[j]);
    ESFAST_UNROLL
    for (int e = 0; e < 8; ++e) {
      if (!(r.marks[j] >> e & 1u)) continue;
      if (live_dtype<Layout>(s) == Dtype::float32)
        words[before] = r.old[j].w[e];
      else
        halves[before] = static_cast<uint16_t>(r.old[j].w[e / 2] >> (16 * (e % 2)));
      ++before;
    }
    store_raw(live_of<Layout>(s, lane.unit[j]), live_dtype<Layout>(s), r.now[j]);
  }
}

struct Marked {
  uint32_t marks[kSteps];
  int count;
};

ESFAST_FN Marked marks_of(const Lists& lists, uint32_t tile, uint32_t number) {
  Marked m;
  m.count = 0;
  ESFAST_UNROLL
  for (uint32_t j = 0; j < kSteps; ++j) {
    m.marks[j] = lists.marks[static_cast<uint64_t>(tile) * kTileUnits + j * cuda::kWarp + number];
    m.count += count_bits(m.marks[j]);
  }
  return m;
}

// Word e of `raw` in memory order becomes the exception at place `before`.
ESFAST_FN void replace(Raw& raw, int e, Dtype dtype, const uint32_t* words, int before) {
  if (dtype == Dtype::float32) {
    raw.w[e] = words[before];
    return;
  }
  const uint32_t half = reinterpret_cast<const uint16_t*>(words)[before];
  const uint32_t keep = e % 2 ? 0x0000FFFFu : 0xFFFF0000u;
  raw.w[e / 2] = (raw.w[e / 2] & keep) | half << (16 * (e % 2));
}

template <Noise noise, class Layout>
ESFAST_FN void restore_tile(const Span& s, const Lane<Layout>& lane, const Perturbation& p,
                            const Marked& m, const uint32_t* words, int before) {
  const Stream stream = stream_of<noise>(p, s);
  Raw raw[kSteps];
  load_live(s, lane, raw);
  ESFAST_UNROLL
  for (uint32_t j = 0; j < kSteps; ++j) {
    float z[2][4];
    unit_noise<noise>(stream, p.row, lane.unit[j].block, z);
    with_dtype<Layout>(s.live_dtype, [&](auto t) {
      using T = decltype(t);
      raw[j] = perturb_unit<T, T>(raw[j], z, -p.scale);
    });
    ESFAST_UNROLL
    for (int e = 0; e < 8; ++e) {
      if (!(m.marks[j] >> e & 1u)) continue;
      replace(raw[j], e, live_dtype<Layout>(s), words, before);
      ++before;
    }
    store_raw(live_of<Layout>(s, lane.unit[j]), live_dtype<Layout>(s), raw[j]);
  }
}

// ---- copies and the checksum

template <class Layout>
ESFAST_FN void refresh_tile(const Span& s, const Lane<Layout>& lane) {
  Raw raw[kSteps];
  load_base(s, lane, raw);
  ESFAST_UNROLL
  for (uint32_t j = 0; j < kSteps; ++j) {
    with_dtypes<Layout>(s, [&](auto live, auto base) {
      raw[j] = narrowed<decltype(live), decltype(base)>(raw[j]);
    });
    store_raw(live_of<Layout>(s, lane.unit[j]), live_dtype<Layout>(s), raw[j]);
  }
}

template <class Layout>
ESFAST_FN void capture_tile(const Span& s, const Lane<Layout>& lane) {
  Raw raw[kSteps];
  load_live(s, lane, raw);
  ESFAST_UNROLL
  for (uint32_t j = 0; j < kSteps; ++j) {
    with_dtypes<Layout>(
        s, [&](auto live, auto base) { raw[j] = widened<decltype(live), decltype(base)>(raw[j]); });
    store_raw(base_of<Layout>(s, lane.unit[j]), base_dtype<Layout>(s), raw[j]);
  }
}

template <class Layout>
ESFAST_FN uint64_t hash_tile(const Span& s, const Lane<Layout>& lane) {
  uint64_t sum = 0;
  Raw raw[kSteps];
  load_live(s, lane, raw);
  ESFAST_UNROLL
  for (uint32_t j = 0; j < kSteps; ++j) {
    const Unit& u = lane.unit[j];
    const uint64_t index = u.block * kUnit;
    const uint32_t key = s.tensor ^ static_cast<uint32_t>(index >> 32) * kPhiloxW0;
    ESFAST_UNROLL
    for (int e = 0; e < 8; ++e) {
      const uint32_t pair = raw[j].w[e / 2] >> (16 * (e % 2)) & 0xFFFFu;
      const uint32_t bits = live_dtype<Layout>(s) == Dtype::float32 ? raw[j].w[e] : pair;
      const uint32_t low = static_cast<uint32_t>(index) + static_cast<uint32_t>(e);
      const uint64_t one = hash<Thread>(0, key, low, bits);
      sum += e >= u.first && e < u.end ? one : 0;
    }
  }
  return sum;
}

// ---- update

struct Step {
  const Draw* draws;
  int count;
  float hadamard_scale;
  Rule rule;
  KeyedDraw rounding, lone;  // `lone`: the first draw
};

// acc = the population's noise for the lane's units, members in order.
template <Noise noise, class Layout>
ESFAST_FN void add_noise(const Span& s, const Lane<Layout>& lane, const Step& step,
                         float (&acc)[kSteps][2][4]) {
  const uint32_t high = high_word(noise, s);
  ESFAST_UNROLL
  for (uint32_t i = 0; i < 8 * kSteps; ++i) acc[i / 8][i / 4 % 2][i % 4] = 0.0f;
#if defined(__CUDA_ARCH__)
#pragma unroll 1  // 480 instructions a step are long enough
#endif
  for (int n = 0; n < step.count; ++n) {
    const Draw draw = step.draws[n];
    const Stream stream = stream_of(draw, s.tensor, high);
    ESFAST_UNROLL
    for (uint32_t j = 0; j < kSteps; ++j) {
      const uint64_t block = lane.unit[j].block;
      if (noise == Noise::gaussian) {
        float z[2][4];
        gaussian<Thread, 2>(stream, static_cast<uint32_t>(block * 2), z);
        ESFAST_UNROLL
        for (int e = 0; e < 8; ++e)
          acc[j][e / 4][e % 4] =
              Scalar::fma(z[e / 4][e % 4], draw.coefficient, acc[j][e / 4][e % 4]);
      } else {
        const uint32_t signs = signs_of(stream, block);
        ESFAST_UNROLL
        for (int e = 0; e < 8; ++e)
          acc[j][e / 4][e % 4] =
              add_signed<Thread>(acc[j][e / 4][e % 4], draw.coefficient, Scalar::signs(signs >> e));
      }
    }
  }
}

template <class Layout>
ESFAST_FN void add_group(const Lane<Layout>& lane, const Stream& stream, const Tables& tables,
                         int group, int32_t (&sums)[kSteps][8]) {
  ESFAST_UNROLL
  for (uint32_t j = 0; j < kSteps; ++j) {
    uint32_t words[2][4];
    philox<Thread, 2>(stream, static_cast<uint32_t>(lane.unit[j].block * 2), words);
    ESFAST_UNROLL
    for (int e = 0; e < 8; ++e) sums[j][e] += table_sum(tables, group, words[e / 4][e % 4]);
  }
}

// The same of Hadamard members, by group.
template <class Layout>
ESFAST_FN void add_groups(const Span& s, const Lane<Layout>& lane, const Step& step,
                          const Tables& tables, float (&acc)[kSteps][2][4]) {
  const uint32_t high = high_word(Noise::hadamard, s);
  int32_t sums[kSteps][8] = {};
  if (tables.lone) add_group(lane, stream_of(step.lone, s.tensor, high), tables, 0, sums);
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
  for (int n = 0; n < (tables.lone ? 0 : step.count); ++n)
    add_group(lane, stream_of(step.draws[n], s.tensor, high), tables, n, sums);
  ESFAST_UNROLL
  for (uint32_t i = 0; i < 8 * kSteps; ++i)
    acc[i / 8][i / 4 % 2][i % 4] =
        Scalar::mulf(static_cast<float>(sums[i / 8][i % 8]), step.hadamard_scale);
}

// Returns how many of the lane's weights saturated.
template <Noise noise, class Layout>
ESFAST_FN uint32_t update_tile(const Span& s, const Lane<Layout>& lane, const Step& step,
                               const Tables& tables) {
  float acc[kSteps][2][4];
  Raw old[kSteps];
  if (Layout::dense) load_base(s, lane, old);  // 8 registers hide its latency behind the members
  if constexpr (noise == Noise::hadamard)
    add_groups(s, lane, step, tables, acc);
  else
    add_noise<noise>(s, lane, step, acc);
  const bool random = step.rule.stochastic && s.base_dtype != Dtype::float32;
  const Stream rounding = stream_of(step.rounding, s.tensor, static_cast<uint32_t>(s.origin >> 35));
  if (!Layout::dense) load_base(s, lane, old);
  uint32_t saturated = 0;
  ESFAST_UNROLL
  for (uint32_t j = 0; j < kSteps; ++j) {
    const Unit& u = lane.unit[j];
    uint32_t bits[4] = {0, 0, 0, 0};
    float anchor[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    if (step.rule.decay != Decay::none) {
      const Raw pull = load_raw(anchor_of(s, u), s.anchor_dtype);
      with_dtype(s.anchor_dtype, [&](auto t) { widen_raw<decltype(t)>(pull, anchor); });
    }
    if (random) words_of(rounding, static_cast<uint32_t>(u.block), bits);
    with_dtypes<Layout>(s, [&](auto live, auto base) {
      const Updated out = updated<decltype(live), decltype(base)>(old[j], acc[j], anchor, bits,
                                                                  step.rule, u.first, u.end);
      saturated += out.saturated;
      store_raw(base_of<Layout>(s, u), base_dtype<Layout>(s), out.base);
      if (s.base != s.live) store_raw(live_of<Layout>(s, u), live_dtype<Layout>(s), out.live);
    });
  }
  return saturated;
}

}  // namespace esfast::device
