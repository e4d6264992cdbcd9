// Eight lanes: AVX2, FMA, F16C and POPCNT (Haswell, Zen 1 and later). See scalar.hpp for the
// operations and avx512.hpp for how Philox multiplies. The lower halves of its products come from a
// multiplication of their own (vpmulld): a shuffle and a blend instead make an update 5 % slower.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "../target.hpp"
#include "marked.hpp"

namespace esfast::ESFAST_LANES {

struct Avx2 {
  static constexpr int width = 8;
  static constexpr int vectors = 2;
  static constexpr int batches = 8;
  static constexpr int pairs = 4;
  static constexpr int woven = 0;
  static constexpr int table_bits = 3;
  static constexpr bool byte_tables = false;
  static constexpr bool splits = false;

  using u32 = __m256i;
  using f32 = __m256;
  struct product {
    __m256i even, odd, low;  // 64-bit ones of lanes 0, 2, .. and 1, 3, ..; lower halves of all
  };
  using mask = __m256i;
  using sum64 = __m256i;

  // Lane 4q + r holds counter 2r + q.
  template <uint32_t m>
  ESFAST_FN product multiply_counters(uint32_t base) {
    constexpr int64_t k = m;
    const int64_t at_base = static_cast<int64_t>(static_cast<uint64_t>(base) * m);
    const __m256i first = _mm256_set1_epi64x(at_base), low = set(base * m);
    return {_mm256_add_epi64(first, _mm256_setr_epi64x(0, 4 * k, k, 5 * k)),
            _mm256_add_epi64(first, _mm256_setr_epi64x(2 * k, 6 * k, 3 * k, 7 * k)),
            add(low, _mm256_mullo_epi32(set(m), _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7)))};
  }
  ESFAST_FN product multiply(u32 a, uint32_t constant) {
    const __m256i c = _mm256_set1_epi64x(constant);
    return {_mm256_mul_epu32(a, c), _mm256_mul_epu32(shift_down(a), c),
            _mm256_mullo_epi32(a, set(constant))};
  }
  ESFAST_FN u32 low(product p) { return p.low; }
  ESFAST_FN u32 high(product p) { return _mm256_blend_epi32(shift_down(p.even), p.odd, 0xAA); }
  ESFAST_FN u32 crossed_low(product p) {
    return _mm256_castps_si256(_mm256_shuffle_ps(ps(p.even), ps(p.odd), 0x88));
  }
  ESFAST_FN u32 crossed_high(product p) {
    return _mm256_castps_si256(_mm256_shuffle_ps(ps(p.even), ps(p.odd), 0xDD));
  }
  ESFAST_FN void pin(u32&) {}
  ESFAST_FN sum64 accumulate(sum64 sum, product p, u32 y, u32 k) {
    const u32 keyed = xor_(y, k);
    const __m256i even = _mm256_xor_si256(p.even, _mm256_slli_epi64(keyed, 32));
    const __m256i odd =
        _mm256_xor_si256(p.odd, _mm256_slli_epi64(_mm256_srli_epi64(keyed, 32), 32));
    return _mm256_add_epi64(sum, _mm256_add_epi64(even, odd));
  }
  ESFAST_FN sum64 zero64() { return _mm256_setzero_si256(); }
  ESFAST_FN uint64_t reduce64(sum64 sum) {
    uint64_t parts[4];
    memcpy(parts, &sum, 32);
    return parts[0] + parts[1] + parts[2] + parts[3];
  }

