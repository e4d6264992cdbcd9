// Fitness from rewards, in double: shaping.hpp has the formulas.
#include "shaping.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace esfast {
namespace {

bool all_equal(const double* x, size_t count) {
  return std::all_of(x, x + count, [&](double v) { return v == x[0]; });
}

// Ranks 0..count-1, ties averaged: exact, since they are multiples of one half.
std::vector<double> tied_ranks(const double* x, size_t count) {
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return x[a] < x[b]; });
  std::vector<double> ranks(count);
  for (size_t first = 0; first < count;) {
    size_t last = first;
    while (last + 1 < count && x[order[last + 1]] == x[order[first]]) ++last;
    for (size_t i = first; i <= last; ++i)
      ranks[order[i]] = 0.5 * static_cast<double>(first + last);
    first = last + 1;
  }
  return ranks;
}

double power_of_two_below(const double* x, size_t count) {
  double most = 0.0;
  for (size_t i = 0; i < count; ++i) most = std::max(most, std::fabs(x[i]));
  int exponent = 0;
  std::frexp(most, &exponent);
  return std::ldexp(1.0, std::min(-exponent, 1000));
}

double mean_of(const double* x, size_t count, double unit) {
  double sum = 0.0;
  for (size_t i = 0; i < count; ++i) sum += x[i] * unit;
  return sum / static_cast<double>(count);
}

double deviation_of(const double* x, size_t count, double unit, double mean) {
  double sum = 0.0;
  for (size_t i = 0; i < count; ++i) sum += (x[i] * unit - mean) * (x[i] * unit - mean);
  return std::sqrt(sum / static_cast<double>(count));
}

// Zeros where the deviation is not above `least`.
void standardise(const double* x, size_t count, double floor, double least, double* out) {
  if (all_equal(x, count)) {
    std::fill(out, out + count, 0.0);
    return;
  }
  const double unit = power_of_two_below(x, count), mean = mean_of(x, count, unit);
  const double scale = deviation_of(x, count, unit, mean) + floor * unit;
  for (size_t i = 0; i < count; ++i)
    out[i] = scale > least * unit ? (x[i] * unit - mean) / scale : 0.0;
}

}  // namespace

void shape_rank(const double* rewards, size_t count, double* fitness) {
  const std::vector<double> ranks = tied_ranks(rewards, count);
  standardise(ranks.data(), count, 0.0, 0.0, fitness);
}

void shape_z_score(const double* rewards, size_t count, double* fitness) {
  standardise(rewards, count, 1e-8, 0.0, fitness);
}

void shape_centered_rank(const double* rewards, size_t count, double* fitness) {
  const std::vector<double> ranks = tied_ranks(rewards, count);
  const double most = count > 1 ? static_cast<double>(count - 1) : 1.0;
  const bool equal = all_equal(rewards, count);
  for (size_t i = 0; i < count; ++i) fitness[i] = equal ? 0.0 : ranks[i] / most - 0.5;
}

void shape_raw(const double* rewards, size_t count, double* fitness) {
  const bool equal = all_equal(rewards, count);
  for (size_t i = 0; i < count; ++i) fitness[i] = equal ? 0.0 : rewards[i];
}

void shape_group(const double* rewards, size_t population, size_t prompts, double* fitness) {
  std::vector<double> column(population), scaled(population), sums(population, 0.0);
  for (size_t p = 0; p < prompts; ++p) {
    for (size_t n = 0; n < population; ++n) column[n] = rewards[n * prompts + p];
    standardise(column.data(), population, 0.0, 0.0, scaled.data());
    for (size_t n = 0; n < population; ++n) sums[n] += scaled[n];
  }
  const double noise = kGroupNoise * static_cast<double>(prompts);
  standardise(sums.data(), population, 0.0, noise, fitness);
}

}  // namespace esfast
