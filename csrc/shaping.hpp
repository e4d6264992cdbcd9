// Rewards to fitness, in double, in a fixed order: the same bits on every machine.
//
//   rank           centred ranks, ties averaged, scaled to unit variance (ddof 0)
//   z_score        (r - mean) / (std + 1e-8), ddof 0 (arXiv 2509.24372)
//   centered_rank  rank / (n - 1) - 0.5, ties averaged (Salimans et al., arXiv 1703.03864)
//   raw            r
//   group          per prompt over the population, (r - mean) / std, then the mean over prompts,
//                  scaled to unit variance
// Rewards that are all equal give zeros with every method: such a generation has nothing to say.
// So do members whose sums over prompts differ by no more than those sums' rounding. Moments are
// taken of rewards times a power of two that brings the largest below 1: that rounds nothing, and
// squares of 1e200 and of 1e-200 are numbers then.
#pragma once

#include <cstddef>

namespace esfast {

// Of the sums of `prompts` numbers around 1: 1e4 times the rounding of one.
constexpr double kGroupNoise = 0x1p-40;

void shape_rank(const double* rewards, size_t count, double* fitness);
void shape_z_score(const double* rewards, size_t count, double* fitness);
void shape_centered_rank(const double* rewards, size_t count, double* fitness);
void shape_raw(const double* rewards, size_t count, double* fitness);
// rewards: [population, prompts], row-major; fitness: [population].
void shape_group(const double* rewards, size_t population, size_t prompts, double* fitness);

}  // namespace esfast
