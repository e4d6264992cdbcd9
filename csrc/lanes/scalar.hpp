// One lane: the reference target, the tail of every other target, and what a CUDA thread uses.
//
// A lane type gives `width` 32-bit lanes, in which lane j of a batch of counters holds counter
// `base + counter_of(j)`, and about forty operations named alike on every target:
//   u32, f32      vectors of 32-bit words and of fp32;  mask: a truth value a lane
//   product       the 64-bit products of a vector and a constant; low(), high() split it
//   interleave    four vectors z0..z3 in counter order -> 4 * width elements in memory order
//   lookup        32-bit entries of a table of 1 << table_bits, indexed by the low bits of a lane
#pragma once

#include <cstring>

#include "../target.hpp"

namespace esfast::ESFAST_LANES {

struct Scalar {
  static constexpr int width = 1;
  static constexpr int vectors = 1;  // of weights loaded, rounded and stored together
  static constexpr int batches = 1;  // of counters in flight: one alone waits for its multiplies
  static constexpr int pairs = 1;    // of normals computed in step
  static constexpr int woven = 0;    // batches whose Philox is woven with other normals; 0: none
  static constexpr int table_bits = 8;
  static constexpr bool byte_tables = false;
  static constexpr bool splits = false;  // a float in fewer operations than noise.hpp does

  using u32 = uint32_t;
  using f32 = float;
  using product = uint64_t;
  using mask = bool;
  using sum64 = uint64_t;

  // Philox words.
  // m times the counters from `base`.
  template <uint32_t m>
  ESFAST_FN product multiply_counters(uint32_t base) {
    return static_cast<uint64_t>(base) * m;
  }
  ESFAST_FN product multiply(u32 a, uint32_t constant) {
    return static_cast<uint64_t>(a) * constant;
  }
  ESFAST_FN u32 low(product p) { return static_cast<uint32_t>(p); }
  ESFAST_FN u32 high(product p) { return static_cast<uint32_t>(p >> 32); }
  // As low and high, but of lanes 4q + 0, 2, 1, 3 where that is cheaper; twice gives lane order.
  ESFAST_FN u32 crossed_low(product p) { return low(p); }
  ESFAST_FN u32 crossed_high(product p) { return high(p); }
  ESFAST_FN void pin(u32&) {}  // keeps the compiler from moving what makes it past other pins
  ESFAST_FN sum64 accumulate(sum64 sum, product p, u32 y, u32 k) {
    return sum + (p ^ (static_cast<uint64_t>(y ^ k) << 32));
  }
  ESFAST_FN sum64 zero64() { return 0; }
  ESFAST_FN uint64_t reduce64(sum64 sum) { return sum; }

  // Words.
  ESFAST_FN u32 set(uint32_t a) { return a; }
  ESFAST_FN u32 load(const uint32_t* p) { return *p; }
  ESFAST_FN void store(uint32_t* p, u32 a) { *p = a; }
  ESFAST_FN u32 load16(const void* p) {
    uint16_t a;
    memcpy(&a, p, 2);
    return a;
  }
  ESFAST_FN void store16(void* p, u32 a) {
    const uint16_t half = static_cast<uint16_t>(a);
    memcpy(p, &half, 2);
  }
  ESFAST_FN u32 load32(const void* p) {
    uint32_t a;
    memcpy(&a, p, 4);
    return a;
  }
  ESFAST_FN void store32(void* p, u32 a) { memcpy(p, &a, 4); }
  // 16-bit values in the upper halves of the lanes of `vectors` vectors.
  ESFAST_FN void load_high(const void* p, u32 (&v)[1]) { v[0] = load16(p) << 16; }
  ESFAST_FN void store_high(void* p, const u32 (&v)[1]) { store16(p, v[0] >> 16); }
  // A bit for each 16-bit value at `p` that is not the upper half of its lane in `v`.
  ESFAST_FN uint32_t differing_high(const void* p, const u32 (&v)[1]) {
    return load16(p) != v[0] >> 16;
  }
  ESFAST_FN u32 and_(u32 a, u32 b) { return a & b; }
  ESFAST_FN u32 or_(u32 a, u32 b) { return a | b; }
  ESFAST_FN u32 xor_(u32 a, u32 b) { return a ^ b; }
  ESFAST_FN u32 xor3(u32 a, u32 b, u32 c) { return a ^ b ^ c; }
  ESFAST_FN u32 add(u32 a, u32 b) { return a + b; }
  ESFAST_FN u32 sub(u32 a, u32 b) { return a - b; }
  template <int N>
  ESFAST_FN u32 shl(u32 a) {
    return a << N;
  }
  template <int N>
  ESFAST_FN u32 shr(u32 a) {
    return a >> N;
  }
  // a + 0x7FFF + bit 16 of a: its upper half is then a rounded to nearest even.
  ESFAST_FN u32 round_even(u32 a) { return add(add(a, set(0x7FFFu)), and_(shr<16>(a), set(1))); }
  // Bit j of `bits` as the sign bit of lane j.
  ESFAST_FN u32 signs(uint32_t bits) { return bits << 31; }
  ESFAST_FN u32 popcount(u32 a) {
#if defined(__CUDA_ARCH__)
    return __popc(a);
#else
    return static_cast<uint32_t>(__builtin_popcount(a));
#endif
  }
  ESFAST_FN u32 lookup(const int32_t* table, u32 index) {
    return static_cast<uint32_t>(table[index & 255u]);
  }
  ESFAST_FN mask equal(u32 a, u32 b) { return a == b; }
  ESFAST_FN mask greater(u32 a, u32 b) {  // as int32
    return static_cast<int32_t>(a) > static_cast<int32_t>(b);
  }
  ESFAST_FN u32 select(mask m, u32 a, u32 b) { return m ? a : b; }
  ESFAST_FN mask both(mask a, mask b) { return a && b; }
  ESFAST_FN bool any(mask m) { return m; }
  ESFAST_FN uint32_t count(mask m) { return m ? 1u : 0u; }
  ESFAST_FN uint32_t bits_of(mask m) { return m ? 1u : 0u; }

