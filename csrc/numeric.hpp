// The dtypes of weights: load to fp32, round to nearest even, round stochastically.
//
// A weight travels as `u32` bits (its 16 or 32 bits, zero-extended) and as `f32`. Any NaN result is
// the canonical quiet NaN, since targets differ in which operand's payload survives an addition.
#pragma once

#include "target.hpp"

namespace esfast::ESFAST_LANES {

// Bits of NaN -> the canonical quiet NaN; the rest unchanged.
template <class L>
ESFAST_FN typename L::u32 canonical(typename L::u32 bits) {
  const auto magnitude = L::and_(bits, L::set(0x7FFFFFFFu));
  return L::select(L::greater(magnitude, L::set(0x7F800000u)), L::set(0x7FC00000u), bits);
}

struct Float32 {
  static constexpr int bytes = 4;

  template <class L>
  ESFAST_FN typename L::u32 load(const void* p) {
    return L::load32(p);
  }
  template <class L>
  ESFAST_FN void store(void* p, typename L::u32 bits) {
    L::store32(p, bits);
  }
  template <class L>
  ESFAST_FN typename L::f32 widen(typename L::u32 bits) {
    return L::as_float(bits);
  }
  template <class L>
  ESFAST_FN typename L::u32 nearest(typename L::f32 t) {
    return canonical<L>(L::as_bits(t));
  }
  template <class L>
  ESFAST_FN typename L::u32 stochastic(typename L::f32 t, typename L::u32, uint32_t&) {
    return nearest<L>(t);  // nothing to round
  }
};

struct BFloat16 {
  static constexpr int bytes = 2;

  template <class L>
  ESFAST_FN typename L::u32 load(const void* p) {
    return L::load16(p);
  }
  template <class L>
  ESFAST_FN void store(void* p, typename L::u32 bits) {
    L::store16(p, bits);
  }
  template <class L>
  ESFAST_FN typename L::f32 widen(typename L::u32 bits) {
    return L::as_float(L::template shl<16>(bits));
  }
  // bits + 0x7FFF + (lowest kept bit). Not the bf16 conversion instruction: it flushes subnormals.
  template <class L>
  ESFAST_FN typename L::u32 nearest(typename L::f32 t) {
    const auto bits = canonical<L>(L::as_bits(t));
    const auto tie = L::and_(L::template shr<16>(bits), L::set(1));
    return L::template shr<16>(L::add(L::add(bits, L::set(0x7FFFu)), tie));
  }
  // `random`: 16 bits, added below the kept mantissa, then truncated.
  template <class L>
  ESFAST_FN typename L::u32 stochastic(typename L::f32 t, typename L::u32 random,
                                       uint32_t& saturated) {
    const auto bits = L::as_bits(t), magnitude = L::and_(bits, L::set(0x7FFFFFFFu));
    const auto sign = L::and_(L::template shr<16>(bits), L::set(0x8000u));
    auto rounded = L::template shr<16>(L::add(magnitude, random));
    const auto finite = L::greater(L::set(0x7F800000u), magnitude);
    const auto over = L::both(finite, L::greater(rounded, L::set(0x7F7Fu)));
    saturated += L::count(over);
    rounded = L::or_(L::select(over, L::set(0x7F7Fu), rounded), sign);
    return L::select(finite, rounded, L::template shr<16>(canonical<L>(bits)));
  }
};

struct Float16 {
  static constexpr int bytes = 2;

  template <class L>
  ESFAST_FN typename L::u32 load(const void* p) {
    return L::load16(p);
  }
  template <class L>
  ESFAST_FN void store(void* p, typename L::u32 bits) {
    L::store16(p, bits);
  }
  template <class L>
  ESFAST_FN typename L::f32 widen(typename L::u32 bits) {
    return L::from_half(bits);
  }
  template <class L>
  ESFAST_FN typename L::u32 nearest(typename L::f32 t) {
    return L::to_half(L::as_float(canonical<L>(L::as_bits(t))));
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
