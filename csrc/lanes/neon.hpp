// Four lanes: Armv8-A Advanced SIMD. See scalar.hpp for what each operation means.
//
// vmull gives 64-bit products of 32-bit lanes directly, so Philox's words stay 32 bits a lane.
#pragma once

#include <arm_neon.h>

#include <cstring>

#include "../target.hpp"
#include "marked.hpp"

namespace esfast::ESFAST_LANES {

struct Neon {
  static constexpr int width = 4;
  static constexpr int vectors = 2;
  static constexpr int batches = 2;
  static constexpr int pairs = 2;
  static constexpr int woven = 0;
  static constexpr int table_bits = 4;
  static constexpr bool byte_tables = false;
  static constexpr bool splits = false;

  using u32 = uint32x4_t;
  using f32 = float32x4_t;
  struct product {
    uint32x4_t first, second;  // the 64-bit products of lanes 0, 1 and of lanes 2, 3
  };
  using mask = uint32x4_t;
  using sum64 = uint64x2_t;

  template <uint32_t m>
  ESFAST_FN product multiply_counters(uint32_t base) {
    const uint64_t offsets[4] = {0, m, 2ull * m, 3ull * m};
    const uint64x2_t first = vdupq_n_u64(static_cast<uint64_t>(base) * m);
    return {vreinterpretq_u32_u64(vaddq_u64(first, vld1q_u64(offsets))),
            vreinterpretq_u32_u64(vaddq_u64(first, vld1q_u64(offsets + 2)))};
  }
  ESFAST_FN product multiply(u32 a, uint32_t constant) {
    const uint32x4_t c = vdupq_n_u32(constant);
    return {vreinterpretq_u32_u64(vmull_u32(vget_low_u32(a), vget_low_u32(c))),
            vreinterpretq_u32_u64(vmull_high_u32(a, c))};
  }
  ESFAST_FN u32 low(product p) { return vuzp1q_u32(p.first, p.second); }
  ESFAST_FN u32 high(product p) { return vuzp2q_u32(p.first, p.second); }
  ESFAST_FN u32 crossed_low(product p) { return low(p); }
  ESFAST_FN u32 crossed_high(product p) { return high(p); }
  ESFAST_FN void pin(u32&) {}
  ESFAST_FN sum64 accumulate(sum64 sum, product p, u32 y, u32 k) {
    const uint32x4_t keyed = xor_(y, k), zero = vdupq_n_u32(0);
    const uint32x4_t first = veorq_u32(p.first, vzip1q_u32(zero, keyed));
    const uint32x4_t second = veorq_u32(p.second, vzip2q_u32(zero, keyed));
    return vaddq_u64(sum, vaddq_u64(vreinterpretq_u64_u32(first), vreinterpretq_u64_u32(second)));
  }
  ESFAST_FN sum64 zero64() { return vdupq_n_u64(0); }
  ESFAST_FN uint64_t reduce64(sum64 sum) { return vgetq_lane_u64(sum, 0) + vgetq_lane_u64(sum, 1); }

