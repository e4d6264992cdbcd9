// Rewards to fitness on the device. Sums run in index order, in double, one thread a sum, so that
// the bits are the CPU's (shaping.cpp has the same formulas, line by line). A population is
// thousands of numbers: what counts here is that they need not leave the device.
#include "../shaping.hpp"
#include "launch.hpp"

namespace esfast::cuda {

namespace {

constexpr int kThreads = 256;

struct Matrix {
  const double* x;
  uint64_t population, prompts;
};

__device__ __forceinline__ bool all_equal(const double* x, uint64_t count, uint64_t step) {
  for (uint64_t i = 1; i < count; ++i)
    if (!(x[i * step] == x[0])) return false;
  return true;
}

struct Moments {
  double unit, mean, scale;
  bool equal;
};

__device__ __forceinline__ double power_of_two_below(const double* x, uint64_t count,
                                                     uint64_t step) {
  double most = 0.0;
  for (uint64_t i = 0; i < count; ++i) most = fmax(most, fabs(x[i * step]));
  int exponent = 0;
  frexp(most, &exponent);
  return ldexp(1.0, min(-exponent, 1000));
}

__device__ __forceinline__ Moments moments_of(const double* x, uint64_t count, uint64_t step,
                                              double floor, double least) {
  Moments m{power_of_two_below(x, count, step), 0.0, 0.0, all_equal(x, count, step)};
  double sum = 0.0;
  for (uint64_t i = 0; i < count; ++i) sum += x[i * step] * m.unit;
  m.mean = sum / static_cast<double>(count);
  sum = 0.0;
  for (uint64_t i = 0; i < count; ++i) {
    const double d = x[i * step] * m.unit - m.mean;
    sum += d * d;
  }
  m.scale = sqrt(sum / static_cast<double>(count)) + floor * m.unit;
  m.equal = m.equal || !(m.scale > least * m.unit);
  return m;
}

__device__ __forceinline__ double standard(double x, const Moments& m) {
  return m.equal ? 0.0 : (x * m.unit - m.mean) / m.scale;
}

// Centred ranks' numerators: how many are less, ties averaged; multiples of one half, exact.
__global__ void rank_kernel(Matrix m, double* ranks) {
  const uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= m.population) return;
  uint64_t less = 0, equal = 0;
  for (uint64_t j = 0; j < m.population; ++j) {
    less += m.x[j] < m.x[i] ? 1 : 0;
    equal += m.x[j] == m.x[i] ? 1 : 0;
  }
  ranks[i] = 0.5 * static_cast<double>(2 * less + equal - 1);
}

// One thread a prompt: unit, mean, scale and "all equal" of its column.
__global__ void column_kernel(Matrix m, double* moments) {
  const uint64_t p = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (p >= m.prompts) return;
  const Moments found = moments_of(m.x + p, m.population, m.prompts, 0.0, 0.0);
  moments[4 * p] = found.unit;
  moments[4 * p + 1] = found.mean;
  moments[4 * p + 2] = found.scale;
  moments[4 * p + 3] = found.equal ? 1.0 : 0.0;
}

// One thread a member: its standardised rewards summed in the order of the prompts.
__global__ void group_sum_kernel(Matrix m, const double* moments, double* sums) {
  const uint64_t n = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= m.population) return;
  double sum = 0.0;
  for (uint64_t p = 0; p < m.prompts; ++p)
    sum += standard(m.x[n * m.prompts + p], {moments[4 * p], moments[4 * p + 1], moments[4 * p + 2],
                                             moments[4 * p + 3] != 0.0});
  sums[n] = sum;
}

// One block: the first thread takes the moments, all scale.
__global__ void standardise_kernel(const double* x, uint64_t count, double floor, double least,
                                   double* out) {
  __shared__ Moments m;
  if (threadIdx.x == 0) m = moments_of(x, count, 1, floor, least);
  __syncthreads();
  for (uint64_t i = threadIdx.x; i < count; i += blockDim.x) out[i] = standard(x[i], m);
}

// One block: ranks (or rewards) divided and shifted; zeros where all rewards are equal.
__global__ void scale_kernel(const double* rewards, const double* x, uint64_t count, double most,
                             double shift, double* out) {
  __shared__ bool equal;
  if (threadIdx.x == 0) equal = all_equal(rewards, count, 1);
  __syncthreads();
  for (uint64_t i = threadIdx.x; i < count; i += blockDim.x)
    out[i] = equal ? 0.0 : x[i] / most - shift;
}

uint32_t blocks_for(uint64_t count) {
  return static_cast<uint32_t>((count + kThreads - 1) / kThreads);
}

}  // namespace

cudaError_t load_shaping() {
  for (const cudaError_t error : {load(rank_kernel), load(column_kernel), load(group_sum_kernel),
                                  load(standardise_kernel), load(scale_kernel)})
    if (error != cudaSuccess) return error;
  return cudaSuccess;
}

uint64_t shape_doubles(uint64_t population, uint64_t prompts) {
  return population + 4 * prompts;
}

Status shape(Shaping shaping, int device, uint64_t stream, uint64_t rewards, uint64_t population,
             uint64_t prompts, uint64_t workspace, uint64_t fitness) {
  if (population == 0 || prompts == 0) return {};
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return status_of(guard.error(), "choosing the device");
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  const Matrix m{reinterpret_cast<const double*>(rewards), population, prompts};
  auto* scores = reinterpret_cast<double*>(workspace);
  auto* out = reinterpret_cast<double*>(fitness);
  const uint32_t blocks = blocks_for(population);
  const double most = population > 1 ? static_cast<double>(population - 1) : 1.0;
  switch (shaping) {
    case Shaping::rank:
      rank_kernel<<<blocks, kThreads, 0, queue>>>(m, scores);
      standardise_kernel<<<1, kThreads, 0, queue>>>(scores, population, 0.0, 0.0, out);
      break;
    case Shaping::z_score:
      standardise_kernel<<<1, kThreads, 0, queue>>>(m.x, population, 1e-8, 0.0, out);
      break;
    case Shaping::centered_rank:
      rank_kernel<<<blocks, kThreads, 0, queue>>>(m, scores);
      scale_kernel<<<1, kThreads, 0, queue>>>(m.x, scores, population, most, 0.5, out);
      break;
    case Shaping::raw:
      scale_kernel<<<1, kThreads, 0, queue>>>(m.x, m.x, population, 1.0, 0.0, out);
      break;
    case Shaping::group_centered:
      column_kernel<<<blocks_for(prompts), kThreads, 0, queue>>>(m, scores + population);
      group_sum_kernel<<<blocks, kThreads, 0, queue>>>(m, scores + population, scores);
      standardise_kernel<<<1, kThreads, 0, queue>>>(
          scores, population, 0.0, kGroupNoise * static_cast<double>(prompts), out);
      break;
  }
  return status_of(cudaGetLastError(), "shaping");
}

}  // namespace esfast::cuda
