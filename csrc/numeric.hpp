// The dtypes of weights: load to fp32, round to nearest even, round stochastically.
//
// In registers a weight is `u32` bits: fp32 and bf16 as the fp32 number that they are (a bf16 has
// zeros below), fp16 as its 16 bits. Weights are loaded, rounded and stored `L::vectors` vectors at
// a time, which is what a target packs best: the roundings may leave anything in the bits that
// `store` drops, and `clean` clears them. A NaN result that stays is always the canonical quiet
// NaN, since targets differ in which operand's payload survives an addition.
#pragma once

#include "target.hpp"

namespace esfast::ESFAST_LANES {

template <class L>
using Weights = typename L::u32[L::vectors];
template <class L>
using Floats = typename L::f32[L::vectors];

// The bits of t, or of the canonical quiet NaN.
template <class L>
ESFAST_FN typename L::u32 canonical(typename L::f32 t) {
  return L::select(L::is_nan(t), L::set(0x7FC00000u), L::as_bits(t));
}

// A bit for each weight handled together.
template <class L>
ESFAST_FN uint32_t all_lanes() {
  return static_cast<uint32_t>((1ull << L::vectors * L::width) - 1);
}

// For dtypes that gain nothing from rounding several vectors at once.
template <class Dtype>
struct VectorByVector {
  template <class L>
  ESFAST_FN void load(const void* p, Weights<L>& v) {
    for (int j = 0; j < L::vectors; ++j)
      v[j] = stored_bits<L>(static_cast<const uint8_t*>(p) + Dtype::bytes * L::width * j);
  }
  template <class L>
  ESFAST_FN void store(void* p, const Weights<L>& v) {
    for (int j = 0; j < L::vectors; ++j) {
      uint8_t* to = static_cast<uint8_t*>(p) + Dtype::bytes * L::width * j;
      if constexpr (Dtype::bytes == 4)
        L::store32(to, v[j]);
      else
        L::store16(to, v[j]);
    }
  }
  template <class L>
  ESFAST_FN typename L::u32 stored_bits(const void* p) {
    if constexpr (Dtype::bytes == 4)
      return L::load32(p);
    else
      return L::load16(p);
  }
  template <class L>
  ESFAST_FN void round(const Floats<L>& t, Weights<L>& v) {
    ESFAST_UNROLL
    for (int j = 0; j < L::vectors; ++j) v[j] = Dtype::template nearest<L>(t[j]);
  }
  template <class L>
  ESFAST_FN void round_back(const Floats<L>& t, Weights<L>& v) {
    round<L>(t, v);
  }
  template <class L>
  ESFAST_FN void round_randomly(const Floats<L>& t, const Weights<L>& random, Weights<L>& v,
                                uint32_t& saturated) {
    ESFAST_UNROLL
    for (int j = 0; j < L::vectors; ++j)
      v[j] = Dtype::template stochastic<L>(t[j], random[j], saturated);
  }
  template <class L>
  ESFAST_FN typename L::u32 clean(typename L::u32 v) {
    return v;
  }
  // A bit for each weight at `p` that is not the same as in `v`.
  template <class L>
  ESFAST_FN uint32_t differing(const void* p, const Weights<L>& v) {
    Weights<L> old;
    uint32_t same = 0;
    Dtype::template load<L>(p, old);
    ESFAST_UNROLL
    for (int j = 0; j < L::vectors; ++j)
      same |= L::bits_of(L::equal(v[j], old[j])) << (j * L::width);
    return ~same & all_lanes<L>();
  }
};

struct Float32 : VectorByVector<Float32> {
  static constexpr int bytes = 4;

