// A unit of 8 elements between memory and one thread's registers: where its slots lie, loads and
// stores, dtypes. Host-and-device, so that tests run it on the CPU.
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

}  // namespace esfast::device