  // fp32, round to nearest even, never contracted.
  ESFAST_FN f32 as_float(u32 a) {
    f32 f;
    memcpy(&f, &a, 4);
    return f;
  }
  ESFAST_FN u32 as_bits(f32 f) {
    u32 a;
    memcpy(&a, &f, 4);
    return a;
  }
  ESFAST_FN f32 setf(float a) { return a; }
  ESFAST_FN f32 fma_constant(f32 a, f32 b, float c) { return fma(a, b, c); }
  ESFAST_FN f32 loadf(const float* p) { return *p; }
  ESFAST_FN void storef(float* p, f32 a) { *p = a; }
  ESFAST_FN f32 from_int(u32 a) { return static_cast<float>(static_cast<int32_t>(a)); }
  ESFAST_FN u32 truncate(f32 a) { return static_cast<uint32_t>(static_cast<int32_t>(a)); }
  ESFAST_FN mask less(f32 a, f32 b) { return a < b; }
  ESFAST_FN mask is_nan(f32 a) { return a != a; }
  ESFAST_FN mask unordered(f32 a, f32 b) { return a != a || b != b; }
#if defined(__CUDA_ARCH__)
  ESFAST_FN f32 addf(f32 a, f32 b) { return __fadd_rn(a, b); }
  ESFAST_FN f32 subf(f32 a, f32 b) { return __fsub_rn(a, b); }
  ESFAST_FN f32 mulf(f32 a, f32 b) { return __fmul_rn(a, b); }
  ESFAST_FN f32 fma(f32 a, f32 b, f32 c) { return __fmaf_rn(a, b, c); }
  ESFAST_FN f32 sqrtf(f32 a) { return __fsqrt_rn(a); }
#else
  ESFAST_FN f32 addf(f32 a, f32 b) { return a + b; }
  ESFAST_FN f32 subf(f32 a, f32 b) { return a - b; }
  ESFAST_FN f32 mulf(f32 a, f32 b) { return a * b; }
  ESFAST_FN f32 fma(f32 a, f32 b, f32 c) { return __builtin_fmaf(a, b, c); }
  ESFAST_FN f32 sqrtf(f32 a) { return __builtin_sqrtf(a); }
#endif

  // fp16, in integers: no target's flags or conversion instruction is relied on.
  ESFAST_FN f32 from_half(u32 h) {
    const uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7FFFu;
    if (magnitude >= 0x7C00u) return as_float(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13));
    if (magnitude >= 0x0400u) return as_float(sign | ((magnitude << 13) + 0x38000000u));
    return as_float(sign | as_bits(mulf(from_int(magnitude), 0x1p-24f)));
  }
  ESFAST_FN u32 to_half(f32 f) {  // nearest even; NaN is canonical before it comes here
    const uint32_t bits = as_bits(f), sign = (bits >> 16) & 0x8000u, a = bits & 0x7FFFFFFFu;
    if (a > 0x7F800000u) return sign | 0x7E00u;
    if (a >= 0x477FF000u) return sign | 0x7C00u;  // 65520 and above round to infinity
    if (a >= 0x38800000u) return sign | ((a - 0x38000000u + 0xFFFu + ((a >> 13) & 1u)) >> 13);
    // Below 2^-14: adding 0.5 leaves the result, rounded to nearest even, in the low mantissa bits.
    return sign | (as_bits(addf(as_float(a), 0.5f)) - 0x3F000000u);
  }

  ESFAST_FN void interleave(u32 (&)[4]) {}

  // Exceptions of lean memory: the marked ones of the vectors' elements at `from`, packed at `to`.
  template <int bytes>
  ESFAST_FN uint8_t* compress(uint8_t* to, uint32_t marked, const uint8_t* from) {
    if (marked) memcpy(to, from, bytes);
    return to + (marked ? bytes : 0);
  }
  template <int bytes>
  ESFAST_FN const uint8_t* expand(uint8_t* to, uint32_t marked, const uint8_t* from) {
    if (marked) memcpy(to, from, bytes);
    return from + (marked ? bytes : 0);
  }
};

}  // namespace esfast::ESFAST_LANES
