// cuda.hpp on the CPU: the device's own functions (csrc/cuda/tiles.hpp) lane by lane, warp by warp.
//
// Everything but the kernels' shells runs as on the device: the plan, the mapping, the loads and
// stores of units, the noise, the rounding, the lists of lean memory. What a warp does together
// (sums over lanes, one reservation a tile) is written out here a second time. A small odd grid
// makes warps visit many tiles each.
#include <pybind11/stl.h>

#include "../../csrc/cuda/bind.hpp"
#include "../../csrc/cuda/cuda.hpp"
#include "../../csrc/cuda/tiles.hpp"
#include "../../csrc/float_environment.hpp"

namespace esfast::cuda {

using namespace device;

namespace {

constexpr uint32_t kBlocks = 3, kThreads = 96, kWarps = kBlocks * kThreads / kWarp;

// Calls body(span, tile) for the tiles of one warp, as for_tiles does.
template <class Body>
void tiles_of_warp(const Place& place, uint32_t warp, uint32_t stride, Body&& body) {
  const Span* spans = reinterpret_cast<const Span*>(place.spans);
  uint32_t number = 0, end = 0;
  for (uint64_t tile = uint64_t{warp} * stride; tile < place.tiles; tile += kWarps * stride) {
    const uint32_t t = static_cast<uint32_t>(tile);
    if (t >= end) {
      number = find_span(spans, place.count, number, t);
      end = number + 1 < place.count ? spans[number + 1].first_tile : place.tiles;
    }
    body(spans[number], t);
  }
}

template <class Body>
void for_warps(uint32_t stride, Body&& body) {
  const DefaultFloats floats;
  for (uint32_t block = 0; block < kBlocks; ++block)
    for (uint32_t thread = 0; thread < kThreads; thread += kWarp)
      body(warp_of(block, thread, kThreads), stride);
}

template <class Body>
Status for_lanes(const Place& place, Body&& body) {
  for_warps(1, [&](uint32_t warp, uint32_t stride) {
    tiles_of_warp(place, warp, stride, [&](const Span& s, uint32_t tile) {
      for (uint32_t lane = 0; lane < kWarp; ++lane)
        with_lane(s, tile, lane, [&](const auto& units) { body(s, units, lane); });
    });
  });
  return {};
}

template <class F>
void with_noise(Noise noise, F&& f) {
  if (noise == Noise::gaussian) f(std::integral_constant<Noise, Noise::gaussian>{});
  if (noise == Noise::rademacher) f(std::integral_constant<Noise, Noise::rademacher>{});
  if (noise == Noise::hadamard) f(std::integral_constant<Noise, Noise::hadamard>{});
}

Lists lists_of(const Buffers& b) {
  return {reinterpret_cast<uint8_t*>(b.marks),
          reinterpret_cast<uint32_t*>(b.offsets),
          reinterpret_cast<uint32_t*>(b.values),
          b.capacity,
          reinterpret_cast<unsigned long long*>(b.demand),
          b.slab};
}

struct Slab {
  uint32_t next = 0, left = 0;
  bool full = false;
};

uint32_t reserve(const Lists& lists, uint32_t words, Slab& slab) {
  if (words > slab.left) {
    const uint32_t size = words > lists.slab || slab.full ? words : lists.slab;
    const unsigned long long start = *lists.demand;
    *lists.demand += size;
    slab.full = start + size > lists.capacity;
    if (slab.full) return kNoRoom;
    slab.next = static_cast<uint32_t>(start);
    slab.left = size;
  }
  slab.next += words;
  slab.left -= words;
  return slab.next - words;
}

template <Noise noise>
void record_one(const Span& s, uint32_t tile, const Perturbation& p, const Lists& lists,
                Slab& slab) {
  std::vector<Recorded> lanes;
  int total = 0, before = 0;
  for (uint32_t lane = 0; lane < kWarp; ++lane)
    with_lane(s, tile, lane, [&](const auto& units) {
      lanes.push_back(record_tile<noise>(s, units, p));
      total += lanes.back().count;
    });
  const uint32_t offset = reserve(lists, words_for(s, static_cast<uint32_t>(total)), slab);
  if (lists.capacity == 0) return;
  lists.offsets[tile] = offset;
  if (offset == kNoRoom) return;
  for (uint32_t lane = 0; lane < kWarp; ++lane) {
    with_lane(s, tile, lane, [&](const auto& units) {
      commit_tile(s, units, lanes[lane], lists, tile, lane, offset, before);
    });
    before += lanes[lane].count;
  }
}

// The tables as a block of threads fills them.
std::vector<int32_t> tables_of(const UpdateCall& call, int shift) {
  std::vector<int32_t> tables;
  if (call.noise != Noise::hadamard) return tables;
  for (int i = 0; i < call.count * 1024; ++i) {
    const int32_t entry = table_entry(call.hadamard_coefficients + i / 1024 * 32, i / 256 % 4,
                                      static_cast<uint32_t>(i % 256));
    tables.insert(tables.end(), size_t{1} << shift, entry);
  }
  return tables;
}

Draw draw_of(const Source& s) {
  return {static_cast<uint32_t>(s.seed), static_cast<uint32_t>(s.seed >> 32), s.purpose,
          s.coefficient};
}

}  // namespace

std::vector<std::string> devices() {
  return {"an emulated device"};
}
Status prepare(int device) {
  return {device == 0 ? "" : "only device 0 is emulated"};
}
int warps(int) {
  return static_cast<int>(kWarps);
}

Status perturb(const Place& place, const PerturbCall& call) {
  const Perturbation p = perturbation_of(call);
  with_noise(call.noise, [&](auto noise) {
    for_lanes(place, [&](const Span& s, const auto& lane, uint32_t) {
      perturb_tile<decltype(noise)::value>(s, lane, p);
    });
  });
  return {};
}

Status record(const Place& place, const PerturbCall& call, const Buffers& buffers,
              uint32_t stride) {
  const Lists lists = lists_of(buffers);
  const Perturbation p = perturbation_of(call);
  *lists.demand = 0;
  with_noise(call.noise, [&](auto noise) {
    for_warps(stride, [&](uint32_t warp, uint32_t every) {
      Slab slab;
      tiles_of_warp(place, warp, every, [&](const Span& s, uint32_t tile) {
        record_one<decltype(noise)::value>(s, tile, p, lists, slab);
      });
    });
  });
  return {};
}

Status restore(const Place& place, const PerturbCall& call, const Buffers& buffers) {
  const Lists lists = lists_of(buffers);
  const Perturbation p = perturbation_of(call);
  with_noise(call.noise, [&](auto noise) {
    for_warps(1, [&](uint32_t warp, uint32_t stride) {
      tiles_of_warp(place, warp, stride, [&](const Span& s, uint32_t tile) {
        if (lists.offsets[tile] == kNoRoom) return;
        int before = 0;
        for (uint32_t lane = 0; lane < kWarp; ++lane) {
          const Marked m = marks_of(lists, tile, lane);
          with_lane(s, tile, lane, [&](const auto& units) {
            restore_tile<decltype(noise)::value>(s, units, p, m, lists.values + lists.offsets[tile],
                                                 before);
          });
          before += m.count;
        }
      });
    });
  });
  return {};
}

Status capture(const Place& place) {
  return for_lanes(place, [](const Span& s, const auto& l, uint32_t) { capture_tile(s, l); });
}

Status refresh(const Place& place) {
  return for_lanes(place, [](const Span& s, const auto& l, uint32_t) { refresh_tile(s, l); });
}

Status checksum(const Place& place, uint64_t sum) {
  auto* out = reinterpret_cast<uint64_t*>(sum);
  *out = 0;
  return for_lanes(place,
                   [&](const Span& s, const auto& lane, uint32_t) { *out += hash_tile(s, lane); });
}

uint64_t update_bytes(const UpdateCall& call) {
  return 16 + 16 * static_cast<uint64_t>(call.count);
}

Status update(const Place& place, const UpdateCall& call, uint64_t workspace, uint64_t saturated) {
  auto* draws = reinterpret_cast<Draw*>(workspace);
  for (int n = 0; n < call.count; ++n) draws[n] = draw_of(call.sources[n]);
  const int shift = call.count % 6;
  const std::vector<int32_t> entries = tables_of(call, shift);
  const Step step{draws, call.count, call.hadamard_scale,
                  Rule{call.decay, call.strength, call.stochastic},
                  draw_of({call.rounding_seed, 1u << 24, 0, 0.0f})};
  with_noise(call.noise, [&](auto noise) {
    for_lanes(place, [&](const Span& s, const auto& lane, uint32_t number) {
      const Tables tables{entries.data(), shift, number & ((1u << shift) - 1)};
      *reinterpret_cast<uint64_t*>(saturated) +=
          update_tile<decltype(noise)::value>(s, lane, step, tables);
    });
  });
  return {};
}

Status roots(int, uint64_t, uint32_t, uint64_t, uint64_t) {
  return {"roots are not emulated"};
}
Status roundings(int, uint64_t, uint32_t first, uint64_t count, uint64_t out) {
  for (uint64_t i = 0; i < count / 8; ++i)
    store_four(out + 16 * i, rounded_from(first + static_cast<uint32_t>(8 * i)).w);
  return {};
}
uint64_t shape_doubles(uint64_t, uint64_t) {
  return 1;
}
Status shape(Shaping, int, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t) {
  return {"shaping is not emulated"};
}

// ---- the mapping itself

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

}  // namespace

}  // namespace esfast::cuda

PYBIND11_MODULE(cuda_emulator, m) {
  esfast::cuda::bind(m);
  m.def("cover", &esfast::cuda::cover);
  m.def("dense_tiles", &esfast::cuda::dense_tiles);
  m.def("radius_arguments", &esfast::cuda::radius_arguments);
}
