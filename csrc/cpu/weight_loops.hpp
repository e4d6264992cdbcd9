// One pass over the weights of a block: vectors where they fit, the scalar lane type for the tail.
#pragma once

#include "blocks.hpp"

namespace esfast::ESFAST_LANES {

template <class L, class Live, class Base>
static void perturb_block(const Block& b, const float* noise, float scale) {
  for (int i = 0; i < b.count; i += kStep<L>) {
    Weights<L> base, live;
    Base::template load<L>(b.base + i * Base::bytes, base);
    ESFAST_UNROLL
    for (int j = 0; j < L::vectors; ++j)
      live[j] = Live::template to_store<L>(
          perturbed<L, Base>(base[j], L::loadf(noise + i + j * L::width), scale));
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
      now[j] = T::template nearest<L>(perturbed<L, T>(old[j], eps, scale));
      const auto back = T::template nearest<L>(perturbed<L, T>(now[j], eps, -scale));
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
      v[j] = T::template to_store<L>(
          perturbed<L, T>(v[j], L::loadf(noise + i + j * L::width), -scale));
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
      live[j] = Live::template to_store<L>(Base::template widen<L>(v[j]));
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
