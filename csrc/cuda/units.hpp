// What happens to a unit of 8 elements: the bodies of noise.hpp and kernels.hpp on one thread's
// registers. Host-and-device, so that tests run every line of it but the square root on the CPU.
#pragma once

#include <cstring>

#undef ESFAST_LANES
#define ESFAST_LANES device
#include "../kernels.hpp"
#include "../lanes/thread.hpp"
#include "mapping.hpp"

namespace esfast::device {

using cuda::Span;
using cuda::Unit;

// The bits of 8 elements as they lie in memory; 16-bit dtypes use the first four words.
struct Raw {
  uint32_t w[8];
};

struct alignas(16) Sixteen {
  uint32_t w[4];
};

// Memory by address. On the device in so many words: from an integer the compiler would make
// accesses of any memory space, which are slower than those of global memory. Volatile keeps their
// order.
#if defined(__CUDA_ARCH__)
__device__ __forceinline__ void read(uint64_t address, uint16_t& value) {
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(value) : "l"(address));
}
__device__ __forceinline__ void read(uint64_t address, uint32_t& value) {
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(value) : "l"(address));
}
__device__ __forceinline__ void read(uint64_t address, Sixteen& value) {
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.w[0]), "=r"(value.w[1]), "=r"(value.w[2]), "=r"(value.w[3])
               : "l"(address));
}
__device__ __forceinline__ void write(uint64_t address, uint16_t value) {
  asm volatile("st.global.u16 [%0], %1;" ::"l"(address), "h"(value) : "memory");
}
__device__ __forceinline__ void write(uint64_t address, uint32_t value) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
__device__ __forceinline__ void write(uint64_t address, const Sixteen& value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.w[0]),
               "r"(value.w[1]), "r"(value.w[2]), "r"(value.w[3])
               : "memory");
}
#else
template <class T>
ESFAST_FN void read(uint64_t address, T& value) {
  memcpy(&value, reinterpret_cast<const void*>(address), sizeof(T));
}
template <class T>
ESFAST_FN void write(uint64_t address, const T& value) {
  memcpy(reinterpret_cast<void*>(address), &value, sizeof(T));
}
#endif

template <class T>
ESFAST_FN T read_as(uint64_t address) {
  T value;
  read(address, value);
  return value;
}

// Where a unit's slots lie: slot 0's address (which may lie before the tensor) and the step.
struct Slots {
  uint64_t address;
  int64_t step;  // bytes
  int first, end;
  bool wide;  // whole, dense, and 16-byte aligned
};

ESFAST_FN Slots slots_of(const Unit& u, uint64_t address, int64_t row_stride, int64_t column_stride,
                         Dtype dtype) {
  const int64_t bytes = dtype == Dtype::float32 ? 4 : 2;
  Slots s;
  s.address =
      address + static_cast<uint64_t>((u.row * row_stride + u.column * column_stride) * bytes);
  s.step = column_stride * bytes;
  s.first = u.first;
  s.end = u.end;
  s.wide = u.first == 0 && u.end == 8 && column_stride == 1 && s.address % 16 == 0;
  return s;
}

// How the units of a tile lie: anyhow, or as `dense_unit_of` has them, where the compiler knows all
// but the address.
struct Anyhow {
  static constexpr bool dense = false;
};
struct Dense {
  static constexpr bool dense = true;
};

// Calls f with the layout of a tile.
template <class F>
ESFAST_FN void with_layout(const Span& s, uint32_t tile, F&& f) {
  if (tile - s.first_tile < s.dense_tiles)
    f(Dense{});
  else
    f(Anyhow{});
}

template <class Layout>
ESFAST_FN Dtype live_dtype(const Span& s) {
  return Layout::dense ? Dtype::bfloat16 : s.live_dtype;
}

template <class Layout>
ESFAST_FN Dtype base_dtype(const Span& s) {
  return Layout::dense ? Dtype::bfloat16 : s.base_dtype;
}

template <class Layout>
ESFAST_FN Slots live_of(const Span& s, const Unit& u) {
  if (Layout::dense) return {s.live + static_cast<uint64_t>(u.column) * 2, 2, 0, 8, true};
  return slots_of(u, s.live, s.live_row_stride, s.live_column_stride, s.live_dtype);
}

template <class Layout>
ESFAST_FN Slots base_of(const Span& s, const Unit& u) {
  if (Layout::dense) return {s.base + static_cast<uint64_t>(u.column) * 2, 2, 0, 8, true};
  const int64_t step = s.base == s.live ? s.live_column_stride : 1;
  return slots_of(u, s.base, s.base_row_stride, step, s.base_dtype);
}

