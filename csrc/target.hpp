// What a translation unit is compiled for, and the macros that the bodies are written with.
//
// Every header of the bodies (lanes/, noise.hpp, hadamard.hpp, numeric.hpp, kernels.hpp) is
// compiled once a target with that target's instruction-set flags, and again by nvcc. The namespace
// carries the target's name, so that the linker never merges an AVX-512 copy of a function into the
// scalar path.
#pragma once

#include <cstdint>

#ifndef ESFAST_LANES
#define ESFAST_LANES scalar
#endif

#define ESFAST_INLINE __attribute__((always_inline))
#define ESFAST_RARE(condition) __builtin_expect(condition, 0)
#if defined(__CUDACC__)
#define ESFAST_FN static __host__ __device__ __forceinline__
#define ESFAST_METHOD __host__ __device__ __forceinline__
#if defined(__CUDA_ARCH__)
#define ESFAST_UNROLL _Pragma("unroll")
#else
#define ESFAST_UNROLL
#endif
#elif defined(__clang__)
#define ESFAST_FN static inline ESFAST_INLINE
#define ESFAST_METHOD inline ESFAST_INLINE
#define ESFAST_UNROLL _Pragma("unroll")
#define ESFAST_ROLL _Pragma("nounroll")
#else
#define ESFAST_FN static inline ESFAST_INLINE
#define ESFAST_METHOD inline ESFAST_INLINE
#define ESFAST_UNROLL _Pragma("GCC unroll 64")
#define ESFAST_ROLL _Pragma("GCC unroll 1")
#endif
