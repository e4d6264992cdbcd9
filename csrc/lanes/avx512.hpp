// Sixteen lanes: AVX-512 F, BW, DQ, VL, VBMI, VBMI2, VNNI and VPOPCNTDQ (Ice Lake, Zen 4 and
// later). See scalar.hpp for what each operation means.
//
// Philox multiplies 32 x 32 -> 64 bits, so the lanes of even and of odd number are multiplied apart
// and the halves of their products put together at once: a shuffle or a masked move each. Words
// held one a 64-bit lane through all ten rounds would need no merging and two moves more; but they
// fill twice as many registers, so that three batches are in flight instead of four: 5 % slower
// words, a 12 % slower Hadamard sum.
#pragma once

#include <immintrin.h>

#include "../target.hpp"

namespace esfast::ESFAST_LANES {

struct Avx512 {
  static constexpr int width = 16;
  static constexpr int vectors = 2;
  static constexpr int batches = 4;
  static constexpr int pairs = 2;
  static constexpr int woven = 3;
  static constexpr int table_bits = 4;
  static constexpr bool byte_tables = true;
  static constexpr bool splits = true;

  using u32 = __m512i;
  using f32 = __m512;
  struct product {
    __m512i even, odd;  // of lanes 0, 2, .. and 1, 3, ..
  };
  using mask = __mmask16;
  using sum64 = __m512i;

  // Lane 4q + r holds counter 4r + q: then two rounds of unpack leave memory order (interleave).
  template <uint32_t m>
  ESFAST_FN product multiply_counters(uint32_t base) {
    constexpr int64_t k = m;
    const int64_t at_base = static_cast<int64_t>(static_cast<uint64_t>(base) * m);
    const __m512i first = _mm512_set1_epi64(at_base);
    return {_mm512_add_epi64(first,
                             _mm512_setr_epi64(0, 8 * k, k, 9 * k, 2 * k, 10 * k, 3 * k, 11 * k)),
            _mm512_add_epi64(first, _mm512_setr_epi64(4 * k, 12 * k, 5 * k, 13 * k, 6 * k, 14 * k,
                                                      7 * k, 15 * k))};
  }
  ESFAST_FN product multiply(u32 a, uint32_t constant) {
    const __m512i c = _mm512_set1_epi64(constant);
    return {_mm512_mul_epu32(a, c), _mm512_mul_epu32(shift_down(a), c)};
  }
  ESFAST_FN u32 low(product p) {
    return _mm512_castps_si512(_mm512_mask_moveldup_ps(ps(p.even), 0xAAAA, ps(p.odd)));
  }
  ESFAST_FN u32 high(product p) {
    return _mm512_castps_si512(_mm512_mask_movehdup_ps(ps(p.odd), 0x5555, ps(p.even)));
  }
  ESFAST_FN u32 crossed_low(product p) {
    return _mm512_castps_si512(_mm512_shuffle_ps(ps(p.even), ps(p.odd), 0x88));
  }
  ESFAST_FN u32 crossed_high(product p) {
    return _mm512_castps_si512(_mm512_shuffle_ps(ps(p.even), ps(p.odd), 0xDD));
  }
  ESFAST_FN void pin(u32& a) { asm volatile("" : "+v"(a)); }
  ESFAST_FN sum64 accumulate(sum64 sum, product p, u32 y, u32 k) {
    const u32 keyed = xor_(y, k);
    const __m512i even = _mm512_xor_si512(p.even, _mm512_slli_epi64(keyed, 32));
    const __m512i upper = _mm512_set1_epi64(static_cast<int64_t>(0xFFFFFFFF00000000ull));
    const __m512i odd = _mm512_ternarylogic_epi64(p.odd, keyed, upper, 0x78);
    return _mm512_add_epi64(sum, _mm512_add_epi64(even, odd));
  }
  ESFAST_FN sum64 zero64() { return _mm512_setzero_si512(); }
  ESFAST_FN uint64_t reduce64(sum64 sum) {  // unsigned: the intrinsic's signed sum overflows
    uint64_t parts[8], total = 0;
    _mm512_storeu_si512(parts, sum);
    for (uint64_t part : parts) total += part;
    return total;
  }