  ESFAST_FN u32 set(uint32_t a) { return _mm256_set1_epi32(static_cast<int>(a)); }
  ESFAST_FN u32 load(const uint32_t* p) { return load32(p); }
  ESFAST_FN void store(uint32_t* p, u32 a) { store32(p, a); }
  ESFAST_FN u32 load16(const void* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  ESFAST_FN void store16(void* p, u32 a) {
    _mm_storeu_si128(static_cast<__m128i*>(p), low_halves(a));
  }
  ESFAST_FN u32 load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  ESFAST_FN void store32(void* p, u32 a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
  ESFAST_FN void load_high(const void* p, u32 (&v)[2]) {
    v[0] = _mm256_slli_epi32(load16(p), 16);
    v[1] = _mm256_slli_epi32(load16(static_cast<const char*>(p) + 16), 16);
  }
  ESFAST_FN void store_high(void* p, const u32 (&v)[2]) {
    const __m256i packed =
        _mm256_packus_epi32(_mm256_srli_epi32(v[0], 16), _mm256_srli_epi32(v[1], 16));
    store32(p, _mm256_permute4x64_epi64(packed, 0xD8));
  }
  ESFAST_FN uint32_t differing_high(const void* p, const u32 (&v)[2]) {
    const __m256i zero = _mm256_setzero_si256();
    u32 old[2];
    load_high(p, old);
    const uint32_t same0 = bits_of(_mm256_cmpeq_epi32(shr<16>(xor_(old[0], v[0])), zero));
    const uint32_t same1 = bits_of(_mm256_cmpeq_epi32(shr<16>(xor_(old[1], v[1])), zero));
    return ~(same0 | same1 << 8) & 0xFFFFu;
  }
  ESFAST_FN u32 and_(u32 a, u32 b) { return _mm256_and_si256(a, b); }
  ESFAST_FN u32 or_(u32 a, u32 b) { return _mm256_or_si256(a, b); }
  ESFAST_FN u32 xor_(u32 a, u32 b) { return _mm256_xor_si256(a, b); }
  ESFAST_FN u32 xor3(u32 a, u32 b, u32 c) {  // b ^ c first: a comes from a multiplication
    return _mm256_xor_si256(a, _mm256_xor_si256(b, c));
  }
  ESFAST_FN u32 add(u32 a, u32 b) { return _mm256_add_epi32(a, b); }
  ESFAST_FN u32 sub(u32 a, u32 b) { return _mm256_sub_epi32(a, b); }
  template <int N>
  ESFAST_FN u32 shl(u32 a) {
    return _mm256_slli_epi32(a, N);
  }
  template <int N>
  ESFAST_FN u32 shr(u32 a) {
    return _mm256_srli_epi32(a, N);
  }
  ESFAST_FN u32 round_even(u32 a) { return add(add(a, set(0x7FFFu)), and_(shr<16>(a), set(1))); }
  ESFAST_FN u32 signs(uint32_t bits) {
    const __m256i shift = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    return and_(_mm256_sllv_epi32(set(bits), shift), set(0x80000000u));
  }
  ESFAST_FN u32 popcount(u32 a) {
    const __m256i counts =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i bytes = _mm256_add_epi8(
        _mm256_shuffle_epi8(counts, _mm256_and_si256(a, nibble)),
        _mm256_shuffle_epi8(counts, _mm256_and_si256(_mm256_srli_epi32(a, 4), nibble)));
    return _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, _mm256_set1_epi8(1)),
                             _mm256_set1_epi16(1));
  }
  ESFAST_FN u32 lookup(const int32_t* table, u32 index) {
    return _mm256_permutevar8x32_epi32(load32(table), index);
  }
  ESFAST_FN mask equal(u32 a, u32 b) { return _mm256_cmpeq_epi32(a, b); }
  ESFAST_FN mask greater(u32 a, u32 b) { return _mm256_cmpgt_epi32(a, b); }
  ESFAST_FN u32 select(mask m, u32 a, u32 b) { return _mm256_blendv_epi8(b, a, m); }
  ESFAST_FN mask both(mask a, mask b) { return _mm256_and_si256(a, b); }
  ESFAST_FN bool any(mask m) { return !_mm256_testz_si256(m, m); }
  ESFAST_FN uint32_t count(mask m) { return static_cast<uint32_t>(__builtin_popcount(bits_of(m))); }
  ESFAST_FN uint32_t bits_of(mask m) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(m)));
  }

  ESFAST_FN f32 as_float(u32 a) { return _mm256_castsi256_ps(a); }
  ESFAST_FN u32 as_bits(f32 f) { return _mm256_castps_si256(f); }
  ESFAST_FN f32 setf(float a) { return _mm256_set1_ps(a); }
  ESFAST_FN f32 fma_constant(f32 a, f32 b, float c) { return fma(a, b, setf(c)); }
  ESFAST_FN f32 loadf(const float* p) { return _mm256_loadu_ps(p); }
  ESFAST_FN void storef(float* p, f32 a) { _mm256_storeu_ps(p, a); }
  ESFAST_FN f32 from_int(u32 a) { return _mm256_cvtepi32_ps(a); }
  ESFAST_FN u32 truncate(f32 a) { return _mm256_cvttps_epi32(a); }
  ESFAST_FN mask less(f32 a, f32 b) { return as_bits(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  ESFAST_FN mask is_nan(f32 a) { return as_bits(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
  ESFAST_FN mask unordered(f32 a, f32 b) { return as_bits(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)); }
  ESFAST_FN f32 addf(f32 a, f32 b) { return _mm256_add_ps(a, b); }
  ESFAST_FN f32 subf(f32 a, f32 b) { return _mm256_sub_ps(a, b); }
  ESFAST_FN f32 mulf(f32 a, f32 b) { return _mm256_mul_ps(a, b); }
  ESFAST_FN f32 fma(f32 a, f32 b, f32 c) { return _mm256_fmadd_ps(a, b, c); }
  ESFAST_FN f32 sqrtf(f32 a) { return _mm256_sqrt_ps(a); }

  ESFAST_FN f32 from_half(u32 h) { return _mm256_cvtph_ps(low_halves(h)); }
  ESFAST_FN u32 to_half(f32 f) {
    return _mm256_cvtepu16_epi32(_mm256_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  ESFAST_FN void interleave(u32 (&z)[4]) {
    const __m256i a = _mm256_unpacklo_epi32(z[0], z[1]), b = _mm256_unpackhi_epi32(z[0], z[1]);
    const __m256i c = _mm256_unpacklo_epi32(z[2], z[3]), d = _mm256_unpackhi_epi32(z[2], z[3]);
    z[0] = _mm256_unpacklo_epi64(a, c);
    z[1] = _mm256_unpackhi_epi64(a, c);
    z[2] = _mm256_unpacklo_epi64(b, d);
    z[3] = _mm256_unpackhi_epi64(b, d);
  }

  // Whole registers: the caller keeps 64 bytes of slack at both ends of a record.
  template <int bytes>
  ESFAST_FN uint8_t* compress(uint8_t* to, uint32_t marked, const uint8_t* from) {
    for (int half = 0; half < 2; ++half, from += 8 * bytes, marked >>= 8) {
      const uint32_t marks = marked & 0xFF;
      if (bytes == 2)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                         _mm_shuffle_epi8(load128(from), words_at(kMarks.order[marks])));
      else
        store32(to, _mm256_permutevar8x32_epi32(load32(from), places(kMarks.order[marks])));
      to += bytes * __builtin_popcount(marks);
    }
    return to;
  }
  template <int bytes>
  ESFAST_FN const uint8_t* expand(uint8_t* to, uint32_t marked, const uint8_t* from) {
    for (int half = 0; half < 2; ++half, to += 8 * bytes, marked >>= 8) {
      const uint32_t marks = marked & 0xFF;
      if (bytes == 2) {
        const __m128i bit = _mm_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128);
        const __m128i all = _mm_set1_epi16(static_cast<int16_t>(marks));
        const __m128i kept = _mm_shuffle_epi8(load128(from), words_at(kMarks.rank[marks]));
        _mm_storeu_si128(
            reinterpret_cast<__m128i*>(to),
            _mm_blendv_epi8(load128(to), kept, _mm_cmpeq_epi16(_mm_and_si128(all, bit), bit)));
      } else {
        const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        const __m256i chosen = _mm256_cmpeq_epi32(_mm256_and_si256(set(marks), bit), bit);
        const __m256i kept = _mm256_permutevar8x32_epi32(load32(from), places(kMarks.rank[marks]));
        store32(to, _mm256_blendv_epi8(load32(to), kept, chosen));
      }
      from += bytes * __builtin_popcount(marks);
    }
    return from;
  }

 private:
  ESFAST_FN __m128i load128(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
  }
  ESFAST_FN __m256i places(const uint8_t (&eight)[8]) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(eight)));
  }
  // The bytes 2k and 2k + 1 of each of eight places k.
  ESFAST_FN __m128i words_at(const uint8_t (&eight)[8]) {
    const __m128i at = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(eight));
    const __m128i first = _mm_add_epi8(at, at);
    return _mm_unpacklo_epi8(first, _mm_or_si128(first, _mm_set1_epi8(1)));
  }
  ESFAST_FN __m256 ps(__m256i a) { return _mm256_castsi256_ps(a); }
  ESFAST_FN __m256i shift_down(__m256i a) { return _mm256_castps_si256(_mm256_movehdup_ps(ps(a))); }
  ESFAST_FN __m128i low_halves(__m256i a) {  // every lane holds less than 2^16
    const __m256i packed = _mm256_packus_epi32(a, a);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }
};

}  // namespace esfast::ESFAST_LANES
