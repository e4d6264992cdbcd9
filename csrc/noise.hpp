// The noise, version 1 (docs/noise.md): Philox4x32-10 and every distribution over it, one body for
// every lane type. Nothing here is vendor- or target-specific; all of it is exact to the bit.
//
// Philox4x32-10: J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as
// easy as 1, 2, 3", SC'11. Not cryptographic, and not claimed to be.
#pragma once

#include "numeric.hpp"
#include "target.hpp"

namespace esfast::ESFAST_LANES {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

// The ten round keys, and what the first two rounds leave constant when only counter word 0 varies
// over a span: two of the twenty multiplications and four of the xors drop out.
struct Stream {
  uint32_t key0[10], key1[10];
  uint32_t round0_x2;  // counter word 3 ^ key1[0]
  uint32_t round1_x0;  // low(M1 * counter word 2) ^ key0[1]
  uint32_t round1_x2;  // high(M0 * x0 after round 0) ^ key1[1]
  uint32_t round2_x2;  // low(M0 * x0 after round 0) ^ key1[2]
  float coefficient;   // of this stream's member in an update
};

ESFAST_FN Stream make_stream(uint64_t seed, uint32_t block_high, uint32_t tensor, uint32_t purpose) {
  Stream s;
  for (uint32_t r = 0; r < 10; ++r) {
    s.key0[r] = static_cast<uint32_t>(seed) + r * kPhiloxW0;
    s.key1[r] = static_cast<uint32_t>(seed >> 32) + r * kPhiloxW1;
  }
  const uint64_t p1 = static_cast<uint64_t>(tensor) * kPhiloxM1;
  const uint32_t x0 = static_cast<uint32_t>(p1 >> 32) ^ block_high ^ s.key0[0];
  const uint64_t p0 = static_cast<uint64_t>(x0) * kPhiloxM0;
  s.round0_x2 = purpose ^ s.key1[0];
  s.round1_x0 = static_cast<uint32_t>(p1) ^ s.key0[1];
  s.round1_x2 = static_cast<uint32_t>(p0 >> 32) ^ s.key1[1];
  s.round2_x2 = static_cast<uint32_t>(p0) ^ s.key1[2];
  s.coefficient = 0.0f;
  return s;
}

// Four words of each of B * L::width counters from `block` (its low word); B batches interleaved,
// since one batch alone waits for its multiplications: 53 cycles against 30 on Zen 5.
template <class L, int B>
ESFAST_FN void philox(const Stream& s, uint32_t block, typename L::u32 (&words)[B][4]) {
  typename L::wide x0[B], x1[B], x2[B], x3[B];
  ESFAST_UNROLL
  for (int b = 0; b < B; ++b) {
    const auto p0 = L::multiply(L::counters(block + static_cast<uint32_t>(b * L::width)), kPhiloxM0);
    const auto p1 = L::multiply(L::mix(L::high(p0), s.round0_x2), kPhiloxM1);
    const auto q0 = L::multiply(L::mix(L::high(p1), s.round1_x0), kPhiloxM0);
    const auto q1 = L::multiply(L::mix(L::low(p0), s.round1_x2), kPhiloxM1);
    x0[b] = L::mix(L::high(q1), L::low(p1), s.key0[2]);
    x1[b] = L::low(q1);
    x2[b] = L::mix(L::high(q0), s.round2_x2);
    x3[b] = L::low(q0);
  }
  ESFAST_UNROLL
  for (int r = 3; r < 9; ++r) {
    ESFAST_UNROLL
    for (int b = 0; b < B; ++b) {
      const auto p0 = L::multiply(x0[b], kPhiloxM0), p1 = L::multiply(x2[b], kPhiloxM1);
      x0[b] = L::mix(L::high(p1), x1[b], s.key0[r]);
      x2[b] = L::mix(L::high(p0), x3[b], s.key1[r]);
      x1[b] = L::low(p1);
      x3[b] = L::low(p0);
    }
  }
  ESFAST_UNROLL
  for (int b = 0; b < B; ++b) {
    const auto p0 = L::multiply(x0[b], kPhiloxM0), p1 = L::multiply(x2[b], kPhiloxM1);
    const auto key0 = L::set(s.key0[9]), key1 = L::set(s.key1[9]);
    words[b][0] = L::xor_(L::xor_(L::narrow_high(p1), L::narrow(x1[b])), key0);
    words[b][1] = L::narrow_low(p1);
    words[b][2] = L::xor_(L::xor_(L::narrow_high(p0), L::narrow(x3[b])), key1);
    words[b][3] = L::narrow_low(p0);
  }
}

// Horner's scheme, constant term first in the list, a fused multiply-add a step.
template <class L, int N>
ESFAST_FN typename L::f32 horner(typename L::f32 x, const float (&c)[N]) {
  typename L::f32 sum = L::setf(c[N - 1]);
  ESFAST_UNROLL
  for (int i = N - 2; i >= 0; --i) sum = L::fma(sum, x, L::setf(c[i]));
  return sum;
}

// Two normals from two words: Box-Muller with -2 ln u by a degree-8 polynomial on [0.75, 1.5) and
// cosine and sine of a quarter turn, signs from the words. Error 1.2e-5 at most, reach 6.55.
template <class L>
ESFAST_FN void normal_pair(typename L::u32 x0, typename L::u32 x1, typename L::f32& z0,
                           typename L::f32& z1) {
  constexpr float kLog[8] = {-0x1p+1f,         0x1.000056p+0f,  -0x1.554d14p-1f, 0x1.ff7a56p-2f,
                             -0x1.9b7f1ap-2f,  0x1.6416b4p-2f,  -0x1.24a914p-2f, 0x1.179f26p-3f};
  constexpr float kSin[4] = {0x1.921f5cp+0f, -0x1.4ab278p-1f, 0x1.455cf2p-4f, -0x1.1bf944p-8f};
  constexpr float kCos[5] = {0x1.fffffep-1f, -0x1.3bd3a6p+0f, 0x1.03bd06p-2f, -0x1.54f61cp-6f,
                             0x1.c1f086p-11f};
  constexpr float kExponent = -0x1.62e43p-23f;  // -2 ln 2 / 2^23
  const auto top = L::set(0x80000000u);

  const auto f = L::as_bits(L::from_int(L::or_(x0, L::set(1))));
  const auto b = L::and_(f, L::set(0x7FFFFFFFu));
  const auto e = L::and_(L::sub(b, L::set(0x4EC00000u)), L::set(0xFF800000u));
  const auto m = L::fma(L::as_float(L::sub(b, e)), L::setf(0x1p-31f), L::setf(-1.0f));
  const auto t = L::fma(m, horner<L>(m, kLog), L::mulf(L::from_int(e), L::setf(kExponent)));
  const auto r = L::sqrtf(t);
  const auto s = L::mulf(L::from_int(x1), L::setf(0x1p-31f));
  const auto ss = L::mulf(s, s);
  const auto cosine = L::as_bits(L::mulf(r, horner<L>(ss, kCos)));
  z0 = L::as_float(L::xor_(cosine, L::and_(x0, top)));
  z1 = L::mulf(r, L::mulf(s, horner<L>(ss, kSin)));
}

template <class L, int B>
ESFAST_FN void gaussian(const Stream& s, uint32_t block, typename L::f32 (&z)[B][4]) {
  typename L::u32 words[B][4];
  philox<L, B>(s, block, words);
  ESFAST_UNROLL
  for (int b = 0; b < B; ++b) {
    normal_pair<L>(words[b][0], words[b][1], z[b][0], z[b][1]);
    normal_pair<L>(words[b][2], words[b][3], z[b][2], z[b][3]);
  }
}

// Row n of Sylvester's 32 x 32 Hadamard matrix as bits: bit k is the parity of popcount(n & k).
ESFAST_FN uint32_t hadamard_row(uint32_t n) {
  uint32_t row = 0;
  for (uint32_t k = 0; k < 32; ++k) {
    uint32_t parity = n & k;
    parity ^= parity >> 4;
    parity ^= parity >> 2;
    parity ^= parity >> 1;
    row |= (parity & 1u) << k;
  }
  return row;
}

// Binomial(32) noise of one member from the group's word: (32 - 2 popcount(w ^ row)) / sqrt(32).
template <class L>
ESFAST_FN typename L::f32 hadamard(typename L::u32 word, uint32_t row) {
  const auto ones = L::popcount(L::xor_(word, L::set(row)));
  const auto sum = L::sub(L::set(32), L::add(ones, ones));
  return L::mulf(L::from_int(sum), L::setf(0x1.6a09e6p-3f));
}

// Philox2x32-7 of (index, bits) keyed by tensor: a 64-bit hash an element, summed modulo 2^64 by
// the caller. For a fixed index it is a bijection of the bits, so no single change goes unseen.
template <class L>
ESFAST_FN typename L::sum64 hash(typename L::sum64 sum, uint32_t key, typename L::wide index,
                                 typename L::wide bits) {
  constexpr uint32_t kM = 0xD256D193u;
  typename L::wide x = index, y = bits;
  ESFAST_UNROLL
  for (uint32_t r = 0; r < 6; ++r) {
    const auto p = L::multiply(x, kM);
    x = L::mix(L::high(p), y, key + r * kPhiloxW0);
    y = L::low(p);
  }
  return L::accumulate(sum, L::multiply(x, kM), y, key + 6 * kPhiloxW0);
}

}  // namespace esfast::ESFAST_LANES
