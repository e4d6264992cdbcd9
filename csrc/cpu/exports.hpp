// A target's table of functions: run-time dtypes and noises meet the loops' templates here.
#pragma once

#include "noise_loops.hpp"
#include "weight_loops.hpp"

namespace esfast {

struct Scratch {};  // what the caller holds; each target keeps its Buffers behind it

namespace ESFAST_LANES {

struct TargetScratch : Scratch {
  Buffers buffers;
};

static Buffers& buffers_of(Scratch& s) {
  return static_cast<TargetScratch&>(s).buffers;
}

template <class F>
static auto with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::bfloat16: return f(BFloat16{});
    case Dtype::float16: return f(Float16{});
    default: return f(Float32{});
  }
}

// Base is the live dtype, or the fp32 master of a 16-bit one.
template <class F>
static void with_dtypes(const Segment& s, F&& f) {
  with_dtype(s.live_dtype, [&](auto live) {
    if (s.base_dtype == s.live_dtype)
      f(live, live);
    else
      f(live, Float32{});
  });
}

static bool same_noise(const PerturbCall& a, const PerturbCall& b) {
  return a.noise == b.noise && a.source.seed == b.source.seed &&
         a.source.purpose == b.source.purpose && a.source.row == b.source.row;
}

template <class L>
struct Exports {
  static void free_scratch(Scratch* scratch) {
    if (!scratch) return;
    Buffers& b = buffers_of(*scratch);
    free(b.streams);
    free(b.tables);
    free(scratch);
  }

  static Scratch* make_scratch(const UpdateCall* update) {
    using Tables = HadamardTables<L>;
    void* memory = aligned_alloc(64, (sizeof(TargetScratch) + 63) / 64 * 64);
    if (!memory) return nullptr;
    Scratch* scratch = static_cast<TargetScratch*>(memory);
    Buffers& b = buffers_of(*scratch);
    b.streams = nullptr;
    b.tables = nullptr;
    b.ready = false;
    if (!update) return scratch;
    const size_t count = static_cast<size_t>(update->count);
    b.streams = static_cast<Stream*>(malloc(sizeof(Stream) * count + 1));
    const bool tables = update->noise == Noise::hadamard;
    if (tables)
      b.tables =
          static_cast<int32_t*>(aligned_alloc(64, (4 * Tables::words * count + 64) / 64 * 64));
    if (!b.streams || (tables && !b.tables)) {
      free_scratch(scratch);
      return nullptr;
    }
    b.table_base = 0;
    for (int g = 0; tables && g < update->count; ++g)
      b.table_base +=
          Tables::fill(update->hadamard_coefficients + 32 * g, b.tables + Tables::words * g);
    return scratch;
  }

  static void perturb(const Segment& s, const Chunk& c, const PerturbCall& call, Scratch& scratch) {
    Buffers& buffers = buffers_of(scratch);
    with_dtypes(s, [&](auto live, auto base) {
      for_blocks(s, c, buffers.gathered, true, [&](const Block& b) {
        const Ahead ahead = ahead_of(s, b, false);
        const float* noise = fill_noise<L>(call, s.tensor, b, ahead, buffers);
        perturb_all<L, decltype(live), decltype(base)>(b, noise, call.scale);
      });
    });
  }

  // The noise of a block's two members is made once where they mirror each other.
  static size_t exchange(const Segment& s, const Chunk& c, const PerturbCall* old,
                         const uint8_t* from, const PerturbCall* next, uint8_t* to,
                         Scratch& scratch) {
    Buffers& buffers = buffers_of(scratch);
    const uint8_t* start = to;
    const bool shared = old && next && same_noise(*old, *next);
    with_dtype(s.live_dtype, [&](auto live) {
      for_blocks(s, c, buffers.gathered, true, [&](const Block& b) {
        const float* noise = nullptr;
        const Ahead ahead = ahead_of(s, b, false);
        if (old) {
          noise = fill_noise<L>(*old, s.tensor, b, ahead, buffers);
          from = restore_recorded<L, decltype(live)>(b, noise, old->scale, from);
        }
        if (!next) return;
        if (!shared) noise = fill_noise<L>(*next, s.tensor, b, old ? Ahead{} : ahead, buffers);
        to = perturb_recorded<L, decltype(live)>(b, noise, next->scale, to);
      });
    });
    return static_cast<size_t>(to - start);
  }

