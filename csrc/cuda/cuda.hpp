// The CUDA half of the core: a whole model in one launch on the caller's stream.
//
// Nothing here allocates device memory, synchronises or keeps a pointer: the caller owns every
// buffer, and keeps it until the stream has passed. Arguments travel as kernel parameters, which a
// launch (or a graph's capture of it) copies, never from host memory that could be gone when they
// are read. Each call makes the table's device current and puts the caller's back. Not yet run on a
// GPU.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../population.hpp"
#include "mapping.hpp"

namespace esfast::cuda {

// What a call came to; `message` is empty where it went well.
struct Status {
  std::string message;
  bool ok() const { return message.empty(); }
};

// A table's spans in device memory, and where the work is queued.
struct Place {
  uint64_t spans;
  uint32_t count, tiles;
  int device;
  uint64_t stream;  // cudaStream_t
};

// Lean memory's buffers in device memory (tiles.hpp); demand: one 64-bit word.
struct Buffers {
  uint64_t marks, offsets, values, demand;
  uint64_t capacity;  // of values, in words of 4 bytes
  uint32_t slab;      // words that a warp reserves at least
};

std::vector<std::string> devices();  // empty without a driver
// Loads every kernel, so that the first launch may be inside a graph's capture.
Status prepare(int device);
// Warps that a launch of lean memory's perturbation keeps on the device at once; 0 on errors.
int warps(int device);

Status perturb(const Place&, const PerturbCall&);
// Of every `stride`-th tile. Zeroes `demand` first. With no capacity it counts and edits nothing.
Status record(const Place&, const PerturbCall&, const Buffers&, uint32_t stride);
Status restore(const Place&, const PerturbCall&, const Buffers&);
Status capture(const Place&);                 // base = live
Status refresh(const Place&);                 // live = round(base)
Status checksum(const Place&, uint64_t sum);  // sum: one 64-bit word, zeroed first

// Bytes of device memory that `update` needs for its members; they are told to the device anew by
// each call. `saturated` is one 64-bit word, added to.
uint64_t update_bytes(const UpdateCall&);
Status update(const Place&, const UpdateCall&, uint64_t workspace, uint64_t saturated);

// The square roots of `count` fp32 numbers with consecutive bits, as the noise takes them: for a
// test.
Status roots(int device, uint64_t stream, uint32_t first, uint64_t count, uint64_t out);
// The same numbers rounded to bf16, as weights are: `count` is a multiple of 8.
Status roundings(int device, uint64_t stream, uint32_t first, uint64_t count, uint64_t out);

// Rewards to fitness on the device (shaping.hpp has the formulas), the bits of the CPU's.
// rewards: [population, prompts] doubles, row-major; prompts is 1 but for group_centered.
// workspace: doubles, shape_doubles(...) of them.
enum class Shaping : int32_t {
  rank = 0,
  z_score = 1,
  centered_rank = 2,
  raw = 3,
  group_centered = 4
};
uint64_t shape_doubles(uint64_t population, uint64_t prompts);
Status shape(Shaping, int device, uint64_t stream, uint64_t rewards, uint64_t population,
             uint64_t prompts, uint64_t workspace, uint64_t fitness);

}  // namespace esfast::cuda
