// The noise, version 1 (docs/noise.md): Philox4x32-10 and every distribution over it, one body for
// every lane type. Nothing here is vendor- or target-specific; all of it is exact to the bit.
//
// Philox4x32-10: J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as
// easy as 1, 2, 3", SC'11. Not cryptographic, and not claimed to be.
#pragma once

#include "numeric.hpp"
#include "steps.hpp"
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

// The keys alone: what a member's streams have in common.
ESFAST_FN Stream keys_of(uint64_t seed) {
  Stream s{};
  for (uint32_t r = 0; r < 10; ++r) {
    s.key0[r] = static_cast<uint32_t>(seed) + r * kPhiloxW0;
    s.key1[r] = static_cast<uint32_t>(seed >> 32) + r * kPhiloxW1;
  }
  return s;
}

// The rest, for the blocks of one tensor and high counter word.
ESFAST_FN Stream place_stream(Stream s, uint32_t block_high, uint32_t tensor, uint32_t purpose) {
  const uint64_t p1 = static_cast<uint64_t>(tensor) * kPhiloxM1;
  const uint32_t x0 = static_cast<uint32_t>(p1 >> 32) ^ block_high ^ s.key0[0];
  const uint64_t p0 = static_cast<uint64_t>(x0) * kPhiloxM0;
  s.round0_x2 = purpose ^ s.key1[0];
  s.round1_x0 = static_cast<uint32_t>(p1) ^ s.key0[1];
  s.round1_x2 = static_cast<uint32_t>(p0 >> 32) ^ s.key1[1];
  s.round2_x2 = static_cast<uint32_t>(p0) ^ s.key1[2];
  return s;
}

ESFAST_FN Stream make_stream(uint64_t seed, uint32_t block_high, uint32_t tensor,
                             uint32_t purpose) {
  return place_stream(keys_of(seed), block_high, tensor, purpose);
}

// Rounds 0 to 2 of one batch of counters, where only counter word 0 varies.
//
// The lanes of the state `x` are in counter order after every odd round and crossed after every
// even one: to put halves of the products of even and of odd lanes together takes x86 one operation
// where their order may change (crossed_*, which undo themselves when done twice) and two where it
// may not. The low halves, which skip a round, stay in place; only the last round's are crossed, so
// that all four words agree.
template <class L>
ESFAST_FN void first_rounds(const Stream& s, uint32_t block, typename L::u32 (&x)[4]) {
  const auto k0 = L::set(s.round0_x2), k1 = L::set(s.round1_x0);
  const auto k2 = L::set(s.round1_x2), k3 = L::set(s.key0[2]);
  const auto k4 = L::set(s.round2_x2);
  const auto p0 = L::template multiply_counters<kPhiloxM0>(block);
  const auto p1 = L::multiply(L::xor_(L::crossed_high(p0), k0), kPhiloxM1);
  const auto q0 = L::multiply(L::xor_(L::crossed_high(p1), k1), kPhiloxM0);
  const auto q1 = L::multiply(L::xor_(L::low(p0), k2), kPhiloxM1);
  x[0] = L::xor3(L::crossed_high(q1), L::low(p1), k3);
  x[1] = L::low(q1);
  x[2] = L::xor_(L::crossed_high(q0), k4);
  x[3] = L::low(q0);
}

template <class L, int round>
ESFAST_FN void next_round(const Stream& s, typename L::u32 (&x)[4]) {
  const auto p0 = L::multiply(x[0], kPhiloxM0), p1 = L::multiply(x[2], kPhiloxM1);
  x[0] = L::xor3(L::crossed_high(p1), x[1], L::set(s.key0[round]));
  x[2] = L::xor3(L::crossed_high(p0), x[3], L::set(s.key1[round]));
  x[1] = round < 9 ? L::low(p1) : L::crossed_low(p1);
  x[3] = round < 9 ? L::low(p0) : L::crossed_low(p0);
  ESFAST_UNROLL
  for (int j = 0; j < 4; ++j) L::pin(x[j]);
}

// Philox of B batches from `block` (counter word 0 of the first), round by round.
template <class L, int B>
struct PhiloxJob {
  static constexpr int steps = 8 * B;
  const Stream& stream;
  uint32_t block;
  typename L::u32 (&words)[B][4];