  ESFAST_FN u32 set(uint32_t a) { return _mm512_set1_epi32(static_cast<int>(a)); }
  ESFAST_FN u32 load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  ESFAST_FN void store(uint32_t* p, u32 a) { _mm512_storeu_si512(p, a); }
  ESFAST_FN u32 load16(const void* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  }
  ESFAST_FN void store16(void* p, u32 a) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a));
  }
  ESFAST_FN u32 load32(const void* p) { return _mm512_loadu_si512(p); }
  ESFAST_FN void store32(void* p, u32 a) { _mm512_storeu_si512(p, a); }
  ESFAST_FN void load_high(const void* p, u32 (&v)[2]) {
    const __m512i raw = _mm512_loadu_si512(p), pairs = word_pairs();
    v[0] = _mm512_maskz_permutexvar_epi16(0xAAAAAAAA, pairs, raw);
    v[1] = _mm512_maskz_permutexvar_epi16(0xAAAAAAAA, _mm512_add_epi16(pairs, sixteen()), raw);
  }
  ESFAST_FN void store_high(void* p, const u32 (&v)[2]) {
    _mm512_storeu_si512(p, _mm512_permutex2var_epi16(v[0], odd_words(), v[1]));
  }
  ESFAST_FN uint32_t differing_high(const void* p, const u32 (&v)[2]) {
    const __m512i packed = _mm512_permutex2var_epi16(v[0], odd_words(), v[1]);
    return _mm512_cmpneq_epi16_mask(packed, _mm512_loadu_si512(p));
  }
  ESFAST_FN u32 and_(u32 a, u32 b) { return _mm512_and_si512(a, b); }
  ESFAST_FN u32 or_(u32 a, u32 b) { return _mm512_or_si512(a, b); }
  ESFAST_FN u32 xor_(u32 a, u32 b) { return _mm512_xor_si512(a, b); }
  ESFAST_FN u32 xor3(u32 a, u32 b, u32 c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
  ESFAST_FN u32 add(u32 a, u32 b) { return _mm512_add_epi32(a, b); }
  ESFAST_FN u32 sub(u32 a, u32 b) { return _mm512_sub_epi32(a, b); }
  template <int N>
  ESFAST_FN u32 shl(u32 a) {
    return _mm512_slli_epi32(a, N);
  }
  template <int N>
  ESFAST_FN u32 shr(u32 a) {
    return _mm512_srli_epi32(a, N);
  }
  // a + 0x7FFF + bit 16 in two operations: a dot product adds 255 * 127 + 191 * 2 + the bit to a.
  ESFAST_FN u32 round_even(u32 a) {
    const __m512i bytes = _mm512_ternarylogic_epi32(a, set(0x00010000u), set(0x0000BFFFu), 0xEA);
    return _mm512_dpbusd_epi32(a, bytes, set(0x0001027Fu));
  }
  ESFAST_FN u32 signs(uint32_t bits) {
    return _mm512_maskz_set1_epi32(static_cast<__mmask16>(bits), INT32_MIN);
  }
  ESFAST_FN u32 popcount(u32 a) { return _mm512_popcnt_epi32(a); }
  // sum + the table entries of the eight nibbles of each word (hadamard.hpp).
  ESFAST_FN u32 add_nibbles(u32 sum, u32 word, const uint8_t* tables) {
    const __m512i ones = _mm512_set1_epi8(1), twos = _mm512_set1_epi8(2);
    const __m512i lower = nibbles(word), upper = nibbles(_mm512_srli_epi32(word, 4));
    sum = _mm512_dpbusd_epi32(sum, entries(tables, lower), twos);
    sum = _mm512_dpbusd_epi32(sum, entries(tables + 128, upper), twos);
    __m512i high = _mm512_dpbusd_epi32(set(0), entries(tables + 64, lower), ones);
    high = _mm512_dpbusd_epi32(high, entries(tables + 192, upper), ones);
    return add(sum, _mm512_slli_epi32(high, 9));
  }
  ESFAST_FN mask equal(u32 a, u32 b) { return _mm512_cmpeq_epi32_mask(a, b); }
  ESFAST_FN mask greater(u32 a, u32 b) { return _mm512_cmpgt_epi32_mask(a, b); }
  ESFAST_FN u32 select(mask m, u32 a, u32 b) { return _mm512_mask_blend_epi32(m, b, a); }
  ESFAST_FN mask both(mask a, mask b) { return a & b; }
  ESFAST_FN bool any(mask m) { return m != 0; }
  ESFAST_FN uint32_t count(mask m) { return static_cast<uint32_t>(__builtin_popcount(m)); }
  ESFAST_FN uint32_t bits_of(mask m) { return m; }

  ESFAST_FN f32 as_float(u32 a) { return _mm512_castsi512_ps(a); }
  ESFAST_FN u32 as_bits(f32 f) { return _mm512_castps_si512(f); }
  ESFAST_FN f32 setf(float a) { return _mm512_set1_ps(a); }
  // From memory: the compiler would keep 15 constants in registers and put the words on the stack.
  ESFAST_FN f32 fma_constant(f32 a, f32 b, const float& c) {
    asm("vfmadd213ps %2%{1to16%}, %1, %0" : "+v"(a) : "v"(b), "m"(c));
    return a;
  }
  // Two operations for m, which one instruction normalises to [0.75, 1.5), and three for the
  // exponent, which picks its product from a table of 32: five instead of seven, and only one of
  // them on the two ports that multiply. An update gains 5 %.
  ESFAST_FN void split(f32 f, const float (&exponents)[32], f32& m, f32& exponent) {
    m = subf(_mm512_getmant_ps(f, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero), setf(1.0f));
    const u32 index = shr<23>(add(as_bits(f), set(0x00400000u)));
    exponent = _mm512_permutex2var_ps(loadf(exponents), index, loadf(exponents + 16));
  }
  ESFAST_FN f32 loadf(const float* p) { return _mm512_loadu_ps(p); }
  ESFAST_FN void storef(float* p, f32 a) { _mm512_storeu_ps(p, a); }
  ESFAST_FN f32 from_int(u32 a) { return _mm512_cvtepi32_ps(a); }
  ESFAST_FN u32 truncate(f32 a) { return _mm512_cvttps_epi32(a); }
  ESFAST_FN mask less(f32 a, f32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  ESFAST_FN mask is_nan(f32 a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
  ESFAST_FN mask unordered(f32 a, f32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
  ESFAST_FN f32 addf(f32 a, f32 b) { return _mm512_add_ps(a, b); }
  ESFAST_FN f32 subf(f32 a, f32 b) { return _mm512_sub_ps(a, b); }
  ESFAST_FN f32 mulf(f32 a, f32 b) { return _mm512_mul_ps(a, b); }
  ESFAST_FN f32 fma(f32 a, f32 b, f32 c) { return _mm512_fmadd_ps(a, b, c); }
  ESFAST_FN f32 sqrtf(f32 a) { return _mm512_sqrt_ps(a); }

  ESFAST_FN f32 from_half(u32 h) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(h)); }
  ESFAST_FN u32 to_half(f32 f) {
    return _mm512_cvtepu16_epi32(_mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  ESFAST_FN void interleave(u32 (&z)[4]) {
    const __m512i a = _mm512_unpacklo_epi32(z[0], z[1]), b = _mm512_unpackhi_epi32(z[0], z[1]);
    const __m512i c = _mm512_unpacklo_epi32(z[2], z[3]), d = _mm512_unpackhi_epi32(z[2], z[3]);
    z[0] = _mm512_unpacklo_epi64(a, c);
    z[1] = _mm512_unpackhi_epi64(a, c);
    z[2] = _mm512_unpacklo_epi64(b, d);
    z[3] = _mm512_unpackhi_epi64(b, d);
  }

  // Whole registers of 64 bytes: the caller keeps as much slack at both ends of a record.
  template <int bytes>
  ESFAST_FN uint8_t* compress(uint8_t* to, uint32_t marked, const uint8_t* from) {
    if (bytes == 2) {
      const __m512i old = _mm512_loadu_si512(from);
      _mm512_storeu_si512(to, _mm512_maskz_compress_epi16(marked, old));
      return to + 2 * __builtin_popcount(marked);
    }
    for (int half = 0; half < 2; ++half, from += 64, marked >>= 16) {
      const __mmask16 mask = static_cast<__mmask16>(marked);
      _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(mask, _mm512_loadu_si512(from)));
      to += 4 * __builtin_popcount(mask);
    }
    return to;
  }
  template <int bytes>
  ESFAST_FN const uint8_t* expand(uint8_t* to, uint32_t marked, const uint8_t* from) {
    if (bytes == 2) {
      const __m512i now = _mm512_loadu_si512(to), kept = _mm512_loadu_si512(from);
      _mm512_storeu_si512(to, _mm512_mask_expand_epi16(now, marked, kept));
      return from + 2 * __builtin_popcount(marked);
    }
    for (int half = 0; half < 2; ++half, to += 64, marked >>= 16) {
      const __mmask16 mask = static_cast<__mmask16>(marked);
      const __m512i now = _mm512_loadu_si512(to), kept = _mm512_loadu_si512(from);
      _mm512_storeu_si512(to, _mm512_mask_expand_epi32(now, mask, kept));
      from += 4 * __builtin_popcount(mask);
    }
    return from;
  }

 private:
  // Each byte's low nibble, and above it the byte's place in the word: an index into 64 bytes.
  ESFAST_FN __m512i nibbles(u32 word) {
    return _mm512_ternarylogic_epi32(word, set(0x0F0F0F0Fu), set(0x30201000u), 0xEA);
  }
  ESFAST_FN __m512i entries(const uint8_t* table, __m512i index) {
    return _mm512_permutexvar_epi8(index, _mm512_loadu_si512(table));
  }
  // Words 0, 0, 1, 1, .. 15, 15: each of 16 words into both halves of a lane.
  ESFAST_FN __m512i word_pairs() {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_or_si512(lane, _mm512_slli_epi32(lane, 16));
  }
  ESFAST_FN __m512i sixteen() { return _mm512_set1_epi16(16); }
  // Words 1, 3, .. 63 of two registers: the upper halves of 32 lanes.
  ESFAST_FN __m512i odd_words() {
    const __m512i step = _mm512_slli_epi32(_mm512_and_si512(word_pairs(), set(0xFFFF)), 2);
    return _mm512_add_epi16(_mm512_or_si512(step, _mm512_slli_epi32(step, 16)), set(0x00030001));
  }
  ESFAST_FN __m512 ps(__m512i a) { return _mm512_castsi512_ps(a); }
  ESFAST_FN __m512i shift_down(__m512i a) { return _mm512_castps_si512(_mm512_movehdup_ps(ps(a))); }
};

}  // namespace esfast::ESFAST_LANES