  static uint64_t update(const Segment& s, const Chunk& c, const UpdateCall& call,
                         Scratch& scratch) {
    Buffers& u = buffers_of(scratch);
    const Rule rule{call.decay, call.strength, call.stochastic};
    const bool random = call.stochastic && s.base_dtype != Dtype::float32;
    uint64_t saturated = 0;
    u.ready = false;
    with_dtypes(s, [&](auto live, auto base) {
      for_blocks(s, c, u.gathered, true, [&](const Block& b) {
        const Ahead ahead = ahead_of(s, b, call.decay != Decay::none);
        const float* acc = add_noise<L>(call, s.tensor, b, ahead, u);
        if (random) {
          const uint32_t high = static_cast<uint32_t>(b.index >> 35);
          const Stream bits = make_stream(call.rounding_seed, high, s.tensor, 1u << 24);
          philox_words<L>(bits, static_cast<uint32_t>(b.tile() * (kTile / 8)),
                          b.tiles() * (kTile / 8), u.random);
        }
        if (call.decay != Decay::none)
          with_dtype(s.anchor_dtype, [&](auto anchor) {
            widen_all<L, decltype(anchor)>(b.anchor, b.count, u.anchor);
          });
        saturated += update_all<L, decltype(live), decltype(base)>(b, acc, u, rule);
      });
    });
    return saturated;
  }

  static void capture(const Segment& s, const Chunk& c) {
    uint8_t gathered[4 * kBlock];
    with_dtypes(s, [&](auto live, auto base) {
      for_blocks(s, c, gathered, false,
                 [&](const Block& b) { capture_all<decltype(live), decltype(base)>(b); });
    });
  }

  static void refresh(const Segment& s, const Chunk& c) {
    uint8_t gathered[4 * kBlock];
    with_dtypes(s, [&](auto live, auto base) {
      for_blocks(s, c, gathered, true,
                 [&](const Block& b) { copy_all<L, decltype(live), decltype(base)>(b); });
    });
  }

  static uint64_t checksum(const Segment& s, const Chunk& c) {
    uint8_t gathered[4 * kBlock];
    uint64_t sum = 0;
    with_dtype(s.live_dtype, [&](auto live) {
      for_blocks(s, c, gathered, false,
                 [&](const Block& b) { sum += hash_all<L, decltype(live)>(s.tensor, b); });
    });
    return sum;
  }

  static void reveal(const PerturbCall& call, uint32_t tensor, uint64_t first, uint64_t count,
                     float* out, Scratch& scratch) {
    Segment s{};
    s.live = s.base = reinterpret_cast<uint64_t>(out);
    s.live_column_stride = 1;
    s.rows = 1;
    s.cols = count;
    s.origin = first;
    s.tensor = tensor;
    const Chunk all{0, 1, 0, 0, count};
    for_blocks(s, all, nullptr, true, [&](const Block& b) {
      const float* noise = fill_noise<L>(call, tensor, b, {}, buffers_of(scratch));
      for (int i = 0; i < b.count; ++i)
        reinterpret_cast<float*>(b.live)[i] = call.scale < 0 ? -noise[i] : noise[i];
    });
  }

  static constexpr Target table(const char* name) {
    return {name,   make_scratch, free_scratch, perturb,  exchange,
            update, capture,      refresh,      checksum, reveal};
  }
};

}  // namespace ESFAST_LANES
}  // namespace esfast
