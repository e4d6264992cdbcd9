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

ESFAST_FN Stream make_stream(uint64_t seed, uint32_t block_high, uint32_t tensor,
                             uint32_t purpose) {
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

// Rounds 0 to 2, where only counter word 0 varies.
template <class L, int B>
ESFAST_FN void first_rounds(const Stream& s, uint32_t block, typename L::u32 (&x0)[B],
                            typename L::u32 (&x1)[B], typename L::u32 (&x2)[B],
                            typename L::u32 (&x3)[B]) {
  const auto k0 = L::make_key(s.round0_x2), k1 = L::make_key(s.round1_x0);
  const auto k2 = L::make_key(s.round1_x2), k3 = L::make_key(s.key0[2]);
  const auto k4 = L::make_key(s.round2_x2);
  ESFAST_UNROLL
  for (int b = 0; b < B; ++b) {
    const auto p0 =
        L::template multiply_counters<kPhiloxM0>(block + static_cast<uint32_t>(b * L::width));
    const auto p1 = L::multiply(L::xor_(L::high(p0), k0), kPhiloxM1);
    const auto q0 = L::multiply(L::xor_(L::high(p1), k1), kPhiloxM0);
    const auto q1 = L::multiply(L::xor_(L::low(p0), k2), kPhiloxM1);
    x0[b] = L::xor3(L::high(q1), L::low(p1), k3);
    x1[b] = L::low(q1);
    x2[b] = L::xor_(L::high(q0), k4);
    x3[b] = L::low(q0);
  }
}

// Four words of each of B * L::width counters from `block` (its low word); B batches interleaved,
// since one batch alone waits for its multiplications: 53 cycles against 30 on Zen 5.
template <class L, int B>
ESFAST_FN void philox(const Stream& s, uint32_t block, typename L::u32 (&words)[B][4]) {
  typename L::u32 x0[B], x1[B], x2[B], x3[B];
  first_rounds<L, B>(s, block, x0, x1, x2, x3);
  ESFAST_UNROLL
  for (int r = 3; r < 9; ++r) {
    const auto key0 = L::make_key(s.key0[r]), key1 = L::make_key(s.key1[r]);
    ESFAST_UNROLL
    for (int b = 0; b < B; ++b) {
      const auto p0 = L::multiply(x0[b], kPhiloxM0), p1 = L::multiply(x2[b], kPhiloxM1);
      x0[b] = L::xor3(L::high(p1), x1[b], key0);
      x2[b] = L::xor3(L::high(p0), x3[b], key1);
      x1[b] = L::low(p1);
      x3[b] = L::low(p0);
    }
  }
  const auto key0 = L::make_key(s.key0[9]), key1 = L::make_key(s.key1[9]);
  ESFAST_UNROLL
  for (int b = 0; b < B; ++b) {
    const auto p0 = L::multiply(x0[b], kPhiloxM0), p1 = L::multiply(x2[b], kPhiloxM1);
    words[b][0] = L::xor3(L::high(p1), x1[b], key0);
    words[b][1] = L::low(p1);
    words[b][2] = L::xor3(L::high(p0), x3[b], key1);
    words[b][3] = L::low(p0);
  }
}

// Horner's scheme for P arguments in step, constant term first in the list: each coefficient is
// loaded once for all of them, and P chains of fused multiply-adds hide their latency.
template <class L, int P, int N>
ESFAST_FN void horner(const typename L::f32 (&x)[P], const float (&c)[N],
                      typename L::f32 (&sum)[P]) {
  ESFAST_UNROLL
  for (int p = 0; p < P; ++p) sum[p] = L::setf(c[N - 1]);
  ESFAST_UNROLL
  for (int i = N - 2; i >= 0; --i) {
    const auto coefficient = L::make_constant(c[i]);
    ESFAST_UNROLL
    for (int p = 0; p < P; ++p) sum[p] = L::fma(sum[p], x[p], coefficient);
  }
}

// sqrt(-2 ln u) with u = |int32(word | 1)| / 2^31: a degree-8 polynomial on [0.75, 1.5).
template <class L, int P>
ESFAST_FN void radius(const typename L::u32 (&words)[P], typename L::f32 (&r)[P]) {
  constexpr float kLog[8] = {-0x1p+1f,        0x1.000056p+0f, -0x1.554d14p-1f, 0x1.ff7a56p-2f,
                             -0x1.9b7f1ap-2f, 0x1.6416b4p-2f, -0x1.24a914p-2f, 0x1.179f26p-3f};
  constexpr float kExponent = -0x1.62e43p-23f;  // -2 ln 2 / 2^23
  typename L::f32 m[P], log[P], exponent[P];
  ESFAST_UNROLL
  for (int p = 0; p < P; ++p) {
    const auto f = L::as_bits(L::from_int(L::or_(words[p], L::set(1))));
    const auto b = L::and_(f, L::set(0x7FFFFFFFu));
    const auto e = L::and_(L::sub(b, L::set(0x4EC00000u)), L::set(0xFF800000u));
    m[p] = L::fma(L::as_float(L::sub(b, e)), L::setf(0x1p-31f), L::setf(-1.0f));
    exponent[p] = L::mulf(L::from_int(e), L::setf(kExponent));
  }
  horner<L, P>(m, kLog, log);
  ESFAST_UNROLL
  for (int p = 0; p < P; ++p) r[p] = L::sqrtf(L::fma(m[p], log[p], exponent[p]));
}

// Pairs of normals from pairs of words (Box-Muller): radius from the first, angle within a quarter
// turn from the second, the cosine's sign from the first. Error 1.2e-5 at most, reach 6.55.
template <class L, int P>
ESFAST_FN void normal_pairs(const typename L::u32 (&x0)[P], const typename L::u32 (&x1)[P],
                            typename L::f32 (&z0)[P], typename L::f32 (&z1)[P]) {
  constexpr float kSin[4] = {0x1.921f5cp+0f, -0x1.4ab278p-1f, 0x1.455cf2p-4f, -0x1.1bf944p-8f};
  constexpr float kCos[5] = {0x1.fffffep-1f, -0x1.3bd3a6p+0f, 0x1.03bd06p-2f, -0x1.54f61cp-6f,
                             0x1.c1f086p-11f};
  const auto top = L::set(0x80000000u);
  typename L::f32 r[P], s[P], ss[P], sine[P], cosine[P];
  radius<L, P>(x0, r);
  ESFAST_UNROLL
  for (int p = 0; p < P; ++p) {
    s[p] = L::mulf(L::from_int(x1[p]), L::setf(0x1p-31f));
    ss[p] = L::mulf(s[p], s[p]);
  }
  horner<L, P>(ss, kSin, sine);
  horner<L, P>(ss, kCos, cosine);
  ESFAST_UNROLL
  for (int p = 0; p < P; ++p) {
    const auto unsigned_z0 = L::as_bits(L::mulf(r[p], cosine[p]));
    z0[p] = L::as_float(L::xor_(unsigned_z0, L::and_(x0[p], top)));
    z1[p] = L::mulf(r[p], L::mulf(s[p], sine[p]));
  }
}

// z[b][0..3]: the four normals of each counter of batch b; as many pairs in step as L has registers
// for.
template <class L, int B>
ESFAST_FN void gaussian(const Stream& s, uint32_t block, typename L::f32 (&z)[B][4]) {
  constexpr int P = L::pairs < 2 * B ? L::pairs : 2 * B;
  typename L::u32 words[B][4];
  philox<L, B>(s, block, words);
  ESFAST_UNROLL
  for (int first = 0; first < 2 * B; first += P) {
    typename L::u32 x0[P], x1[P];
    typename L::f32 z0[P], z1[P];
    ESFAST_UNROLL
    for (int p = 0; p < P; ++p) {
      x0[p] = words[(first + p) / 2][(first + p) % 2 * 2];
      x1[p] = words[(first + p) / 2][(first + p) % 2 * 2 + 1];
    }
    normal_pairs<L, P>(x0, x1, z0, z1);
    ESFAST_UNROLL
    for (int p = 0; p < P; ++p) {
      z[(first + p) / 2][(first + p) % 2 * 2] = z0[p];
      z[(first + p) / 2][(first + p) % 2 * 2 + 1] = z1[p];
    }
  }
}

// Philox2x32-7 of (index, bits) keyed by tensor: a 64-bit hash an element, summed modulo 2^64 by
// the caller. For a fixed index it is a bijection of the bits, so no single change goes unseen.
template <class L>
ESFAST_FN typename L::sum64 hash(typename L::sum64 sum, uint32_t key, typename L::u32 index,
                                 typename L::u32 bits) {
  constexpr uint32_t kM = 0xD256D193u;
  typename L::u32 x = index, y = bits;
  ESFAST_UNROLL
  for (uint32_t r = 0; r < 6; ++r) {
    const auto p = L::multiply(x, kM);
    x = L::xor3(L::high(p), y, L::make_key(key + r * kPhiloxW0));
    y = L::low(p);
  }
  return L::accumulate(sum, L::multiply(x, kM), y, L::make_key(key + 6 * kPhiloxW0));
}

}  // namespace esfast::ESFAST_LANES