  template <class L>
  ESFAST_FN typename L::f32 widen(typename L::u32 bits) {
    return L::as_float(bits);
  }
  template <class L>
  ESFAST_FN typename L::u32 nearest(typename L::f32 t) {
    return canonical<L>(t);
  }
  template <class L>
  ESFAST_FN typename L::u32 narrow(typename L::f32 t) {
    return L::as_bits(t);
  }
  template <class L>
  ESFAST_FN typename L::u32 stochastic(typename L::f32 t, typename L::u32, uint32_t&) {
    return nearest<L>(t);  // nothing to round
  }
};

struct BFloat16 {
  static constexpr int bytes = 2;

  template <class L>
  ESFAST_FN void load(const void* p, Weights<L>& v) {
    L::load_high(p, v);
  }
  template <class L>
  ESFAST_FN void store(void* p, const Weights<L>& v) {
    L::store_high(p, v);
  }
  template <class L>
  ESFAST_FN typename L::u32 stored_bits(const void* p) {
    return L::load16(p);
  }
  template <class L>
  ESFAST_FN typename L::f32 widen(typename L::u32 bits) {
    return L::as_float(bits);
  }
  // In integers: the bf16 conversion instruction flushes subnormals.
  template <class L>
  ESFAST_FN typename L::u32 nearest(typename L::f32 t) {
    const auto bits = canonical<L>(t);
    const auto tie = L::and_(L::template shr<16>(bits), L::set(1));
    return upper<L>(L::add(L::add(bits, L::set(0x7FFFu)), tie));
  }
  // One comparison finds a NaN in two vectors, so that weights pay half an operation for it.
  template <class L>
  ESFAST_FN void round(const Floats<L>& t, Weights<L>& v) {
    ESFAST_UNROLL
    for (int j = 0; j < L::vectors; ++j) v[j] = L::round_even(L::as_bits(t[j]));
    if (ESFAST_RARE(L::any(L::unordered(t[0], t[L::vectors - 1])))) {
      ESFAST_UNROLL
      for (int j = 0; j < L::vectors; ++j) v[j] = L::round_even(canonical<L>(t[j]));
    }
  }
  // Half up, NaN as it comes: one operation where `round` takes three. A restore may round as it
  // likes, since its perturbation looked what comes of it.
  template <class L>
  ESFAST_FN void round_back(const Floats<L>& t, Weights<L>& v) {
    ESFAST_UNROLL
    for (int j = 0; j < L::vectors; ++j) v[j] = L::add(L::as_bits(t[j]), L::set(0x8000u));
  }
  template <class L>
  ESFAST_FN typename L::u32 clean(typename L::u32 v) {
    return upper<L>(v);
  }
  template <class L>
  ESFAST_FN uint32_t differing(const void* p, const Weights<L>& v) {
    return L::differing_high(p, v);
  }
  // As nearest, but a NaN keeps what fits of its payload: a master's copy of a bf16 NaN goes back.
  template <class L>
  ESFAST_FN typename L::u32 narrow(typename L::f32 t) {
    return L::select(L::is_nan(t), upper<L>(L::as_bits(t)), nearest<L>(t));
  }
  // `random`: 16 bits, added below the kept mantissa, then truncated. Only a magnitude of the last
  // finite bf16 or more can overflow, be infinite or NaN: weights take the short path, and the OR
  // of two of them tells, at worst too often.
  template <class L>
  ESFAST_FN void round_randomly(const Floats<L>& t, const Weights<L>& random, Weights<L>& v,
                                uint32_t& saturated) {
    ESFAST_UNROLL
    for (int j = 0; j < L::vectors; ++j) v[j] = L::add(L::as_bits(t[j]), random[j]);
    const auto either = L::or_(L::as_bits(t[0]), L::as_bits(t[L::vectors - 1]));
    const auto special = L::greater(L::and_(either, L::set(0x7FFFFFFFu)), L::set(0x7F7EFFFFu));
    if (ESFAST_RARE(L::any(special))) {
      ESFAST_UNROLL
      for (int j = 0; j < L::vectors; ++j) v[j] = at_the_edge<L>(t[j], upper<L>(v[j]), saturated);
    }
  }
  template <class L>
  ESFAST_FN typename L::u32 stochastic(typename L::f32 t, typename L::u32 random,
                                       uint32_t& saturated) {
    const auto bits = L::as_bits(t), magnitude = L::and_(bits, L::set(0x7FFFFFFFu));
    const auto rounded = upper<L>(L::add(bits, random));
    const auto special = L::greater(magnitude, L::set(0x7F7EFFFFu));
    return L::any(special) ? at_the_edge<L>(t, rounded, saturated) : rounded;
  }

