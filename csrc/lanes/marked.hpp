// For targets that cannot compress a vector: the marked elements one by one. Inherited by their
// lanes.
#pragma once

#include <cstring>

#include "../target.hpp"

namespace esfast::ESFAST_LANES {

struct MarkedOneByOne {
  template <int bytes>
  ESFAST_FN uint8_t* compress(uint8_t* to, uint32_t marked, const uint8_t* from) {
    for (; marked; marked &= marked - 1, to += bytes)
      memcpy(to, from + bytes * __builtin_ctz(marked), bytes);
    return to;
  }
  template <int bytes>
  ESFAST_FN const uint8_t* expand(uint8_t* to, uint32_t marked, const uint8_t* from) {
    for (; marked; marked &= marked - 1, from += bytes)
      memcpy(to + bytes * __builtin_ctz(marked), from, bytes);
    return from;
  }
};

}  // namespace esfast::ESFAST_LANES
