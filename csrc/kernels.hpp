// What happens to one vector of weights: perturb, restore, update. One body for every lane type.
//
//   perturb   w' = round(fma(eps, scale, w)),  scale = sign * sigma
//   restore   w  = round_back(fma(eps, -scale, w')), except where that is not exact
//   update    t = w + acc; anchored decay pulls t towards the anchor (arXiv 2605.30148); one
//   rounding
// See docs/noise.md for the order of every operation.
#pragma once

#include "hadamard.hpp"
#include "noise.hpp"
#include "segments.hpp"

namespace esfast::ESFAST_LANES {

// What an update does besides adding noise.
struct Rule {
  Decay decay;
  float strength;  // l2: fp32(1 - alpha * lambda); l1: fp32(alpha * lambda)
  bool stochastic;
};

template <class L, class Base>
ESFAST_FN typename L::f32 perturbed(typename L::u32 base, typename L::f32 eps, float scale) {
  return L::fma(eps, L::setf(scale), Base::template widen<L>(base));
}

// acc + eps * c for eps of +1 or -1, given as the sign bits: exact, so it equals the fma.
template <class L>
ESFAST_FN typename L::f32 add_signed(typename L::f32 acc, float c, typename L::u32 signs) {
  return L::addf(acc, L::as_float(L::xor_(L::as_bits(L::setf(c)), signs)));
}

template <class L>
ESFAST_FN typename L::f32 decayed(typename L::f32 t, typename L::f32 anchor, const Rule& rule) {
  if (rule.decay == Decay::none) return t;
  const auto d = L::subf(t, anchor);
  if (rule.decay == Decay::l2) return L::fma(L::setf(rule.strength), d, anchor);
  const auto top = L::set(0x80000000u), bits = L::as_bits(d), zero = L::set(0);
  const auto size = L::as_float(L::and_(bits, L::set(0x7FFFFFFFu)));
  const auto shrunk = L::subf(size, L::setf(rule.strength));
  const auto kept = L::select(L::less(shrunk, L::setf(0.0f)), zero, L::as_bits(shrunk));
  return L::addf(anchor, L::as_float(L::or_(kept, L::and_(bits, top))));
}

}  // namespace esfast::ESFAST_LANES
