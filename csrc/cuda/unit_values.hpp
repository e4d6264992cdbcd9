// What becomes of a unit of 8 elements in one thread's registers: its noise, and the bodies of
// noise.hpp and kernels.hpp over it. Host-and-device, so that tests run every line of it but the
// square root and bf16's conversion on the CPU.
#pragma once

#include "units.hpp"

namespace esfast::device {

// ---- noise

// A member, or a Hadamard group of an update, as it lies in device memory. Round keys, which are
// five loads for every thread: made of the seed they are 18 additions, 4 % of a Gaussian member.
struct alignas(16) Draw {
  uint32_t keys[10][2];
  uint32_t purpose;
  float coefficient;
};

static inline Draw draw_of(const Source& s) {
  const Stream stream = keys_of(s.seed);
  Draw draw{{}, s.purpose, s.coefficient};
  for (int r = 0; r < 10; ++r) {
    draw.keys[r][0] = stream.key0[r];
    draw.keys[r][1] = stream.key1[r];
  }
  return draw;
}

ESFAST_FN Stream stream_of(const Draw& d, uint32_t tensor, uint32_t high) {
  Stream s{};
  ESFAST_UNROLL
  for (int r = 0; r < 10; ++r) {
    s.key0[r] = d.keys[r][0];
    s.key1[r] = d.keys[r][1];
  }
  return place_stream(s, high, tensor, d.purpose);
}

// Counter word 1 of a span's blocks; mapping.hpp keeps it constant over a span.
ESFAST_FN uint32_t high_word(Noise noise, const Span& s) {
  return static_cast<uint32_t>(s.origin >> (noise == Noise::rademacher ? 39 : 34));
}

ESFAST_FN void words_of(const Stream& s, uint32_t counter, uint32_t (&words)[4]) {
  uint32_t out[1][4];
  philox<Thread, 1>(s, counter, out);
  ESFAST_UNROLL
  for (int i = 0; i < 4; ++i) words[i] = out[0][i];
}

// The 8 signs of a unit, as the low bits of a word: 16 units share a Rademacher counter.
ESFAST_FN uint32_t signs_of(const Stream& s, uint64_t block) {
  uint32_t w[4];
  words_of(s, static_cast<uint32_t>(block >> 4), w);
  const uint32_t which = static_cast<uint32_t>(block >> 2) & 3u;
  const uint32_t low = which & 1u ? w[1] : w[0], high = which & 1u ? w[3] : w[2];
  return (which & 2u ? high : low) >> (8u * (static_cast<uint32_t>(block) & 3u));
}

template <Noise noise>
ESFAST_FN void unit_noise(const Stream& s, uint32_t row, uint64_t block, float (&z)[2][4]) {
  const uint32_t counter = static_cast<uint32_t>(block * 2);
  if (noise == Noise::gaussian) {
    gaussian<Thread, 2>(s, counter, z);
  } else if (noise == Noise::hadamard) {
    uint32_t words[2][4];
    philox<Thread, 2>(s, counter, words);
    ESFAST_UNROLL
    for (int e = 0; e < 8; ++e) z[e / 4][e % 4] = hadamard<Thread>(words[e / 4][e % 4], row);
  } else {
    const uint32_t signs = signs_of(s, block);
    ESFAST_UNROLL
    for (int e = 0; e < 8; ++e)
      z[e / 4][e % 4] = Scalar::as_float(0x3F800000u ^ Scalar::signs(signs >> e));
  }
}

// ---- rounding

// The upper halves of two words, the first one's below.
ESFAST_FN uint32_t upper_halves(uint32_t low, uint32_t high) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(low, high, 0x7632);
#else
  return low >> 16 | (high & 0xFFFF0000u);
#endif
}

template <class T>
ESFAST_FN Raw rounded_singly(const float (&v)[8]) {
  Raw raw{};
  ESFAST_UNROLL
  for (int e = 0; e < 8; ++e) put<T>(raw, e, T::template nearest<Thread>(v[e]));
  return raw;
}

#if defined(__CUDA_ARCH__)
// Whether one of eight is NaN, two a comparison.
__device__ __forceinline__ bool any_nan(const float (&v)[8]) {
  uint32_t found;
  asm("{ .reg .pred p; setp.nan.f32 p, %1, %2; setp.nan.or.f32 p, %3, %4, p;"
      "  setp.nan.or.f32 p, %5, %6, p; setp.nan.or.f32 p, %7, %8, p; selp.u32 %0, 1, 0, p; }"
      : "=r"(found)
      : "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "f"(v[4]), "f"(v[5]), "f"(v[6]), "f"(v[7]));
  return found != 0;
}
#endif

// To nearest. Two weights become bf16 by one instruction, which differs from `nearest` in its NaN
// only (tests/test_gpu.py compares all 2^32); in integers each takes six.
template <class T>
ESFAST_FN Raw rounded(const float (&v)[8]) {
#if defined(__CUDA_ARCH__)
  if constexpr (T::high_half) {
    if (any_nan(v)) return rounded_singly<T>(v);
    Raw raw{};
    ESFAST_UNROLL
    for (int i = 0; i < 4; ++i)
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(raw.w[i]) : "f"(v[2 * i + 1]), "f"(v[2 * i]));
    return raw;
  }
#endif
  return rounded_singly<T>(v);
}

// The 8 fp32 numbers whose bits follow `first`, rounded to bf16: for a test.
ESFAST_FN Raw rounded_from(uint32_t first) {
  float v[8];
  ESFAST_UNROLL
  for (uint32_t e = 0; e < 8; ++e) v[e] = Scalar::as_float(first + e);
  return rounded<BF16>(v);
}

