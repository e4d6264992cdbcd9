// One lane as a CUDA thread has it: Scalar, with a square root that branches nowhere.
//
// nvcc's __fsqrt_rn is a reciprocal square root and four multiply-adds for arguments from 2^-101
// up, behind a branch to a subroutine for the rest; eight branches a thread stop everything from
// being scheduled together. The radius only ever asks for -0, 0 or arguments from 2^-24 to 43
// (tests/test_cuda_mapping.py looks at all of them), so the same five operations are written out,
// with the argument of the reciprocal root kept from 0. The bits are __fsqrt_rn's and the CPU's.
#pragma once

#include "scalar.hpp"

namespace esfast::ESFAST_LANES {

struct Thread : Scalar {
  static constexpr int pairs = 4;  // of normals computed in step

#if defined(__CUDA_ARCH__)
  ESFAST_FN f32 sqrtf(f32 a) {
    f32 reciprocal;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(fmaxf(a, 0x1p-60f)));
    const f32 root = __fmul_rn(a, reciprocal), half = __fmul_rn(0.5f, reciprocal);
    return __fmaf_rn(__fmaf_rn(-root, root, a), half, root);
  }
#endif
};

}  // namespace esfast::ESFAST_LANES