 private:
  template <class L>
  ESFAST_FN typename L::u32 upper(typename L::u32 bits) {
    return L::and_(bits, L::set(0xFFFF0000u));
  }
  template <class L>
  ESFAST_FN typename L::u32 at_the_edge(typename L::f32 t, typename L::u32 rounded,
                                        uint32_t& saturated) {
    const auto sign = L::and_(L::as_bits(t), L::set(0x80000000u));
    const auto magnitude = L::and_(L::as_bits(t), L::set(0x7FFFFFFFu));
    const auto finite = L::greater(L::set(0x7F800000u), magnitude);
    const auto beyond = L::greater(L::and_(rounded, L::set(0x7FFFFFFFu)), L::set(0x7F7F0000u));
    const auto over = L::both(finite, beyond);
    saturated += L::count(over);
    const auto bounded = L::select(over, L::or_(sign, L::set(0x7F7F0000u)), rounded);
    return L::select(finite, bounded, upper<L>(canonical<L>(t)));
  }
};

struct Float16 : VectorByVector<Float16> {
  static constexpr int bytes = 2;

  template <class L>
  ESFAST_FN typename L::f32 widen(typename L::u32 bits) {
    return L::from_half(bits);
  }
  template <class L>
  ESFAST_FN typename L::u32 nearest(typename L::f32 t) {
    return L::to_half(L::as_float(canonical<L>(t)));
  }
  template <class L>
  ESFAST_FN typename L::u32 narrow(typename L::f32 t) {  // as BFloat16::narrow
    const auto bits = L::as_bits(t);
    const auto sign = L::and_(L::template shr<16>(bits), L::set(0x8000u));
    const auto payload = L::and_(L::template shr<13>(bits), L::set(0x03FFu));
    const auto nan = L::or_(L::or_(sign, payload), L::set(0x7C00u));
    return L::select(L::is_nan(t), nan, nearest<L>(t));
  }
  // Of the 16 random bits a normal result uses the upper 13, the width of what is dropped. Below
  // 2^-14 the result counts units of 2^-24, so the value in units of 2^-40 takes all 16.
  template <class L>
  ESFAST_FN typename L::u32 stochastic(typename L::f32 t, typename L::u32 random,
                                       uint32_t& saturated) {
    const auto bits = L::as_bits(t), magnitude = L::and_(bits, L::set(0x7FFFFFFFu));
    const auto sign = L::and_(L::template shr<16>(bits), L::set(0x8000u));
    const auto shifted = L::add(magnitude, L::template shr<3>(random));
    const auto normal = L::sub(L::template shr<13>(shifted), L::set(112u << 10));
    const auto is_normal = L::greater(magnitude, L::set(0x387FFFFFu));  // |t| >= 2^-14
    const auto small = L::select(is_normal, L::set(0), magnitude);
    const auto units = L::truncate(L::mulf(L::as_float(small), L::setf(0x1p40f)));
    auto rounded = L::select(is_normal, normal, L::template shr<16>(L::add(units, random)));
    const auto finite = L::greater(L::set(0x7F800000u), magnitude);
    const auto over = L::both(finite, L::greater(rounded, L::set(0x7BFFu)));
    saturated += L::count(over);
    rounded = L::or_(L::select(over, L::set(0x7BFFu), rounded), sign);
    return L::select(finite, rounded, nearest<L>(t));
  }
};

}  // namespace esfast::ESFAST_LANES
