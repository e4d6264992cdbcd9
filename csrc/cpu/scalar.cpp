// The scalar target: compiled with its own instruction-set flags (build_flags.py).
#define ESFAST_LANES scalar
#include "../lanes/scalar.hpp"

#include "exports.hpp"

namespace esfast {
const Target scalar_target = scalar::Exports<scalar::Scalar>::table("scalar");
}
