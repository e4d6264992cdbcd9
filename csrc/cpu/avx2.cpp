// The avx2 target: compiled with its own instruction-set flags (build_flags.py).
#define ESFAST_LANES avx2
#include "../lanes/avx2.hpp"

#include "exports.hpp"

namespace esfast {
const Target avx2_target = avx2::Exports<avx2::Avx2>::table("avx2");
}
