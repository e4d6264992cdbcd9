// The mapping of csrc/cuda looked at on its own, and the binding of the kernels, which run as they
// are on the CPU (simt/cuda_runtime.h).
#include <pybind11/stl.h>

#include "../../csrc/cuda/bind.hpp"
#include "../../csrc/cuda/cuda.hpp"
#include "../../csrc/cuda/tiles.hpp"
#include "simt/cuda_runtime.h"

namespace esfast::cuda {

using namespace device;

namespace {

// Adds 1 + 256 * (low 24 bits of the logical index) to the 32-bit word of every element visited by
// a grid of that size: each element must come out with exactly that, and nothing else may be
// touched.
void cover(const Place& place, uint32_t blocks, uint32_t threads) {
  const Span* spans = reinterpret_cast<const Span*>(place.spans);
  const uint32_t warps = warp_of(blocks, 0, threads);
  for (uint32_t block = 0; block < blocks; ++block)
    for (uint32_t thread = 0; thread < threads; ++thread)
      for (uint64_t tile = warp_of(block, thread, threads); tile < place.tiles; tile += warps) {
        const uint32_t t = static_cast<uint32_t>(tile);
        const Span& s = spans[find_span(spans, place.count, 0, t)];
        const auto lane = lane_of<Anyhow>(s, t, thread % kWarp);
        for (const Unit& u : lane.unit) {
          const Slots slots = live_of<Anyhow>(s, u);
          if (slots.wide && slots.address % 16)
            throw std::runtime_error("16 bytes at once, off their boundary");
          for (int e = u.first; e < u.end; ++e) {
            const uint64_t at = slots.address + static_cast<uint64_t>(e * slots.step);
            const uint32_t index = static_cast<uint32_t>(u.block * 8) + static_cast<uint32_t>(e);
            write(at, read_as<uint32_t>(at) + 1 + (index << 8));
          }
        }
      }
}

bool same(const Slots& a, const Slots& b) {
  return a.address == b.address && a.step == b.step && a.first == b.first && a.end == b.end &&
         a.wide == b.wide;
}

// How many tiles are dense; -1 where one of their units is not what the general mapping makes it.
int64_t dense_tiles(const Place& place) {
  const Span* spans = reinterpret_cast<const Span*>(place.spans);
  int64_t count = 0;
  for (uint32_t tile = 0; tile < place.tiles; ++tile) {
    const Span& s = spans[find_span(spans, place.count, 0, tile)];
    if (tile - s.first_tile >= s.dense_tiles) continue;
    ++count;
    for (uint32_t number = 0; number < kWarp; ++number) {
      const auto dense = lane_of<Dense>(s, tile, number);
      const auto general = lane_of<Anyhow>(s, tile, number);
      for (uint32_t j = 0; j < kSteps; ++j) {
        const Unit &a = dense.unit[j], &b = general.unit[j];
        if (a.block != b.block || a.column != b.column || a.row != b.row ||
            !same(live_of<Dense>(s, a), live_of<Anyhow>(s, b)) ||
            !same(base_of<Dense>(s, a), base_of<Anyhow>(s, b)) || s.live_dtype != Dtype::bfloat16 ||
            s.base_dtype != Dtype::bfloat16)
          return -1;
      }
    }
  }
  return count;
}

// The radius's squared argument for every |f| that a word can give: {least but 0, most, negatives}.
std::vector<double> radius_arguments() {
  struct Seen : Thread {
    static float sqrtf(float a) { return a; }
  };
  double least = 1e30, most = 0.0, wrong = 0.0;
  uint32_t before = 0;
  for (uint64_t word = 1; word <= 0x80000000ull; word += 2) {
    const uint32_t bits = Scalar::as_bits(Scalar::from_int(static_cast<uint32_t>(word)));
    if (bits == before) continue;  // integers beyond 2^24 share floats
    before = bits;
    const uint32_t words[1][4] = {{static_cast<uint32_t>(word), 0, 0x7FFFFFFFu, 0}};
    float z[1][4];
    NormalsJob<Seen, 1> job(words, z);
    run_steps(job);
    const float t = job.q.r[0];  // a radius not yet rooted
    if (!(t >= 0.0f)) ++wrong;
    if (t != 0.0f && t < least) least = t;
    if (t > most) most = t;
  }
  return {least, most, wrong};
}

// ---- what the emulation shows

// Each of 64 threads tells what the one 33 places on has said.
__global__ void neighbour_kernel(uint32_t said, bool waits, uint32_t* heard) {
  __shared__ uint32_t words[64];
  words[threadIdx.x] = said + threadIdx.x;
  if (waits) __syncthreads();
  heard[threadIdx.x] = words[(threadIdx.x + 33) % 64];
}

std::vector<uint32_t> neighbours(uint32_t said, bool waits) {
  std::vector<uint32_t> heard(64);
  simt::run(neighbour_kernel, {1, 64, 0, nullptr}, said, waits, heard.data());
  return heard;
}

// The warp waits for a thread that is gone, or that waits elsewhere.
__global__ void parted_kernel(bool gone) {
  if (threadIdx.x != 5)
    __syncwarp();
  else if (!gone)
    __shfl_sync(0xFFFFFFFFu, 1, 0);
}

void part(bool gone) {
  simt::run(parted_kernel, {1, 32, 0, nullptr}, gone);
}

}  // namespace

}  // namespace esfast::cuda

PYBIND11_MODULE(cuda_emulator, m) {
  esfast::cuda::bind(m);
  m.def("lend", [](int bytes) { simt::device.lent = bytes; });
  m.def("current_device", [] { return simt::device.current; });
  m.def("choose_device", [](int device) { simt::device.current = device; });
  m.def("worked", [] { return std::exchange(simt::device.worked, {}); });
  m.def("neighbours", &esfast::cuda::neighbours);
  m.def("part", &esfast::cuda::part);
  m.def("cover", &esfast::cuda::cover);
  m.def("dense_tiles", &esfast::cuda::dense_tiles);
  m.def("radius_arguments", &esfast::cuda::radius_arguments);
}