  ESFAST_FN u32 set(uint32_t a) { return vdupq_n_u32(a); }
  ESFAST_FN u32 load(const uint32_t* p) { return vld1q_u32(p); }
  ESFAST_FN void store(uint32_t* p, u32 a) { vst1q_u32(p, a); }
  ESFAST_FN u32 load16(const void* p) {
    uint8x8_t bytes = vld1_u8(static_cast<const uint8_t*>(p));
    return vmovl_u16(vreinterpret_u16_u8(bytes));
  }
  ESFAST_FN void store16(void* p, u32 a) {
    vst1_u8(static_cast<uint8_t*>(p), vreinterpret_u8_u16(vmovn_u32(a)));
  }
  ESFAST_FN u32 load32(const void* p) {
    return vreinterpretq_u32_u8(vld1q_u8(static_cast<const uint8_t*>(p)));
  }
  ESFAST_FN void store32(void* p, u32 a) {
    vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_u32(a));
  }
  ESFAST_FN void load_high(const void* p, u32 (&v)[2]) {
    const uint16x8_t raw = vreinterpretq_u16_u8(vld1q_u8(static_cast<const uint8_t*>(p)));
    v[0] = vshll_n_u16(vget_low_u16(raw), 16);
    v[1] = vshll_high_n_u16(raw, 16);
  }
  ESFAST_FN void store_high(void* p, const u32 (&v)[2]) {
    const uint16x8_t odd = vuzp2q_u16(vreinterpretq_u16_u32(v[0]), vreinterpretq_u16_u32(v[1]));
    vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_u16(odd));
  }
  ESFAST_FN uint32_t differing_high(const void* p, const u32 (&v)[2]) {
    u32 old[2];
    load_high(p, old);
    const uint32_t same0 = bits_of(vceqq_u32(shr<16>(old[0]), shr<16>(v[0])));
    const uint32_t same1 = bits_of(vceqq_u32(shr<16>(old[1]), shr<16>(v[1])));
    return ~(same0 | same1 << 4) & 0xFFu;
  }
  ESFAST_FN u32 and_(u32 a, u32 b) { return vandq_u32(a, b); }
  ESFAST_FN u32 or_(u32 a, u32 b) { return vorrq_u32(a, b); }
  ESFAST_FN u32 xor_(u32 a, u32 b) { return veorq_u32(a, b); }
  ESFAST_FN u32 xor3(u32 a, u32 b, u32 c) { return veorq_u32(a, veorq_u32(b, c)); }
  ESFAST_FN u32 add(u32 a, u32 b) { return vaddq_u32(a, b); }
  ESFAST_FN u32 sub(u32 a, u32 b) { return vsubq_u32(a, b); }
  template <int N>
  ESFAST_FN u32 shl(u32 a) {
    return vshlq_n_u32(a, N);
  }
  template <int N>
  ESFAST_FN u32 shr(u32 a) {
    return vshrq_n_u32(a, N);
  }
  ESFAST_FN u32 round_even(u32 a) { return add(add(a, set(0x7FFFu)), and_(shr<16>(a), set(1))); }
  ESFAST_FN u32 signs(uint32_t bits) {
    const int32_t shift[4] = {31, 30, 29, 28};
    return and_(vshlq_u32(set(bits), vld1q_s32(shift)), set(0x80000000u));
  }
  ESFAST_FN u32 popcount(u32 a) {
    return vpaddlq_u16(vpaddlq_u8(vcntq_u8(vreinterpretq_u8_u32(a))));
  }
  ESFAST_FN u32 lookup(const int32_t* table, u32 index) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(table);
    const uint8x16x4_t entries = {
        {vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)}};
    const uint32x4_t nibble = vandq_u32(index, vdupq_n_u32(15));  // byte address: 4 * nibble + 0..3
    const uint32x4_t at = vmlaq_u32(vdupq_n_u32(0x03020100u), nibble, vdupq_n_u32(0x04040404u));
    return vreinterpretq_u32_u8(vqtbl4q_u8(entries, vreinterpretq_u8_u32(at)));
  }
  ESFAST_FN mask equal(u32 a, u32 b) { return vceqq_u32(a, b); }
  ESFAST_FN mask greater(u32 a, u32 b) {
    return vcgtq_s32(vreinterpretq_s32_u32(a), vreinterpretq_s32_u32(b));
  }
  ESFAST_FN u32 select(mask m, u32 a, u32 b) { return vbslq_u32(m, a, b); }
  ESFAST_FN mask both(mask a, mask b) { return vandq_u32(a, b); }
  ESFAST_FN bool any(mask m) { return vmaxvq_u32(m) != 0; }
  ESFAST_FN uint32_t count(mask m) { return vaddvq_u32(vshrq_n_u32(m, 31)); }
  ESFAST_FN uint32_t bits_of(mask m) {
    const uint32_t weights[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(m, vld1q_u32(weights)));
  }

  ESFAST_FN f32 as_float(u32 a) { return vreinterpretq_f32_u32(a); }
  ESFAST_FN u32 as_bits(f32 f) { return vreinterpretq_u32_f32(f); }
  ESFAST_FN f32 setf(float a) { return vdupq_n_f32(a); }
  ESFAST_FN f32 fma_constant(f32 a, f32 b, float c) { return fma(a, b, setf(c)); }
  ESFAST_FN f32 loadf(const float* p) { return vld1q_f32(p); }
  ESFAST_FN void storef(float* p, f32 a) { vst1q_f32(p, a); }
  ESFAST_FN f32 from_int(u32 a) { return vcvtq_f32_s32(vreinterpretq_s32_u32(a)); }
  ESFAST_FN u32 truncate(f32 a) { return vreinterpretq_u32_s32(vcvtq_s32_f32(a)); }
  ESFAST_FN mask less(f32 a, f32 b) { return vcltq_f32(a, b); }
  ESFAST_FN mask is_nan(f32 a) { return vmvnq_u32(vceqq_f32(a, a)); }
  ESFAST_FN mask unordered(f32 a, f32 b) { return vornq_u32(is_nan(a), vceqq_f32(b, b)); }
  ESFAST_FN f32 addf(f32 a, f32 b) { return vaddq_f32(a, b); }
  ESFAST_FN f32 subf(f32 a, f32 b) { return vsubq_f32(a, b); }
  ESFAST_FN f32 mulf(f32 a, f32 b) { return vmulq_f32(a, b); }
  ESFAST_FN f32 fma(f32 a, f32 b, f32 c) { return vfmaq_f32(c, a, b); }
  ESFAST_FN f32 sqrtf(f32 a) { return vsqrtq_f32(a); }

  ESFAST_FN f32 from_half(u32 h) { return vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(h))); }
  ESFAST_FN u32 to_half(f32 f) { return vmovl_u16(vreinterpret_u16_f16(vcvt_f16_f32(f))); }

  ESFAST_FN void interleave(u32 (&z)[4]) {
    const uint32x4_t a = vzip1q_u32(z[0], z[1]), b = vzip2q_u32(z[0], z[1]);
    const uint32x4_t c = vzip1q_u32(z[2], z[3]), d = vzip2q_u32(z[2], z[3]);
    z[0] = zip64_low(a, c);
    z[1] = zip64_high(a, c);
    z[2] = zip64_low(b, d);
    z[3] = zip64_high(b, d);
  }

  // Whole registers: the caller keeps 64 bytes of slack at both ends of a record.
  template <int bytes>
  ESFAST_FN uint8_t* compress(uint8_t* to, uint32_t marked, const uint8_t* from) {
    pick<bytes>(to, from, kMarks.order[marked]);
    return to + bytes * __builtin_popcount(marked);
  }
  template <int bytes>
  ESFAST_FN const uint8_t* expand(uint8_t* to, uint32_t marked, const uint8_t* from) {
    uint8_t kept[8 * bytes];
    pick<bytes>(kept, from, kMarks.rank[marked]);
    for (int i = 0; i < 8 * bytes; i += 16) {
      const uint8x16_t chosen = marked_bytes<bytes>(marked >> (i / bytes));
      vst1q_u8(to + i, vbslq_u8(chosen, vld1q_u8(kept + i), vld1q_u8(to + i)));
    }
    return from + bytes * __builtin_popcount(marked);
  }

 private:
  // The elements at eight places of the eight at `from`.
  template <int bytes>
  ESFAST_FN void pick(uint8_t* to, const uint8_t* from, const uint8_t (&eight)[8]) {
    const uint16x8_t places = vmovl_u8(vld1_u8(eight));
    if (bytes == 2) {
      const uint16x8_t at = vmlaq_u16(vdupq_n_u16(0x0100), places, vdupq_n_u16(0x0202));
      vst1q_u8(to, vqtbl1q_u8(vld1q_u8(from), vreinterpretq_u8_u16(at)));
      return;
    }
    const uint8x16x2_t all = {{vld1q_u8(from), vld1q_u8(from + 16)}};
    const uint32x4_t first = vmovl_u16(vget_low_u16(places)), second = vmovl_high_u16(places);
    const uint32x4_t zero = vdupq_n_u32(0x03020100u), four = vdupq_n_u32(0x04040404u);
    vst1q_u8(to, vqtbl2q_u8(all, vreinterpretq_u8_u32(vmlaq_u32(zero, first, four))));
    vst1q_u8(to + 16, vqtbl2q_u8(all, vreinterpretq_u8_u32(vmlaq_u32(zero, second, four))));
  }
  // All bits of the elements whose mark is set, of the 16 / bytes that fit a register.
  template <int bytes>
  ESFAST_FN uint8x16_t marked_bytes(uint32_t marked) {
    if (bytes == 2) {
      const uint16_t bit[8] = {1, 2, 4, 8, 16, 32, 64, 128};
      return vreinterpretq_u8_u16(
          vtstq_u16(vdupq_n_u16(static_cast<uint16_t>(marked)), vld1q_u16(bit)));
    }
    const uint32_t bit[4] = {1, 2, 4, 8};
    return vreinterpretq_u8_u32(vtstq_u32(vdupq_n_u32(marked), vld1q_u32(bit)));
  }
  ESFAST_FN uint32x4_t zip64_low(uint32x4_t a, uint32x4_t b) {
    return vreinterpretq_u32_u64(vzip1q_u64(vreinterpretq_u64_u32(a), vreinterpretq_u64_u32(b)));
  }
  ESFAST_FN uint32x4_t zip64_high(uint32x4_t a, uint32x4_t b) {
    return vreinterpretq_u32_u64(vzip2q_u64(vreinterpretq_u64_u32(a), vreinterpretq_u64_u32(b)));
  }
};

}  // namespace esfast::ESFAST_LANES
