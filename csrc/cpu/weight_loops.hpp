// One pass over the weights of a block: vectors where they fit, the scalar lane type for the tail.
#pragma once

#include "blocks.hpp"

namespace esfast::ESFAST_LANES {

template <class L, class Live, class Base>
static void perturb_block(const Block& b, const float* noise, float scale) {
  for (int i = 0; i < b.count; i += kStep<L>) {
    Weights<L> v;
    Floats<L> t;
    Base::template load<L>(b.base + i * Base::bytes, v);
    ESFAST_UNROLL
    for (int j = 0; j < L::vectors; ++j)
      t[j] = perturbed<L, Base>(v[j], L::loadf(noise + i + j * L::width), scale);
    Live::template round<L>(t, v);
    Live::template store<L>(b.live + i * Live::bytes, v);
  }
}

// One group of up to 64: a mask of its exceptions to `mask`, the exceptions themselves to `to`.
template <class L, class T>
ESFAST_FN uint8_t* perturb_group(uint8_t* live, const float* noise, int count, float scale,
                                 uint8_t* mask, uint8_t* to) {
  uint64_t marks = 0;
  for (int i = 0; i < count; i += kStep<L>) {
    uint8_t* at = live + i * T::bytes;
    Weights<L> v, back;
    Floats<L> t, eps;
    T::template load<L>(at, v);
    ESFAST_UNROLL
    for (int j = 0; j < L::vectors; ++j) {
      eps[j] = L::loadf(noise + i + j * L::width);
      t[j] = perturbed<L, T>(v[j], eps[j], scale);
    }
    T::template round<L>(t, v);
    ESFAST_UNROLL
    for (int j = 0; j < L::vectors; ++j)
      t[j] = perturbed<L, T>(T::template clean<L>(v[j]), eps[j], -scale);
    T::template round_back<L>(t, back);
    const uint32_t mark = T::template differing<L>(at, back);
    to = L::template compress<T::bytes>(to, mark, at);
    T::template store<L>(at, v);
    marks |= static_cast<uint64_t>(mark) << i;
  }
  memcpy(mask, &marks, 8);
  return to;
}

template <class L, class T>
ESFAST_FN const uint8_t* restore_group(uint8_t* live, const float* noise, int count, float scale,
                                       const uint8_t* mask, const uint8_t* from) {
  uint64_t marks;
  memcpy(&marks, mask, 8);
  for (int i = 0; i < count; i += kStep<L>) {
    uint8_t* at = live + i * T::bytes;
    Weights<L> v;
    Floats<L> t;
    T::template load<L>(at, v);
    ESFAST_UNROLL
    for (int j = 0; j < L::vectors; ++j)
      t[j] = perturbed<L, T>(v[j], L::loadf(noise + i + j * L::width), -scale);
    T::template round_back<L>(t, v);
    T::template store<L>(at, v);
    from =
        L::template expand<T::bytes>(at, static_cast<uint32_t>(marks >> i) & all_lanes<L>(), from);
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

// A block's record: the masks of its groups, then their exceptions. With the masks apart, a restore
// knows where the next one lies without counting the marks of the one before.
template <class L, class T>
static uint8_t* perturb_recorded(const Block& b, const float* noise, float scale, uint8_t* mask) {
  const int count = b.count;
  uint8_t *to = mask + (count + 63) / 64 * 8, *live = b.live;
  int i = 0;
  for (; i + 64 <= count; i += 64, mask += 8)
    to = perturb_group<L, T>(live + i * T::bytes, noise + i, 64, scale, mask, to);
  if (i < count)
    to = perturb_group<Scalar, T>(live + i * T::bytes, noise + i, count - i, scale, mask, to);
  return to;
}

template <class L, class T>
static const uint8_t* restore_recorded(const Block& b, const float* noise, float scale,
                                       const uint8_t* mask) {
  const int count = b.count;
  const uint8_t* from = mask + (count + 63) / 64 * 8;
  uint8_t* live = b.live;
  int i = 0;
  for (; i + 64 <= count; i += 64, mask += 8)
    from = restore_group<L, T>(live + i * T::bytes, noise + i, 64, scale, mask, from);
  if (i < count)
    from = restore_group<Scalar, T>(live + i * T::bytes, noise + i, count - i, scale, mask, from);
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

template <class L, class Live, class Base, bool decays, bool stochastic>
static uint32_t update_block(const Block& b, const float* acc, const float* anchor,
                             const uint16_t* random, const Rule& rule) {
  uint32_t saturated = 0;
  const bool mirrored = b.base != b.live;
  for (int i = 0; i < b.count; i += kStep<L>) {
    Weights<L> v, bits;
    Floats<L> t;
    Base::template load<L>(b.base + i * Base::bytes, v);
    ESFAST_UNROLL
    for (int j = 0; j < L::vectors; ++j) {
      const int at = i + j * L::width;
      t[j] = L::addf(Base::template widen<L>(v[j]), L::loadf(acc + at));
      if (decays) t[j] = decayed<L>(t[j], L::loadf(anchor + at), rule);
      if (stochastic) bits[j] = L::load16(random + at);
    }
    if (stochastic)
      Base::template round_randomly<L>(t, bits, v, saturated);
    else
      Base::template round<L>(t, v);
    Base::template store<L>(b.base + i * Base::bytes, v);
    if (!mirrored) continue;
    if (Live::bytes != Base::bytes) Live::template round<L>(t, v);
    Live::template store<L>(b.live + i * Live::bytes, v);
  }
  return saturated;
}

template <class L, class Live, class Base>
static uint32_t update_part(const Block& b, const float* acc, const float* anchor,
                            const uint16_t* random, const Rule& rule) {
  constexpr bool drawn = Base::bytes < 4;  // fp32 has nothing to round
  const bool decays = rule.decay != Decay::none;
  if (drawn && rule.stochastic)
    return decays ? update_block<L, Live, Base, true, drawn>(b, acc, anchor, random, rule)
                  : update_block<L, Live, Base, false, drawn>(b, acc, anchor, random, rule);
  return decays ? update_block<L, Live, Base, true, false>(b, acc, anchor, random, rule)
                : update_block<L, Live, Base, false, false>(b, acc, anchor, random, rule);
}

template <class L, class Live, class Base>
static uint32_t update_all(const Block& b, const float* acc, const Buffers& u, const Rule& rule) {
  const uint16_t* random = reinterpret_cast<const uint16_t*>(u.random) + b.lead();
  Block head, tail;
  split_block<L, Live, Base>(b, head, tail);
  const int n = head.count;
  return update_part<L, Live, Base>(head, acc, u.anchor, random, rule) +
         update_part<Scalar, Live, Base>(tail, acc + n, u.anchor + n, random + n, rule);
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
    sum = hash<L>(sum, key, indices, bits);
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