ESFAST_FN Slots anchor_of(const Span& s, const Unit& u) {
  return slots_of(u, s.anchor, s.anchor_row_stride, 1, s.anchor_dtype);
}

ESFAST_FN void load_four(uint64_t address, uint32_t* w) {
  const Sixteen v = read_as<Sixteen>(address);
  for (int i = 0; i < 4; ++i) w[i] = v.w[i];
}

ESFAST_FN void store_four(uint64_t address, const uint32_t* w) {
  write(address, Sixteen{{w[0], w[1], w[2], w[3]}});
}

ESFAST_FN Raw load_raw(const Slots& s, Dtype dtype) {
  Raw raw{};
  if (s.wide) {
    load_four(s.address, raw.w);
    if (dtype == Dtype::float32) load_four(s.address + 16, raw.w + 4);
    return raw;
  }
  ESFAST_UNROLL
  for (int e = 0; e < 8; ++e) {
    if (e < s.first || e >= s.end) continue;
    const uint64_t at = s.address + static_cast<uint64_t>(e * s.step);
    if (dtype == Dtype::float32)
      raw.w[e] = read_as<uint32_t>(at);
    else
      raw.w[e / 2] |= static_cast<uint32_t>(read_as<uint16_t>(at)) << (16 * (e % 2));
  }
  return raw;
}

ESFAST_FN void store_raw(const Slots& s, Dtype dtype, const Raw& raw) {
  if (s.wide) {
    store_four(s.address, raw.w);
    if (dtype == Dtype::float32) store_four(s.address + 16, raw.w + 4);
    return;
  }
  ESFAST_UNROLL
  for (int e = 0; e < 8; ++e) {
    if (e < s.first || e >= s.end) continue;
    const uint64_t at = s.address + static_cast<uint64_t>(e * s.step);
    if (dtype == Dtype::float32)
      write(at, raw.w[e]);
    else
      write(at, static_cast<uint16_t>(raw.w[e / 2] >> (16 * (e % 2))));
  }
}

// Element e of a Raw in the representation of numeric.hpp, and back (into words that start as 0).
template <class T>
ESFAST_FN uint32_t get(const Raw& raw, int e) {
  if (T::bytes == 4) return raw.w[e];
  const uint32_t pair = raw.w[e / 2];
  if (T::high_half) return e % 2 ? pair & 0xFFFF0000u : pair << 16;
  return e % 2 ? pair >> 16 : pair & 0xFFFFu;
}

template <class T>
ESFAST_FN void put(Raw& raw, int e, uint32_t bits) {
  if (T::bytes == 4)
    raw.w[e] = bits;
  else if (T::high_half)
    raw.w[e / 2] |= e % 2 ? bits & 0xFFFF0000u : bits >> 16;
  else
    raw.w[e / 2] |= e % 2 ? bits << 16 : bits;
}

// The dtypes of numeric.hpp, told where a register holds them.
struct F32 : Float32 {
  static constexpr bool high_half = false;
};
struct BF16 : BFloat16 {
  static constexpr bool high_half = true;
};
struct F16 : Float16 {
  static constexpr bool high_half = false;
};

template <class Layout = Anyhow, class F>
ESFAST_FN void with_dtype(Dtype dtype, F&& f) {
  if (Layout::dense)
    f(BF16{});
  else if (dtype == Dtype::bfloat16)
    f(BF16{});
  else if (dtype == Dtype::float16)
    f(F16{});
  else
    f(F32{});
}

// The base has the live dtype, or is the fp32 master of a 16-bit one.
template <class Layout, class F>
ESFAST_FN void with_dtypes(const Span& s, F&& f) {
  if (Layout::dense)
    f(BF16{}, BF16{});
  else if (s.base_dtype == s.live_dtype)
    with_dtype(s.live_dtype, [&](auto live) { f(live, live); });
  else if (s.live_dtype == Dtype::bfloat16)
    f(BF16{}, F32{});
  else
    f(F16{}, F32{});
}

// ---- noise

// A member, or a Hadamard group of an update, as it lies in device memory.
struct alignas(16) Draw {
  uint32_t seed_low, seed_high, purpose;
  float coefficient;
};

ESFAST_FN Stream stream_of(const Draw& d, uint32_t tensor, uint32_t high) {
  return make_stream(static_cast<uint64_t>(d.seed_high) << 32 | d.seed_low, high, tensor,
                     d.purpose);
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
