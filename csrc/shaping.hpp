// Rewards to fitness, in double, in a fixed order: the same bits on every machine.
//
//   rank           centred ranks, ties averaged, scaled to unit variance (ddof 0)
//   z_score        (r - mean) / (std + 1e-8), ddof 0 (arXiv 2509.24372)
//   centered_rank  rank / (n - 1) - 0.5, ties averaged (Salimans et al., arXiv 1703.03864)
//   raw            r
//   group          per prompt over the population, (r - mean) / std, then the mean over prompts,
//                  scaled to unit variance
// Rewards that are all equal give zeros with every method: such a generation has nothing to say.
#pragma once

#include <cstddef>

namespace esfast {

void shape_rank(const double* rewards, size_t count, double* fitness);
void shape_z_score(const double* rewards, size_t count, double* fitness);
void shape_centered_rank(const double* rewards, size_t count, double* fitness);
void shape_raw(const double* rewards, size_t count, double* fitness);
// rewards: [population, prompts], row-major; fitness: [population].
void shape_group(const double* rewards, size_t population, size_t prompts, double* fitness);

}  // namespace esfast
