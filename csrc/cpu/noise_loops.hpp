// Noise of a block into the buffer: one member's, or the sum over a population.
#pragma once

#include "blocks.hpp"

namespace esfast::ESFAST_LANES {

// In memory order, from the first element of the block's first tile.
template <class L>
static inline void store_interleaved(float* out, typename L::f32 (&z)[4]) {
  typename L::u32 v[4] = {L::as_bits(z[0]), L::as_bits(z[1]), L::as_bits(z[2]), L::as_bits(z[3])};
  L::interleave(v);
  ESFAST_UNROLL
  for (int j = 0; j < 4; ++j) L::storef(out + j * L::width, L::as_float(v[j]));
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// A block's noise: where it goes, and what will be wanted with it.
struct Place {
  uint64_t tile;
  int tiles;
  Ahead ahead;
  float* out;
  int counters() const { return tiles * (kTile / 4); }
  uint32_t counter() const { return static_cast<uint32_t>(tile * (kTile / 4)); }
};

// Calls f(Count<B>, first counter) for batches of B * L::width counters, then pairs and single ones
// for the rest. Only the last may reach past `counters`, by less than a width.
template <class L, int B = L::batches, class F>
ESFAST_FN void for_batches(int counters, F&& f) {
  constexpr int W = L::width, rest = B > 2 ? 2 : 1;
  int c = 0;
  for (; c + B * W <= counters; c += B * W) f(Count<B>{}, c);
  for (; rest < B && c + rest * W <= counters; c += rest * W) f(Count<rest>{}, c);
  for (; c < counters; c += W) f(Count<1>{}, c);
}

// The same over a place's dense noise, with what will be wanted asked for on the way: a batch is
// lines long where a target has vectors.
template <class L, int B = L::batches, class F>
ESFAST_FN void for_dense(const Place& p, F&& f) {
  for_batches<L, B>(p.counters(), [&](auto batches, int c) ESFAST_INLINE {
    constexpr int elements = 4 * decltype(batches)::value * L::width;
    if constexpr (elements >= 32) p.ahead.ask(4 * c, elements);
    f(batches, c);
  });
}

template <class L>
static void philox_words(const Stream& s, uint32_t counter, int counters, uint32_t* out) {
  for_batches<L>(counters, [&](auto batches, int c) ESFAST_INLINE {
    constexpr int B = decltype(batches)::value;
    typename L::u32 words[B][4];
    philox<L, B>(s, counter + static_cast<uint32_t>(c), words);
    ESFAST_UNROLL
    for (int b = 0; b < B; ++b) {
      L::interleave(words[b]);
      ESFAST_UNROLL
      for (int j = 0; j < 4; ++j) L::store(out + 4 * c + (4 * b + j) * L::width, words[b][j]);
    }
  });
}

// A woven target computes the normals of each batch but the last beside the words of the next.
template <class L>
static void fill_gaussian(const Stream& s, const Place& p) {
  typename L::u32 words[L::batches][4];
  for_dense<L>(p, [&](auto batches, int c) ESFAST_INLINE {
    constexpr int B = decltype(batches)::value, W = L::width;
    const uint32_t at = p.counter() + static_cast<uint32_t>(c);
    typename L::f32 z[B][4];
    if constexpr (L::woven && B == L::batches) {
      if (c == 0) philox<L, B>(s, at, words);
      if (c + 2 * B * W <= p.counters())
        gaussian_woven<L, B>(s, at + B * W, words, z);
      else
        normals<L, B>(words, z);
    } else {
      gaussian<L, B>(s, at, z);
    }
    ESFAST_UNROLL
    for (int b = 0; b < B; ++b) store_interleaved<L>(p.out + 4 * (c + b * L::width), z[b]);
  });
}

// acc += c * z.
template <class L, int B>
ESFAST_FN void add_scaled(const typename L::f32 (&z)[B][4], float c, typename L::f32 (&acc)[B][4]) {
  const auto coefficient = L::setf(c);
  ESFAST_UNROLL
  for (int b = 0; b < 4 * B; ++b)
    acc[b / 4][b % 4] = L::fma(z[b / 4][b % 4], coefficient, acc[b / 4][b % 4]);
}

// acc += the members' c_n * eps_n, in their order. A woven target computes the normals of each
// member but the last beside the words of the next.
template <class L, int B>
ESFAST_FN void add_members(const Stream* members, int count, uint32_t block,
                           typename L::f32 (&acc)[B][4]) {
  typename L::f32 z[B][4];
  if constexpr (L::woven) {
    typename L::u32 words[B][4];
    if (count > 0) philox<L, B>(members[0], block, words);
    for (int n = 0; n + 1 < count; ++n) {
      gaussian_woven<L, B>(members[n + 1], block, words, z);
      add_scaled<L, B>(z, members[n].coefficient, acc);
    }
    if (count > 0) {
      normals<L, B>(words, z);
      add_scaled<L, B>(z, members[count - 1].coefficient, acc);
    }
  } else {
    for (int n = 0; n < count; ++n) {
      gaussian<L, B>(members[n], block, z);
      add_scaled<L, B>(z, members[n].coefficient, acc);
    }
  }
}

template <class L>
static void add_gaussian(const Stream* members, int count, const Place& p) {
  const uint32_t counter = p.counter();
  for_dense<L, L::woven ? L::woven : L::batches>(p, [&](auto batches, int c) ESFAST_INLINE {
    constexpr int B = decltype(batches)::value;
    typename L::f32 acc[B][4];
    ESFAST_UNROLL
    for (int b = 0; b < 4 * B; ++b) acc[b / 4][b % 4] = L::setf(0.0f);
    add_members<L, B>(members, count, counter + static_cast<uint32_t>(c), acc);
    ESFAST_UNROLL
    for (int b = 0; b < B; ++b) store_interleaved<L>(p.out + 4 * (c + b * L::width), acc[b]);
  });
}

// Nothing is asked for: there is next to no noise to make beside it, and the pass alone is faster.
template <class L>
static void fill_rademacher(const Stream& s, const Place& p) {
  uint32_t words[4 * (kBlock / kTile + L::batches * L::width)];
  philox_words<L>(s, static_cast<uint32_t>(p.tile), p.tiles, words);
  const auto one = L::as_bits(L::setf(1.0f));
  for (int i = 0; i < p.tiles * kTile; i += L::width)
    L::storef(p.out + i, L::as_float(L::xor_(one, L::signs(words[i / 32] >> (i % 32)))));
}

// Members in groups whose words fit beside the accumulators in the first-level cache.
template <class L>
static void add_rademacher(const Stream* members, int count, const Place& p) {
  constexpr int kGroup = 32, W = L::width, kWords = 4 * (kBlock / kTile + L::batches * W);
  uint32_t words[kGroup][kWords];
  float* out = p.out;
  memset(out, 0, sizeof(float) * static_cast<size_t>(p.tiles * kTile));
  for (int first = 0; first < count; first += kGroup) {
    const int group = count - first < kGroup ? count - first : kGroup;
    for (int n = 0; n < group; ++n)
      philox_words<L>(members[first + n], static_cast<uint32_t>(p.tile), p.tiles, words[n]);
    for (int i = 0; i < p.tiles * kTile; i += 32) {
      if (first == 0) p.ahead.ask(i, 32);
      typename L::f32 acc[32 / W];
      ESFAST_UNROLL
      for (int j = 0; j < 32 / W; ++j) acc[j] = L::loadf(out + i + j * W);
      for (int n = 0; n < group; ++n) {
        ESFAST_UNROLL
        for (int j = 0; j < 32 / W; ++j)
          acc[j] = add_signed<L>(acc[j], members[first + n].coefficient,
                                 L::signs(words[n][i / 32] >> (j * W)));
      }
      ESFAST_UNROLL
      for (int j = 0; j < 32 / W; ++j) L::storef(out + i + j * W, acc[j]);
    }
  }
}

template <class L>
static void fill_hadamard(const Stream& s, uint32_t row, const Place& p) {
  const uint32_t counter = p.counter();
  for_dense<L>(p, [&](auto batches, int c) ESFAST_INLINE {
    constexpr int B = decltype(batches)::value;
    typename L::u32 words[B][4];
    philox<L, B>(s, counter + static_cast<uint32_t>(c), words);
    ESFAST_UNROLL
    for (int b = 0; b < B; ++b) {
      typename L::f32 z[4];
      ESFAST_UNROLL
      for (int j = 0; j < 4; ++j) z[j] = hadamard<L>(words[b][j], row);
      store_interleaved<L>(p.out + 4 * (c + b * L::width), z);
    }
  });
}

// The integers of one group into `sums`: four vectors a batch of counters, not yet interleaved.
template <class L, bool first>
static void sum_hadamard(const Buffers& u, int group, const Place& p, uint32_t* sums) {
  using Tables = HadamardTables<L>;
  const uint32_t counter = p.counter();
  const int32_t* tables = u.tables + group * Tables::words;
  for_dense<L>(p, [&](auto batches, int c) ESFAST_INLINE {
    constexpr int B = decltype(batches)::value;
    typename L::u32 words[B][4];
    philox<L, B>(u.streams[group], counter + static_cast<uint32_t>(c), words);
    ESFAST_UNROLL
    for (int k = 0; k < 4 * B; ++k) {
      uint32_t* at = sums + 4 * c + k * L::width;
      const auto sum = first ? L::set(static_cast<uint32_t>(u.table_base)) : L::load(at);
      L::store(at, Tables::add(sum, words[k / 4][k % 4], tables));
    }
  });
}

template <class L>
static void add_hadamard(const Buffers& u, int count, float scale, const Place& p) {
  if (count == 0) {
    memset(p.out, 0, sizeof(float) * static_cast<size_t>(p.tiles * kTile));
    return;
  }
  const Place again{p.tile, p.tiles, {}, p.out};
  alignas(64) uint32_t sums[kBlock + kSlack];
  sum_hadamard<L, true>(u, 0, p, sums);
  for (int g = 1; g < count; ++g) sum_hadamard<L, false>(u, g, again, sums);
  for (int i = 0; i < p.tiles * kTile; i += 4 * L::width) {
    typename L::f32 acc[4];
    ESFAST_UNROLL
    for (int j = 0; j < 4; ++j)
      acc[j] = L::mulf(L::from_int(L::load(sums + i + j * L::width)), L::setf(scale));
    store_interleaved<L>(p.out + i, acc);
  }
}

// Counter word 1 of a block: the blocks of the four noises hold 4, 128, 4 and 8 elements.
ESFAST_FN uint32_t high_word(Noise noise, uint64_t index) {
  return static_cast<uint32_t>(index >> (noise == Noise::rademacher ? 39 : 34));
}

template <class L>
static const float* fill_noise(const PerturbCall& call, uint32_t tensor, const Block& b,
                               const Ahead& ahead, Buffers& buffers) {
  const Stream s =
      make_stream(call.source.seed, high_word(call.noise, b.index), tensor, call.source.purpose);
  const Place p{b.tile(), b.tiles(), ahead, buffers.noise};
  switch (call.noise) {  // without a default: the compiler names a noise that is left out
    case Noise::gaussian: fill_gaussian<L>(s, p); break;
    case Noise::rademacher: fill_rademacher<L>(s, p); break;
    case Noise::hadamard: fill_hadamard<L>(s, call.source.row, p); break;
  }
  return p.out + b.lead();
}

static void prepare_streams(const UpdateCall& call, uint32_t tensor, uint64_t index, Buffers& u) {
  const uint64_t high = high_word(call.noise, index);
  if (u.ready && u.tensor == tensor && u.high == high) return;
  for (int n = 0; n < call.count; ++n) {
    u.streams[n] = make_stream(call.sources[n].seed, static_cast<uint32_t>(high), tensor,
                               call.sources[n].purpose);
    u.streams[n].coefficient = call.sources[n].coefficient;
  }
  u.tensor = tensor;
  u.high = high;
  u.ready = true;
}

template <class L>
static const float* add_noise(const UpdateCall& call, uint32_t tensor, const Block& b,
                              const Ahead& ahead, Buffers& u) {
  const Place p{b.tile(), b.tiles(), ahead, u.noise};
  prepare_streams(call, tensor, b.index, u);
  switch (call.noise) {
    case Noise::gaussian: add_gaussian<L>(u.streams, call.count, p); break;
    case Noise::rademacher: add_rademacher<L>(u.streams, call.count, p); break;
    case Noise::hadamard: add_hadamard<L>(u, call.count, call.hadamard_scale, p); break;
  }
  return u.noise + b.lead();
}

}  // namespace esfast::ESFAST_LANES
