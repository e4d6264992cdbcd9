// The avx512 target: compiled with its own instruction-set flags (build_flags.py).
#define ESFAST_LANES avx512
#include "../lanes/avx512.hpp"

#include "exports.hpp"

namespace esfast {
const Target avx512_target = avx512::Exports<avx512::Avx512>::table("avx512");
}
