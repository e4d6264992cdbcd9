// The neon target: compiled with its own instruction-set flags (build_flags.py).
#define ESFAST_LANES neon
#include "../lanes/neon.hpp"

#include "exports.hpp"

namespace esfast {
const Target neon_target = neon::Exports<neon::Neon>::table("neon");
}
