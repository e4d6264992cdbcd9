// Lean memory: perturb in place with a list of what rounding loses, and restore (tiles.hpp).
#include "launch.hpp"
#include "tile_loop.hpp"

namespace esfast::cuda {

using namespace device;

namespace {

constexpr int kThreads = 128;
constexpr uint32_t kAll = 0xFFFFFFFFu;

// Sum over the lanes before this one; `total` over all.
__device__ __forceinline__ int scan(int value, uint32_t lane, int& total) {
  int sum = value;
  ESFAST_UNROLL
  for (uint32_t distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(kAll, sum, distance);
    sum += lane >= distance ? other : 0;
  }
  total = __shfl_sync(kAll, sum, kWarp - 1);
  return sum - value;
}

// What a warp has reserved of `values` and not used yet, in words.
struct Slab {
  uint32_t next = 0, left = 0;
  bool full = false;  // a reservation failed: from then on only what is needed is counted
};

// The first of `words` words, or kNoRoom. The whole warp calls it with one value.
__device__ __forceinline__ uint32_t reserve(const Lists& lists, uint32_t words, uint32_t lane,
                                            Slab& slab) {
  if (words > slab.left) {
    const uint32_t size = words > lists.slab || slab.full ? words : lists.slab;
    unsigned long long start = 0;
    if (lane == 0) start = atomicAdd(lists.demand, static_cast<unsigned long long>(size));
    start = __shfl_sync(kAll, start, 0);
    slab.full = start + size > lists.capacity;
    if (slab.full) return kNoRoom;
    slab.next = static_cast<uint32_t>(start);
    slab.left = size;
  }
  const uint32_t first = slab.next;
  slab.next += words;
  slab.left -= words;
  return first;
}

template <Noise noise>
__global__ void __launch_bounds__(kThreads, 5)
    record_kernel(Tiles table, Perturbation p, Lists lists, uint32_t stride) {
  Slab slab;
  for_tiles<kThreads>(table, stride, [&](const Span& s, uint32_t tile, uint32_t number) {
    with_lane(s, tile, number, [&](const auto& lane) {
      const Recorded r = record_tile<noise>(s, lane, p);
      int total;
      const int before = scan(r.count, number, total);
      const uint32_t words = words_for(s, static_cast<uint32_t>(total));
      const uint32_t offset = reserve(lists, words, number, slab);
      if (lists.capacity == 0) return;  // only counted
      if (number == 0) lists.offsets[tile] = offset;
      if (offset != kNoRoom) commit_tile(s, lane, r, lists, tile, number, offset, before);
    });
  });
}

template <Noise noise>
__global__ void __launch_bounds__(kThreads, 6)
    restore_kernel(Tiles table, Perturbation p, Lists lists) {
  for_tiles<kThreads>(table, 1, [&](const Span& s, uint32_t tile, uint32_t number) {
    const uint32_t offset = lists.offsets[tile];
    if (offset == kNoRoom) return;
    const Marked m = marks_of(lists, tile, number);
    int total;
    const int before = scan(m.count, number, total);
    with_lane(s, tile, number, [&](const auto& lane) {
      restore_tile<noise>(s, lane, p, m, lists.values + offset, before);
    });
  });
}

Lists lists_of(const Buffers& b) {
  return {reinterpret_cast<uint8_t*>(b.marks),
          reinterpret_cast<uint32_t*>(b.offsets),
          reinterpret_cast<uint32_t*>(b.values),
          b.capacity < kNoRoom ? b.capacity : kNoRoom,
          reinterpret_cast<unsigned long long*>(b.demand),
          b.slab};
}

template <Noise noise>
Status record_as(const Place& place, const Perturbation& p, const Buffers& buffers,
                 uint32_t stride) {
  const uint32_t visited = (place.tiles + stride - 1) / stride;
  return launch<record_kernel<noise>>(place, visited, {kThreads, 0}, "perturb (lean)",
                                      tiles_of(place), p, lists_of(buffers), stride);
}

template <Noise noise>
Status restore_as(const Place& place, const Perturbation& p, const Buffers& buffers) {
  return launch<restore_kernel<noise>>(place, place.tiles, {kThreads, 0}, "restore (lean)",
                                       tiles_of(place), p, lists_of(buffers));
}

}  // namespace

cudaError_t load_lean() {
  for (const cudaError_t error :
       {load(record_kernel<Noise::gaussian>), load(record_kernel<Noise::rademacher>),
        load(record_kernel<Noise::hadamard>), load(restore_kernel<Noise::gaussian>),
        load(restore_kernel<Noise::rademacher>), load(restore_kernel<Noise::hadamard>)})
    if (error != cudaSuccess) return error;
  return cudaSuccess;
}

int warps(int device) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return 0;
  const int blocks = resident_blocks<record_kernel<Noise::rademacher>>(device, {kThreads, 0});
  return blocks * (kThreads / static_cast<int>(kWarp));
}

Status record(const Place& place, const PerturbCall& call, const Buffers& buffers,
              uint32_t stride) {
  {
    const DeviceGuard guard(place.device);
    if (guard.error() != cudaSuccess) return status_of(guard.error(), "choosing the device");
    const Status zeroed = status_of(cudaMemsetAsync(reinterpret_cast<void*>(buffers.demand), 0, 8,
                                                    reinterpret_cast<cudaStream_t>(place.stream)),
                                    "perturb (lean)");
    if (!zeroed.ok()) return zeroed;
  }
  const Perturbation p = perturbation_of(call);
  switch (call.noise) {
    case Noise::rademacher: return record_as<Noise::rademacher>(place, p, buffers, stride);
    case Noise::hadamard: return record_as<Noise::hadamard>(place, p, buffers, stride);
    default: return record_as<Noise::gaussian>(place, p, buffers, stride);
  }
}

Status restore(const Place& place, const PerturbCall& call, const Buffers& buffers) {
  const Perturbation p = perturbation_of(call);
  switch (call.noise) {
    case Noise::rademacher: return restore_as<Noise::rademacher>(place, p, buffers);
    case Noise::hadamard: return restore_as<Noise::hadamard>(place, p, buffers);
    default: return restore_as<Noise::gaussian>(place, p, buffers);
  }
}

}  // namespace esfast::cuda
