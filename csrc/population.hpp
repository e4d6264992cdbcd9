// From members and coefficients to the terms that an update kernel adds: antithetic pairs become
// one term, Hadamard groups become integer coefficients. In double, once a call, on the host.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/target.hpp"

namespace esfast {

struct MemberSpec {
  uint64_t seed;
  int sign;
  uint32_t index;  // Hadamard: the member's number; its group is index / 32
};

struct Terms {
  std::vector<Source> sources;  // members, or Hadamard groups
  std::vector<int32_t> hadamard_coefficients;
  float hadamard_scale = 0.0f;
};

// Where counter word 3 says what a draw is for (docs/noise.md).
constexpr uint32_t kPurposeSeed = 4u << 24;

// Throws std::invalid_argument for a number that no kernel has, which would leave unwritten memory
// where the noise should be: Python's NOISES and this build are apart.
Noise noise_of(int number);
Source make_source(Noise noise, const MemberSpec& member);
// Throws std::invalid_argument for Hadamard members of different seeds or too many groups.
Terms make_terms(Noise noise, const std::vector<MemberSpec>& members,
                 const std::vector<double>& coefficients);

void philox(uint64_t key, const uint32_t counter[4], uint32_t words[4]);
uint64_t derive_seed(uint64_t run_seed, uint64_t generation, uint32_t member);

}  // namespace esfast