  template <int step>
  ESFAST_METHOD void run() {
    constexpr int b = step % B, round = 2 + step / B;
    if constexpr (round == 2)
      first_rounds<L>(stream, block + static_cast<uint32_t>(b * L::width), words[b]);
    else
      next_round<L, round>(stream, words[b]);
  }
};

// Four words of each of B * L::width counters; B batches interleaved, since one batch alone waits
// for its multiplications: 53 cycles against 30 on Zen 5.
template <class L, int B>
ESFAST_FN void philox(const Stream& s, uint32_t block, typename L::u32 (&words)[B][4]) {
  PhiloxJob<L, B> job{s, block, words};
  run_steps(job);
}

// Polynomials, constant term first.
struct Log {
  static constexpr float of[8] = {-0x1p+1f,        0x1.000056p+0f, -0x1.554d14p-1f, 0x1.ff7a56p-2f,
                                  -0x1.9b7f1ap-2f, 0x1.6416b4p-2f, -0x1.24a914p-2f, 0x1.179f26p-3f};
};
struct Sine {
  static constexpr float of[4] = {0x1.921f5cp+0f, -0x1.4ab278p-1f, 0x1.455cf2p-4f, -0x1.1bf944p-8f};
};
struct Cosine {
  static constexpr float of[5] = {0x1.fffffep-1f, -0x1.3bd3a6p+0f, 0x1.03bd06p-2f, -0x1.54f61cp-6f,
                                  0x1.c1f086p-11f};
};
constexpr float kExponent = -0x1.62e43p-23f;  // -2 ln 2 / 2^23

// Pairs of normals in the making (Box-Muller), P in step so that P chains hide their latency:
// radius from a pair's first word, angle within a quarter turn from its second, the cosine's sign
// from the first. Error 1.2e-5 at most, reach 6.55.
template <class L, int P>
struct Pairs {
  typename L::u32 x0[P], x1[P];
  typename L::f32 m[P], log[P], exponent[P], r[P], s[P], ss[P], sine[P], cosine[P];
};

template <class Polynomial>
constexpr int kDegree = static_cast<int>(sizeof(Polynomial::of) / sizeof(float)) - 1;
template <class Polynomial, int power>
constexpr float kCoefficient = Polynomial::of[power];  // device code sees no arrays of constants

// Step i of Horner's scheme.
template <class L, class Polynomial, int i, int P>
ESFAST_FN void horner_step(const typename L::f32 (&x)[P], typename L::f32 (&sum)[P]) {
  constexpr int last = kDegree<Polynomial>;
  ESFAST_UNROLL
  for (int p = 0; p < P; ++p)
    sum[p] = L::fma_constant(i == 0 ? L::setf(kCoefficient<Polynomial, last>) : sum[p], x[p],
                             kCoefficient<Polynomial, last - 1 - i>);
}

// float(e) * kExponent for the 32 e there are: e / 2^23 = k at place k + 158 modulo 32.
struct Exponents {
  alignas(64) float of[32];
};
constexpr Exponents make_exponents() {
  Exponents t{};
  for (int k = -31; k <= 0; ++k)
    t.of[(k + 158) % 32] = static_cast<float>(k * (1 << 23)) * kExponent;
  return t;
}
static constexpr Exponents kExponents = make_exponents();

// |f| = 2^31 (1 + m) 2^k with m in [-0.25, 0.5): m, and -2 ln 2 k.
template <class L>
ESFAST_FN void split(typename L::f32 f, typename L::f32& m, typename L::f32& exponent) {
  if constexpr (L::splits) {
    L::split(f, kExponents.of, m, exponent);
  } else {
    const auto b = L::and_(L::as_bits(f), L::set(0x7FFFFFFFu));
    const auto e = L::and_(L::sub(b, L::set(0x4EC00000u)), L::set(0xFF800000u));
    m = L::fma(L::as_float(L::sub(b, e)), L::setf(0x1p-31f), L::setf(-1.0f));
    exponent = L::mulf(L::from_int(e), L::setf(kExponent));
  }
}

// sqrt(-2 ln u), u = |int32(x0 | 1)| / 2^31, by a polynomial of degree 8 on [0.75, 1.5).
template <class L, int step, int P>
ESFAST_FN void radius_step(Pairs<L, P>& q) {
  if constexpr (step > 0 && step < 8) horner_step<L, Log, step - 1>(q.m, q.log);
  ESFAST_UNROLL
  for (int p = 0; p < P; ++p) {
    if (step == 0) split<L>(L::from_int(L::or_(q.x0[p], L::set(1))), q.m[p], q.exponent[p]);
    if (step == 8) q.r[p] = L::sqrtf(L::fma(q.m[p], q.log[p], q.exponent[p]));
  }
}

