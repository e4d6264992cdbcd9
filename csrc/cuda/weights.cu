// Perturb from a base copy, capture, refresh and checksum; what devices there are.
#include "launch.hpp"
#include "tile_loop.hpp"

namespace esfast::cuda {

using namespace device;

namespace {

constexpr int kThreads = 128;

template <Noise noise>
__global__ void __launch_bounds__(kThreads, 6) perturb_kernel(Tiles table, Perturbation p) {
  for_tiles<kThreads>(table, 1, [&](const Span& s, uint32_t tile, uint32_t lane) {
    with_lane(s, tile, lane, [&](const auto& units) { perturb_tile<noise>(s, units, p); });
  });
}

__global__ void __launch_bounds__(kThreads, 6) capture_kernel(Tiles table) {
  for_tiles<kThreads>(table, 1, [&](const Span& s, uint32_t tile, uint32_t lane) {
    with_lane(s, tile, lane, [&](const auto& units) { capture_tile(s, units); });
  });
}

__global__ void __launch_bounds__(kThreads, 6) refresh_kernel(Tiles table) {
  for_tiles<kThreads>(table, 1, [&](const Span& s, uint32_t tile, uint32_t lane) {
    with_lane(s, tile, lane, [&](const auto& units) { refresh_tile(s, units); });
  });
}

// Sums modulo 2^64, so that the order of the atomic additions leaves no trace.
__global__ void __launch_bounds__(kThreads, 6)
    checksum_kernel(Tiles table, unsigned long long* out) {
  uint64_t sum = 0;
  for_tiles<kThreads>(table, 1, [&](const Span& s, uint32_t tile, uint32_t lane) {
    with_lane(s, tile, lane, [&](const auto& units) { sum += hash_tile(s, units); });
  });
  for (uint32_t distance = kWarp / 2; distance; distance /= 2)
    sum += __shfl_down_sync(0xFFFFFFFFu, sum, distance);
  if (threadIdx.x % kWarp == 0) atomicAdd(out, static_cast<unsigned long long>(sum));
}

// The branch-free root of lanes/thread.hpp for consecutive fp32 bit patterns, for a test.
__global__ void roots_kernel(uint32_t first, uint64_t count, float* out) {
  const uint64_t every = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  for (uint64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += every)
    out[i] = Thread::sqrtf(Scalar::as_float(first + static_cast<uint32_t>(i)));
}

__global__ void roundings_kernel(uint32_t first, uint64_t units, uint64_t out) {
  const uint64_t every = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  for (uint64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < units; i += every)
    store_four(out + 16 * i, rounded_from(first + static_cast<uint32_t>(8 * i)).w);
}

}  // namespace

Status roots(int device, uint64_t stream, uint32_t first, uint64_t count, uint64_t out) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return status_of(guard.error(), "choosing the device");
  roots_kernel<<<1024, kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      first, count, reinterpret_cast<float*>(out));
  return status_of(cudaGetLastError(), "roots");
}

Status roundings(int device, uint64_t stream, uint32_t first, uint64_t count, uint64_t out) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return status_of(guard.error(), "choosing the device");
  roundings_kernel<<<1024, kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(first, count / 8,
                                                                                  out);
  return status_of(cudaGetLastError(), "roundings");
}

std::vector<std::string> devices() {
  int count = 0;  // an error leaves it as it is
  if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) == cudaSuccess)
      names.emplace_back(std::string(properties.name) + ", sm_" + std::to_string(properties.major) +
                         std::to_string(properties.minor) + ", " +
                         std::to_string(properties.totalGlobalMem >> 20) + " MiB");
  }
  cudaGetLastError();  // "no driver" is no error of the next launch
  return names;
}

cudaError_t load_weights() {
  for (const cudaError_t error :
       {load(perturb_kernel<Noise::gaussian>), load(perturb_kernel<Noise::rademacher>),
        load(perturb_kernel<Noise::hadamard>), load(capture_kernel), load(refresh_kernel),
        load(checksum_kernel)})
    if (error != cudaSuccess) return error;
  return cudaSuccess;
}

Status prepare(int device) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return status_of(guard.error(), "choosing the device");
  for (const cudaError_t error : {load_weights(), load_lean(), load_update(device), load_shaping()})
    if (error != cudaSuccess) return status_of(error, "loading the kernels");
  return {};
}

Status perturb(const Place& place, const PerturbCall& call) {
  const Perturbation p = perturbation_of(call);
  constexpr Shape shape{kThreads, 0};
  constexpr const char* what = "perturb";
  switch (call.noise) {
    case Noise::rademacher:
      return launch<perturb_kernel<Noise::rademacher>>(place, place.tiles, shape, what,
                                                       tiles_of(place), p);
    case Noise::hadamard:
      return launch<perturb_kernel<Noise::hadamard>>(place, place.tiles, shape, what,
                                                     tiles_of(place), p);
    default:
      return launch<perturb_kernel<Noise::gaussian>>(place, place.tiles, shape, what,
                                                     tiles_of(place), p);
  }
}

Status capture(const Place& place) {
  return launch<capture_kernel>(place, place.tiles, {kThreads, 0}, "capture", tiles_of(place));
}

Status refresh(const Place& place) {
  return launch<refresh_kernel>(place, place.tiles, {kThreads, 0}, "refresh", tiles_of(place));
}

Status checksum(const Place& place, uint64_t sum) {
  const DeviceGuard guard(place.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error(), "choosing the device");
  auto* out = reinterpret_cast<unsigned long long*>(sum);
  const Status zeroed = status_of(
      cudaMemsetAsync(out, 0, 8, reinterpret_cast<cudaStream_t>(place.stream)), "checksum");
  if (!zeroed.ok()) return zeroed;
  return launch<checksum_kernel>(place, place.tiles, {kThreads, 0}, "checksum", tiles_of(place),
                                 out);
}

}  // namespace esfast::cuda