// Two 16-bit numbers a word, added below what is kept. Only a magnitude of the last finite bf16 or
// more can overflow, be infinite or NaN: the OR of all eight tells, at worst too often.
template <class T>
ESFAST_FN Raw rounded_randomly(const float (&v)[8], const uint32_t (&random)[4], int first, int end,
                               uint32_t& saturated) {
  Raw raw{};
  if constexpr (T::high_half) {
    uint32_t any = 0;
    ESFAST_UNROLL
    for (int e = 0; e < 8; ++e) any |= Scalar::as_bits(v[e]);
    if ((any & 0x7FFFFFFFu) <= 0x7F7EFFFFu) {
      ESFAST_UNROLL
      for (int i = 0; i < 4; ++i)
        raw.w[i] = upper_halves(Scalar::as_bits(v[2 * i]) + (random[i] & 0xFFFFu),
                                Scalar::as_bits(v[2 * i + 1]) + (random[i] >> 16));
      return raw;
    }
  }
  ESFAST_UNROLL
  for (int e = 0; e < 8; ++e) {
    uint32_t over = 0;
    const uint32_t bits = random[e / 2] >> (16 * (e % 2)) & 0xFFFFu;
    put<T>(raw, e, T::template stochastic<Thread>(v[e], bits, over));
    saturated += e >= first && e < end ? over : 0u;
  }
  return raw;
}

// ---- perturb, restore

template <class Live, class Base>
ESFAST_FN Raw perturb_unit(const Raw& base, const float (&z)[2][4], float scale) {
  float v[8];
  ESFAST_UNROLL
  for (int e = 0; e < 8; ++e)
    v[e] = perturbed<Thread, Base>(get<Base>(base, e), z[e / 4][e % 4], scale);
  return rounded<Live>(v);
}

// One bit a slot whose weight `now - scale * z` does not give back.
template <class T>
ESFAST_FN uint32_t lost(const Raw& old, const Raw& now, const float (&z)[2][4], float scale) {
  const Raw back = perturb_unit<T, T>(now, z, -scale);
  uint32_t marks = 0;
  ESFAST_UNROLL
  for (int e = 0; e < 8; ++e) {
    const uint32_t other = get<T>(back, e) ^ get<T>(old, e);
    marks |= (other ? 1u : 0u) << e;
  }
  return marks;
}

// ---- copies between the live weights and their base

template <class Live, class Base>
ESFAST_FN Raw narrowed(const Raw& base) {
  if (Live::bytes == Base::bytes) return base;
  Raw live{};
  ESFAST_UNROLL
  for (int e = 0; e < 8; ++e)
    put<Live>(live, e,
              Live::template narrow<Thread>(Base::template widen<Thread>(get<Base>(base, e))));
  return live;
}

template <class Live, class Base>
ESFAST_FN Raw widened(const Raw& live) {
  if (Live::bytes == Base::bytes) return live;
  Raw base{};
  ESFAST_UNROLL
  for (int e = 0; e < 8; ++e)
    put<Base>(base, e, Scalar::as_bits(Live::template widen<Thread>(get<Live>(live, e))));
  return base;
}

// ---- update

// The look-up tables of Hadamard groups: entry v of byte j of a group, `1 << shift` copies side by
// side, of which a lane reads its own, so that 32 copies in shared memory leave no bank conflict.
struct Tables {
  const int32_t* entries;
  int shift;
  uint32_t copy;  // lane & (copies - 1)
  bool lone;      // of one group
};

ESFAST_FN int32_t table_entry(const int32_t* coefficients, int byte, uint32_t value) {
  int32_t sum = 0;
  ESFAST_UNROLL
  for (int k = 0; k < 8; ++k) {
    const int32_t c = coefficients[8 * byte + k];
    sum += value >> k & 1u ? -c : c;
  }
  return sum;
}

ESFAST_FN uint32_t byte_of(uint32_t word, int j) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(word, 0, 0x4440u + static_cast<uint32_t>(j));
#else
  return word >> (8 * j) & 255u;
#endif
}

// A byte, a multiply-add to its address, and a load a look-up.
ESFAST_FN int32_t table_sum(const Tables& t, int group, uint32_t word) {
  const uint32_t step = 4u << t.shift;
  const char* table = reinterpret_cast<const char*>(t.entries) + (group << (t.shift + 12));
  int32_t sum = 0;
  ESFAST_UNROLL
  for (int j = 0; j < 4; ++j) {
    const char* column = table + (static_cast<uint32_t>(j) << (t.shift + 10) | t.copy * 4);
    sum += *reinterpret_cast<const int32_t*>(column + byte_of(word, j) * step);
  }
  return sum;
}

template <class T>
ESFAST_FN void widen_raw(const Raw& raw, float (&out)[8]) {
  ESFAST_UNROLL
  for (int e = 0; e < 8; ++e) out[e] = T::template widen<Thread>(get<T>(raw, e));
}

struct Updated {
  Raw base, live;
  uint32_t saturated;
};

template <class Live, class Base>
ESFAST_FN Updated updated(const Raw& old, const float (&acc)[2][4], const float (&anchor)[8],
                          const uint32_t (&random)[4], const Rule& rule, int first, int end) {
  Updated out{};
  float v[8];
  widen_raw<Base>(old, v);
  ESFAST_UNROLL
  for (int e = 0; e < 8; ++e) v[e] = decayed<Thread>(v[e] + acc[e / 4][e % 4], anchor[e], rule);
  out.base = rule.stochastic ? rounded_randomly<Base>(v, random, first, end, out.saturated)
                             : rounded<Base>(v);
  if (Live::bytes == Base::bytes) {
    out.live = out.base;
  } else {
    widen_raw<Base>(out.base, v);
    out.live = rounded<Live>(v);
  }
  return out;
}

}  // namespace esfast::device