// s, the angle in quarter turns, and its sine over s and its cosine from s * s.
template <class L, int step, int P>
ESFAST_FN void angle_step(Pairs<L, P>& q) {
  if constexpr (step > 0) horner_step<L, Cosine, step - 1>(q.ss, q.cosine);
  if constexpr (step > 0 && step < 4) horner_step<L, Sine, step - 1>(q.ss, q.sine);
  ESFAST_UNROLL
  for (int p = 0; p < P; ++p) {
    if (step == 0) {
      q.s[p] = L::mulf(L::from_int(q.x1[p]), L::setf(0x1p-31f));
      q.ss[p] = L::mulf(q.s[p], q.s[p]);
    }
    if (step == 4) q.s[p] = L::mulf(q.s[p], q.sine[p]);
  }
}

// The normals of B batches' words, as many pairs in step as L has registers for.
template <class L, int B>
struct NormalsJob {
  static constexpr int P = L::pairs < 2 * B ? L::pairs : 2 * B;
  static constexpr int steps_a_group = 15, steps = 2 * B / P * steps_a_group;
  static_assert(2 * B % P == 0, "every pair belongs to a group");
  const typename L::u32 (&words)[B][4];
  typename L::f32 (&z)[B][4];
  Pairs<L, P> q;

  ESFAST_METHOD NormalsJob(const typename L::u32 (&from)[B][4], typename L::f32 (&to)[B][4])
      : words(from), z(to) {}

  template <int step>
  ESFAST_METHOD void run() {
    constexpr int first = step / steps_a_group * P, own = step % steps_a_group;
    if constexpr (own == 0) begin(first);
    if constexpr (own < 9)
      radius_step<L, own>(q);
    else if constexpr (own < 14)
      angle_step<L, own - 9>(q);
    else
      finish(first);
  }

 private:
  ESFAST_METHOD void begin(int first) {
    ESFAST_UNROLL
    for (int p = 0; p < P; ++p) {
      q.x0[p] = words[(first + p) / 2][(first + p) % 2 * 2];
      q.x1[p] = words[(first + p) / 2][(first + p) % 2 * 2 + 1];
    }
  }
  ESFAST_METHOD void finish(int first) {
    ESFAST_UNROLL
    for (int p = 0; p < P; ++p) {
      const int b = (first + p) / 2, j = (first + p) % 2 * 2;
      const auto unsigned_z0 = L::as_bits(L::mulf(q.r[p], q.cosine[p]));
      z[b][j] = L::as_float(L::xor_(unsigned_z0, L::and_(q.x0[p], L::set(0x80000000u))));
      z[b][j + 1] = L::mulf(q.r[p], q.s[p]);
    }
  }
};

template <class L, int B>
ESFAST_FN void normals(const typename L::u32 (&words)[B][4], typename L::f32 (&z)[B][4]) {
  NormalsJob<L, B> job(words, z);
  run_steps(job);
}

// z[b][0..3]: the four normals of each counter of batch b.
template <class L, int B>
ESFAST_FN void gaussian(const Stream& s, uint32_t block, typename L::f32 (&z)[B][4]) {
  typename L::u32 words[B][4];
  philox<L, B>(s, block, words);
  normals<L, B>(words, z);
}

// The normals of `words`, woven with the Philox of the words after them, which replace these.
template <class L, int B>
ESFAST_FN void gaussian_woven(const Stream& next, uint32_t block, typename L::u32 (&words)[B][4],
                              typename L::f32 (&z)[B][4]) {
  typename L::u32 after[B][4];
  PhiloxJob<L, B> philox{next, block, after};
  NormalsJob<L, B> normals(words, z);
  weave(philox, normals);
  ESFAST_UNROLL
  for (int k = 0; k < 4 * B; ++k) words[k / 4][k % 4] = after[k / 4][k % 4];
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
    x = L::xor3(L::high(p), y, L::set(key + r * kPhiloxW0));
    y = L::low(p);
  }
  return L::accumulate(sum, L::multiply(x, kM), y, L::set(key + 6 * kPhiloxW0));
}

}  // namespace esfast::ESFAST_LANES
