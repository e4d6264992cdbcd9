// The loops of a CPU target: chunks -> blocks of up to 2,048 elements -> vectors.
//
// Noise goes to a buffer that stays in the first-level cache (8 KiB), then one pass over the block
// uses it, so that noises, dtypes and kernels combine at run time instead of multiplying in code.
// Tails that do not fill a vector run the same bodies on the scalar lane type.
// Only plain C types live here: a standard container compiled with one target's flags could be the
// copy that the linker keeps for all.
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

template <class L>
constexpr uint32_t kAll = static_cast<uint32_t>((1ull << kStep<L>)-1);

struct Buffers {
  alignas(64) float noise[kBlock + kSlack];
  alignas(64) float anchor[kBlock];
  alignas(64) uint32_t random[(kBlock + kSlack) / 2];
  alignas(64) uint8_t gathered[4 * kBlock];
  Stream* streams;  // of an update's sources, for one tensor and one high counter word
  int32_t* tables;  // Hadamard look-up tables of all groups
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
      uint8_t* live = reinterpret_cast<uint8_t*>(s.live) +
                      (r * s.live_row_stride + k * step) * live_bytes;
      b.live = step == 1 ? live : gathered;
      b.base = s.base == s.live
                   ? b.live
                   : reinterpret_cast<uint8_t*>(s.base) + (r * s.base_row_stride + k) * base_bytes;
      b.anchor = reinterpret_cast<const uint8_t*>(s.anchor) +
                 (r * s.anchor_row_stride + k) * anchor_bytes;
      if (step != 1) copy_strided<true>(gathered, live, b.count, step, live_bytes);
      body(b);
      if (step != 1 && writes) copy_strided<false>(gathered, live, b.count, step, live_bytes);
      column += count;
    }
  }
}

// ---- noise into the buffer, in memory order, from the first element of the block's first tile

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

// Calls f(Count<B>, first counter) for batches of B * L::width counters: the target's favourite B,
// then smaller ones for the rest. Only the last may reach past `counters`, by less than a width.
template <class L, class F>
static inline void for_batches(int counters, F&& f) {
  constexpr int W = L::width, B = L::batches;
  int c = 0;
  for (; c + B * W <= counters; c += B * W) f(Count<B>{}, c);
  if (B > 2 && c + 2 * W <= counters) {
    f(Count<B == 3 ? 2 : 1>{}, c);
    c += 2 * W;
  }
  for (; c < counters; c += W) f(Count<1>{}, c);
}

