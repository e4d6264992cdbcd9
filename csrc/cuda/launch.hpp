// Launching: the device guard, errors as text, and a grid that fills the device once.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>

#include "cuda.hpp"

namespace esfast::cuda {

inline Status status_of(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // told here, and not once more after the next launch
  return {std::string(what) + ": " + cudaGetErrorString(error) + " (CUDA error " +
          std::to_string(static_cast<int>(error)) + ")"};
}

// Makes a device current for a scope; where it is current already, nothing is set.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    int before = -1;
    if (cudaGetDevice(&before) == cudaSuccess && before == device) return;
    error_ = cudaSetDevice(device);
    if (error_ == cudaSuccess) before_ = before;
  }
  ~DeviceGuard() {
    if (before_ >= 0) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = -1;  // none to put back
  cudaError_t error_ = cudaSuccess;
};

constexpr int kMostDevices = 64;

// How a kernel is launched: threads a block, and shared memory up to what the device lends.
struct Shape {
  int threads;
  size_t shared;
};

// Multiprocessors times resident blocks: asked once a kernel and device, since a query costs
// microseconds. Zero where the query fails.
template <auto kernel>
int resident_blocks(int device, Shape shape) {
  static std::array<std::atomic<int>, kMostDevices> known{};
  const bool keep = shape.shared == 0 && device < kMostDevices;
  if (keep && known[static_cast<size_t>(device)] > 0) return known[static_cast<size_t>(device)];
  int processors = 0, blocks = 0;
  const bool good =
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess &&
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, shape.threads, shape.shared) ==
          cudaSuccess;
  const int resident = good ? processors * blocks : 0;
  if (keep) known[static_cast<size_t>(device)] = resident;
  return resident;
}

// A persistent grid over `tiles`: no more blocks than are resident, nor than there is work for.
template <auto kernel, class... Arguments>
Status launch(const Place& place, uint32_t tiles, Shape shape, const char* what,
              const Arguments&... arguments) {
  if (tiles == 0) return {};
  const DeviceGuard guard(place.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error(), "choosing the device");
  const int resident = resident_blocks<kernel>(place.device, shape);
  if (resident == 0) {
    const cudaError_t error = cudaGetLastError();
    return status_of(error == cudaSuccess ? cudaErrorNoKernelImageForDevice : error, what);
  }
  const uint32_t warps = static_cast<uint32_t>(shape.threads) / kWarp;
  const uint32_t useful = (tiles - 1) / warps + 1;
  const uint32_t blocks =
      useful < static_cast<uint32_t>(resident) ? useful : static_cast<uint32_t>(resident);
  kernel<<<blocks, static_cast<uint32_t>(shape.threads), shape.shared,
           reinterpret_cast<cudaStream_t>(place.stream)>>>(arguments...);
  return status_of(cudaGetLastError(), what);
}

inline Tiles tiles_of(const Place& place) {
  return {reinterpret_cast<const Span*>(place.spans), place.count, place.tiles};
}

// Forces the kernel's code onto the current device.
template <class Kernel>
cudaError_t load(Kernel* kernel) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel);
}

// Each file loads its own.
cudaError_t load_weights();
cudaError_t load_lean();
cudaError_t load_update(int device);
cudaError_t load_shaping();

}  // namespace esfast::cuda
