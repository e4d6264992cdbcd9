// CUDA on the CPU, as much of it as csrc/cuda uses: a thread is a fiber, so that the kernels' own
// sources run, with their shells, shuffles, barriers and shared memory, behind a runtime that looks
// at every launch. tests/cuda_emulator.py compiles csrc/cuda/*.cu against this header.
//
// Threads run one at a time, in an order drawn anew at every barrier, each as far as the next one,
// and each warp as far as the block's next one: a read that lacks its barrier sees what was there
// before. Where threads wait at different barriers, or some are gone, the launch throws. What it
// cannot show: instructions of the device alone, memory's ordering between blocks, time.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../../../csrc/float_environment.hpp"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other
using std::max;
using std::min;

// ---- the runtime's words

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;
struct cudaFuncAttributes {};
struct cudaDeviceProp {
  char name[256];
  int major, minor;
  size_t totalGlobalMem;
};
struct dim3 {
  uint32_t x = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

constexpr int kWarp = 32, kGuard = 4096;
constexpr size_t kStack = 256 << 10, kUsualShared = 48 << 10, kMostParameters = 4096;

// Small and odd, so that warps visit many tiles each. `lent`: shared memory of a block, an H200's.
struct Device {
  int count = 2, processors = 3, current = 0, lent = 232448;
  cudaError_t error = cudaSuccess;
  uint64_t launches = 0;
  std::set<int> worked;                    // devices that were current for a launch or a memset
  std::map<const void*, size_t> enlarged;  // what a kernel was lent
};
inline Device device;

inline cudaError_t told(cudaError_t error) {
  if (error != cudaSuccess) device.error = error;
  return error;
}

enum class State { ready, at_warp, at_block, done };

// Switched by setjmp once it runs: swapcontext asks the kernel each time, and takes half the time.
struct Fiber {
  ucontext_t start;
  jmp_buf place;
  bool started = false;
  State state = State::ready;
  const char* where = "";
  uint64_t turn = 0, value[2] = {0, 0};  // of two shuffles: nobody is two ahead
};

// A block of threads while it runs.
struct Block {
  std::vector<Fiber> fibers;
  jmp_buf scheduler;
  void (*body)(void*);
  void* arguments;
  size_t current = 0;
  uint64_t random = 1;
  std::string error;
};
inline Block* block;
inline std::vector<char> dynamic_shared;
inline std::unique_ptr<char[]> stacks;  // of 1,024 threads

inline Fiber& mine() {
  return block->fibers[block->current];
}
inline void yield(State state, const char* where) {
  Fiber& fiber = mine();
  fiber.state = state;
  fiber.where = where;
  if (_setjmp(fiber.place) == 0) _longjmp(block->scheduler, 1);
}
// Of a thread, on whose stack nothing may be thrown.
inline void fail(const char* message) {
  block->error = message;
  while (true) yield(State::done, "an error");
}
inline void enter() {
  block->body(block->arguments);
  yield(State::done, "the end");
}

inline uint32_t draw(uint32_t below) {
  block->random = block->random * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(block->random >> 33) % below;
}

inline bool all(size_t first, size_t end, State state) {
  return std::all_of(block->fibers.begin() + static_cast<long>(first),
                     block->fibers.begin() + static_cast<long>(end),
                     [state](const Fiber& fiber) { return fiber.state == state; });
}

// Lets a group of threads go on if all of it waits at one barrier.
inline bool release(size_t first, size_t end, State barrier) {
  Fiber* fibers = block->fibers.data();
  if (!all(first, end, barrier)) return false;
  for (size_t i = first; i < end; ++i) {
    if (strcmp(fibers[i].where, fibers[first].where) != 0)
      throw std::runtime_error(std::string("threads of a warp wait at ") + fibers[i].where +
                               " and at " + fibers[first].where);
    fibers[i].state = State::ready;
  }
  return true;
}

inline std::vector<uint32_t> shuffled(size_t count) {
  std::vector<uint32_t> order(count);
  for (uint32_t i = 0; i < count; ++i) order[i] = i;
  for (uint32_t i = 1; i < count; ++i) std::swap(order[i], order[draw(i + 1)]);
  return order;
}

inline void resume(size_t i) {
  if (block->fibers[i].state != State::ready) return;
  block->current = i;
  threadIdx.x = static_cast<uint32_t>(i);
  Fiber& fiber = block->fibers[i];
  if (_setjmp(block->scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }
  if (!block->error.empty()) throw std::runtime_error(block->error);
}

// As far as it comes without the other warps.
inline void run_warp(size_t first) {
  do
    for (const uint32_t lane : shuffled(kWarp)) resume(first + lane);
  while (release(first, first + kWarp, State::at_warp));
}

inline void run_block(Block& b, uint32_t threads, uint64_t seed) {
  block = &b;
  b.random = seed * 2 + 1;
  for (uint32_t i = 0; i < threads; ++i) {
    Fiber& fiber = b.fibers[i];
    fiber.state = State::ready;
    fiber.started = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks.get() + i * kStack;
    fiber.start.uc_stack.ss_size = kStack;
    makecontext(&fiber.start, enter, 0);
  }
  do
    for (const uint32_t warp : shuffled(threads / kWarp)) run_warp(warp * kWarp);
  while (release(0, threads, State::at_block));
  if (!all(0, threads, State::done))
    throw std::runtime_error("threads wait for others that are gone or elsewhere");
}

struct Shape {
  uint32_t blocks, threads;
  size_t shared;
  cudaStream_t stream;
};

inline cudaError_t refusal(const void* kernel, const Shape& s, size_t parameters) {
  const auto found = device.enlarged.find(kernel);
  const size_t most = found == device.enlarged.end() ? kUsualShared : found->second;
  if (s.blocks == 0 || s.threads == 0 || s.threads > 1024) return cudaErrorInvalidConfiguration;
  return s.shared > most || parameters > kMostParameters ? cudaErrorInvalidValue : cudaSuccess;
}

// kernel<<<shape>>>(arguments): done when it returns.
template <class... Parameters, class... Arguments>
void run(void (*kernel)(Parameters...), const Shape& s, const Arguments&... arguments) {
  const void* address = reinterpret_cast<const void*>(kernel);
  if (told(refusal(address, s, (sizeof(Parameters) + ... + 0))) != cudaSuccess) return;
  device.worked.insert(device.current);
  if (s.threads % kWarp) throw std::runtime_error("the last warp is not whole");
  const esfast::DefaultFloats floats;  // a device's own, whatever the caller of the host's set
  auto call = [&] { kernel(Parameters(arguments)...); };
  Block b;
  b.fibers.resize(s.threads);
  if (!stacks) stacks.reset(new char[1024 * kStack]);
  b.body = [](void* f) { (*static_cast<decltype(call)*>(f))(); };
  b.arguments = &call;
  blockDim.x = s.threads;
  gridDim.x = s.blocks;
  for (blockIdx.x = 0; blockIdx.x < s.blocks; ++blockIdx.x) {
    dynamic_shared.assign(s.shared + kGuard, '\x55');
    run_block(b, s.threads, ++device.launches);
    if (std::count(dynamic_shared.end() - kGuard, dynamic_shared.end(), '\x55') != kGuard)
      throw std::runtime_error("shared memory was written past what the launch asked for");
  }
}

template <class T>
T* shared() {
  return reinterpret_cast<T*>(dynamic_shared.data());
}

// Every thread of the warp gives a value and takes that of `lane`.
template <class T>
T exchange(uint32_t mask, T value, uint32_t lane, const char* where) {
  static_assert(sizeof(T) <= 8, "what a shuffle carries");
  if (mask != 0xFFFFFFFFu) fail("a shuffle of half a warp");
  const uint64_t turn = mine().turn++ % 2;
  memcpy(&mine().value[turn], &value, sizeof(T));
  yield(State::at_warp, where);
  const size_t warp = block->current / kWarp * kWarp;
  memcpy(&value, &block->fibers[warp + lane].value[turn], sizeof(T));
  return value;
}

inline uint32_t lane() {
  return threadIdx.x % kWarp;
}

}  // namespace simt

// ---- what threads do together

inline void __syncwarp() {
  simt::yield(simt::State::at_warp, "__syncwarp");
}
inline void __syncthreads() {
  simt::yield(simt::State::at_block, "__syncthreads");
}
template <class T>
T __shfl_sync(uint32_t mask, T value, uint32_t lane) {
  return simt::exchange(mask, value, lane % simt::kWarp, "__shfl_sync");
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, uint32_t distance) {
  const uint32_t lane = simt::lane();
  return simt::exchange(mask, value, lane < distance ? lane : lane - distance, "__shfl_up_sync");
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, uint32_t distance) {
  const uint32_t lane = simt::lane(), from = lane + distance;
  return simt::exchange(mask, value, from < simt::kWarp ? from : lane, "__shfl_down_sync");
}
template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}

// ---- the runtime

inline cudaError_t cudaGetLastError() {
  return std::exchange(simt::device.error, cudaSuccess);
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "emulated error";
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = simt::device.count;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = simt::device.current;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= simt::device.count) return simt::told(cudaErrorInvalidDevice);
  simt::device.current = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {"an emulated device", 9, 0, size_t{1} << 30};
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const bool count = which == cudaDevAttrMultiProcessorCount;
  *value = count ? simt::device.processors : simt::device.lent;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || bytes > simt::device.lent) return simt::told(cudaErrorInvalidValue);
  simt::device.enlarged[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  simt::device.worked.insert(simt::device.current);
  memset(at, value, bytes);
  return cudaSuccess;
}