template <class L>
static void philox_words(const Stream& s, uint32_t counter, int counters, uint32_t* out) {
  for_batches<L>(counters, [&](auto batches, int c) {
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

template <class L>
static void fill_gaussian(const Stream& s, uint64_t tile, int tiles, float* out) {
  const uint32_t counter = static_cast<uint32_t>(tile * (kTile / 4));
  for_batches<L>(tiles * (kTile / 4), [&](auto batches, int c) {
    constexpr int B = decltype(batches)::value;
    typename L::f32 z[B][4];
    gaussian<L, B>(s, counter + static_cast<uint32_t>(c), z);
    ESFAST_UNROLL
    for (int b = 0; b < B; ++b) store_interleaved<L>(out + 4 * (c + b * L::width), z[b]);
  });
}

// acc = sum of c_n * eps_n in member order; the accumulators never leave the registers.
template <class L>
static void add_gaussian(const Stream* members, int count, uint64_t tile, int tiles, float* out) {
  const uint32_t counter = static_cast<uint32_t>(tile * (kTile / 4));
  for_batches<L>(tiles * (kTile / 4), [&](auto batches, int c) {
    constexpr int B = decltype(batches)::value;
    typename L::f32 acc[B][4], z[B][4];
    ESFAST_UNROLL
    for (int b = 0; b < 4 * B; ++b) acc[b / 4][b % 4] = L::setf(0.0f);
    for (int n = 0; n < count; ++n) {
      gaussian<L, B>(members[n], counter + static_cast<uint32_t>(c), z);
      const auto coefficient = L::setf(members[n].coefficient);
      ESFAST_UNROLL
      for (int b = 0; b < 4 * B; ++b)
        acc[b / 4][b % 4] = L::fma(z[b / 4][b % 4], coefficient, acc[b / 4][b % 4]);
    }
    ESFAST_UNROLL
    for (int b = 0; b < B; ++b) store_interleaved<L>(out + 4 * (c + b * L::width), acc[b]);
  });
}

template <class L>
static void fill_rademacher(const Stream& s, uint64_t tile, int tiles, float* out) {
  uint32_t words[4 * (kBlock / kTile + L::batches * L::width)];
  philox_words<L>(s, static_cast<uint32_t>(tile), tiles, words);
  const auto one = L::as_bits(L::setf(1.0f));
  for (int i = 0; i < tiles * kTile; i += L::width)
    L::storef(out + i, L::as_float(L::xor_(one, L::signs(words[i / 32] >> (i % 32)))));
}

// Members in groups whose words fit beside the accumulators in the first-level cache.
template <class L>
static void add_rademacher(const Stream* members, int count, uint64_t tile, int tiles, float* out) {
  constexpr int kGroup = 32, W = L::width, kWords = 4 * (kBlock / kTile + L::batches * W);
  uint32_t words[kGroup][kWords];
  memset(out, 0, sizeof(float) * static_cast<size_t>(tiles * kTile));
  for (int first = 0; first < count; first += kGroup) {
    const int group = count - first < kGroup ? count - first : kGroup;
    for (int n = 0; n < group; ++n)
      philox_words<L>(members[first + n], static_cast<uint32_t>(tile), tiles, words[n]);
    for (int i = 0; i < tiles * kTile; i += 32) {
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
static void fill_hadamard(const Stream& s, uint32_t row, uint64_t tile, int tiles, float* out) {
  const uint32_t counter = static_cast<uint32_t>(tile * (kTile / 4));
  for_batches<L>(tiles * (kTile / 4), [&](auto batches, int c) {
    constexpr int B = decltype(batches)::value;
    typename L::u32 words[B][4];
    philox<L, B>(s, counter + static_cast<uint32_t>(c), words);
    ESFAST_UNROLL
    for (int b = 0; b < B; ++b) {
      typename L::f32 z[4];
      ESFAST_UNROLL
      for (int j = 0; j < 4; ++j) z[j] = hadamard<L>(words[b][j], row);
      store_interleaved<L>(out + 4 * (c + b * L::width), z);
    }
  });
}

template <class L>
static void add_hadamard(const Stream* groups, int count, const int32_t* tables, float scale,
                         uint64_t tile, int tiles, float* out) {
  constexpr int bits = L::table_bits, kEntries = ((32 + bits - 1) / bits) << bits;
  const uint32_t counter = static_cast<uint32_t>(tile * (kTile / 4));
  for_batches<L>(tiles * (kTile / 4), [&](auto batches, int c) {
    constexpr int B = decltype(batches)::value;
    typename L::u32 sum[B][4], words[B][4];
    ESFAST_UNROLL
    for (int b = 0; b < 4 * B; ++b) sum[b / 4][b % 4] = L::set(0);
    for (int g = 0; g < count; ++g) {
      philox<L, B>(groups[g], counter + static_cast<uint32_t>(c), words);
      ESFAST_UNROLL
      for (int b = 0; b < 4 * B; ++b)
        sum[b / 4][b % 4] =
            hadamard_sum<L>(sum[b / 4][b % 4], words[b / 4][b % 4], tables + g * kEntries);
    }
    ESFAST_UNROLL
    for (int b = 0; b < B; ++b) {
      typename L::f32 acc[4];
      ESFAST_UNROLL
      for (int j = 0; j < 4; ++j) acc[j] = L::mulf(L::from_int(sum[b][j]), L::setf(scale));
      store_interleaved<L>(out + 4 * (c + b * L::width), acc);
    }
  });
}

// Counter word 1 of a block: the blocks of the four noises hold 4, 128, 4 and 8 elements.
ESFAST_FN uint32_t high_word(Noise noise, uint64_t index) {
  return static_cast<uint32_t>(index >> (noise == Noise::rademacher ? 39 : 34));
}

template <class L>
static const float* fill_noise(const PerturbCall& call, uint32_t tensor, const Block& b,
                               Buffers& buffers) {
  const Stream s =
      make_stream(call.source.seed, high_word(call.noise, b.index), tensor, call.source.purpose);
  float* out = buffers.noise;
  if (call.noise == Noise::gaussian) fill_gaussian<L>(s, b.tile(), b.tiles(), out);
  if (call.noise == Noise::rademacher) fill_rademacher<L>(s, b.tile(), b.tiles(), out);
  if (call.noise == Noise::hadamard)
    fill_hadamard<L>(s, call.source.row, b.tile(), b.tiles(), out);
  return out + b.lead();
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
                              Buffers& u) {
  prepare_streams(call, tensor, b.index, u);
  if (call.noise == Noise::gaussian)
    add_gaussian<L>(u.streams, call.count, b.tile(), b.tiles(), u.noise);
  if (call.noise == Noise::rademacher)
    add_rademacher<L>(u.streams, call.count, b.tile(), b.tiles(), u.noise);
  if (call.noise == Noise::hadamard)
    add_hadamard<L>(u.streams, call.count, u.tables, call.hadamard_scale, b.tile(), b.tiles(),
                    u.noise);
  return u.noise + b.lead();
}

// ---- one pass over the weights of a block

template <class L, class Live, class Base>
static void perturb_block(const Block& b, const float* noise, float scale) {
  for (int i = 0; i < b.count; i += kStep<L>) {
    Weights<L> base, live;
    Base::template load<L>(b.base + i * Base::bytes, base);
    ESFAST_UNROLL
    for (int j = 0; j < L::vectors; ++j)
      live[j] = perturb<L, Live, Base>(base[j], L::loadf(noise + i + j * L::width), scale);
    Live::template store<L>(b.live + i * Live::bytes, live);
  }
}

// One group of up to 64: the mask of its exceptions, then the exceptions themselves.
template <class L, class T>
static uint8_t* perturb_group(uint8_t* live, const float* noise, int count, float scale,
                              uint8_t* record) {
  uint64_t marks = 0;
  uint8_t* to = record + 8;
  for (int i = 0; i < count; i += kStep<L>) {
    uint8_t* at = live + i * T::bytes;
    uint32_t same = 0;
    Weights<L> old, now;
    T::template load<L>(at, old);
    ESFAST_UNROLL
    for (int j = 0; j < L::vectors; ++j) {
      const auto eps = L::loadf(noise + i + j * L::width);
      now[j] = perturb<L, T, T>(old[j], eps, scale);
      const auto back = perturb<L, T, T>(now[j], eps, -scale);
      same |= L::bits_of(L::equal(back, old[j])) << (j * L::width);
    }
    const uint32_t mark = kAll<L> & ~same;
    to = L::template compress<T::bytes>(to, mark, at);
    T::template store<L>(at, now);
    marks |= static_cast<uint64_t>(mark) << i;
  }
  memcpy(record, &marks, 8);
  return to;
}

template <class L, class T>
static const uint8_t* restore_group(uint8_t* live, const float* noise, int count, float scale,
                                    const uint8_t* record) {
  uint64_t marks;
  memcpy(&marks, record, 8);
  const uint8_t* from = record + 8;
  for (int i = 0; i < count; i += kStep<L>) {
    uint8_t* at = live + i * T::bytes;
    Weights<L> v;
    T::template load<L>(at, v);
    ESFAST_UNROLL
    for (int j = 0; j < L::vectors; ++j)
      v[j] = perturb<L, T, T>(v[j], L::loadf(noise + i + j * L::width), -scale);
    T::template store<L>(at, v);
    from = L::template expand<T::bytes>(at, static_cast<uint32_t>(marks >> i) & kAll<L>, from);
  }
  return from;
}

// Splits a block into what full steps cover and a tail for the scalar lane type.
template <class L, class Live, class Base>
static void split_block(const Block& b, Block& head, Block& tail) {
  head = tail = b;
  head.count = b.count / kStep<L> * kStep<L>;
  tail.count = b.count - head.count;
  tail.live += head.count * Live::bytes;
  tail.base += head.count * Base::bytes;
}

template <class L, class Live, class Base>
static void perturb_all(const Block& b, const float* noise, float scale) {
  Block head, tail;
  split_block<L, Live, Base>(b, head, tail);
  perturb_block<L, Live, Base>(head, noise, scale);
  perturb_block<Scalar, Live, Base>(tail, noise + head.count, scale);
}

template <class L, class T>
static uint8_t* perturb_recorded(const Block& b, const float* noise, float scale, uint8_t* to) {
  int i = 0;
  for (; i + 64 <= b.count; i += 64)
    to = perturb_group<L, T>(b.live + i * T::bytes, noise + i, 64, scale, to);
  if (i < b.count)
    to = perturb_group<Scalar, T>(b.live + i * T::bytes, noise + i, b.count - i, scale, to);
  return to;
}

template <class L, class T>
static const uint8_t* restore_recorded(const Block& b, const float* noise, float scale,
                                       const uint8_t* from) {
  int i = 0;
  for (; i + 64 <= b.count; i += 64)
    from = restore_group<L, T>(b.live + i * T::bytes, noise + i, 64, scale, from);
  if (i < b.count)
    from = restore_group<Scalar, T>(b.live + i * T::bytes, noise + i, b.count - i, scale, from);
  return from;
}

template <class L, class Live, class Base>
static void copy_block(const Block& b) {
  for (int i = 0; i < b.count; i += kStep<L>) {
    Weights<L> v;
    Base::template load<L>(b.base + i * Base::bytes, v);
    ESFAST_UNROLL
    for (int j = 0; j < L::vectors; ++j)
      v[j] = Live::template narrow<L>(Base::template widen<L>(v[j]));
    Live::template store<L>(b.live + i * Live::bytes, v);
  }
}

// base = live, once a run: in scalar integers, since conversion instructions alter signalling NaNs.
template <class Live, class Base>
static void capture_all(const Block& b) {
  if (Live::bytes == Base::bytes) {
    memcpy(b.base, b.live, static_cast<size_t>(b.count * Live::bytes));
    return;
  }
  for (int i = 0; i < b.count; ++i) {
    Weights<Scalar> v;
    Live::template load<Scalar>(b.live + i * Live::bytes, v);
    v[0] = Scalar::as_bits(Live::template widen<Scalar>(v[0]));
    Base::template store<Scalar>(b.base + i * Base::bytes, v);
  }
}

// live = round(base): the bits themselves where the dtypes agree.
template <class L, class Live, class Base>
static void copy_all(const Block& b) {
  if (Live::bytes == Base::bytes) {
    memcpy(b.live, b.base, static_cast<size_t>(b.count * Live::bytes));
    return;
  }
  Block head, tail;
  split_block<L, Live, Base>(b, head, tail);
  copy_block<L, Live, Base>(head);
  copy_block<Scalar, Live, Base>(tail);
}

template <class L, class Live, class Base>
static uint32_t update_block(const Block& b, const float* acc, const float* anchor,
                             const uint16_t* random, const Rule& rule) {
  uint32_t saturated = 0;
  const bool mirrored = b.base != b.live;
  for (int i = 0; i < b.count; i += kStep<L>) {
    Weights<L> v, live;
    Base::template load<L>(b.base + i * Base::bytes, v);
    ESFAST_UNROLL
    for (int j = 0; j < L::vectors; ++j) {
      const int at = i + j * L::width;
      v[j] = update<L, Base>(Base::template widen<L>(v[j]), L::loadf(acc + at),
                             L::loadf(anchor + at), L::load16(random + at), rule, saturated);
      live[j] = Live::template nearest<L>(Base::template widen<L>(v[j]));
    }
    Base::template store<L>(b.base + i * Base::bytes, v);
    if (mirrored) Live::template store<L>(b.live + i * Live::bytes, live);
  }
  return saturated;
}

template <class L, class Live, class Base>
static uint32_t update_all(const Block& b, const float* acc, const Buffers& u, const Rule& rule) {
  const uint16_t* random = reinterpret_cast<const uint16_t*>(u.random) + b.lead();
  Block head, tail;
  split_block<L, Live, Base>(b, head, tail);
  const int n = head.count;
  return update_block<L, Live, Base>(head, acc, u.anchor, random, rule) +
         update_block<Scalar, Live, Base>(tail, acc + n, u.anchor + n, random + n, rule);
}

template <class L, class T>
static int widen_block(const uint8_t* from, int count, float* out) {
  int i = 0;
  for (; i + kStep<L> <= count; i += kStep<L>) {
    Weights<L> v;
    T::template load<L>(from + i * T::bytes, v);
    ESFAST_UNROLL
    for (int j = 0; j < L::vectors; ++j)
      L::storef(out + i + j * L::width, T::template widen<L>(v[j]));
  }
  return i;
}

template <class L, class T>
static void widen_all(const uint8_t* from, int count, float* out) {
  const int n = widen_block<L, T>(from, count, out);
  widen_block<Scalar, T>(from + n * T::bytes, count - n, out + n);
}

template <class L, class T>
static typename L::sum64 hash_block(typename L::sum64 sum, uint32_t key, uint32_t index,
                                    const uint8_t* live, int count) {
  uint32_t lanes[L::width];
  for (int j = 0; j < L::width; ++j) lanes[j] = index + static_cast<uint32_t>(j);
  typename L::u32 indices = L::load(lanes);
  for (int i = 0; i + L::width <= count; i += L::width) {
    const auto bits = T::template stored_bits<L>(live + i * T::bytes);
    sum = hash<L>(sum, key, L::spread(indices), L::spread(bits));
    indices = L::add(indices, L::set(L::width));
  }
  return sum;
}

template <class L, class T>
static uint64_t hash_all(uint32_t tensor, const Block& b) {
  const uint32_t key = tensor ^ (static_cast<uint32_t>(b.index >> 32) * kPhiloxW0);
  const uint32_t index = static_cast<uint32_t>(b.index);
  const int n = b.count / L::width * L::width;
  const auto head = hash_block<L, T>(L::zero64(), key, index, b.live, n);
  return L::reduce64(head) + hash_block<Scalar, T>(0, key, index + static_cast<uint32_t>(n),
                                                   b.live + n * T::bytes, b.count - n);
}

}  // namespace esfast::ESFAST_LANES
