// The functions that one CPU target exports: each handles one chunk, on the calling thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../segments.hpp"

namespace esfast {

// One noise source of a call: a member, or a Hadamard group.
struct Source {
  uint64_t seed;
  uint32_t purpose;   // counter word 3: purpose << 24 | index
  uint32_t row;       // Hadamard: the member's row of the matrix, as bits
  float coefficient;  // of an update
};

struct PerturbCall {
  Noise noise;
  Source source;
  float scale;
};

struct UpdateCall {
  Noise noise;
  const Source* sources;
  int count;
  const int32_t* hadamard_coefficients;  // [count][32]
  float hadamard_scale;
  Decay decay;
  float strength;
  bool stochastic;
  uint64_t rounding_seed;
};

// Buffers that one thread uses for all its chunks of a call.
struct Scratch;

struct Target {
  const char* name;
  Scratch* (*make_scratch)(const UpdateCall* update);  // nullptr where memory is short
  void (*free_scratch)(Scratch*);
  // live = round(base + scale * eps); base may be live itself.
  void (*perturb)(const Segment&, const Chunk&, const PerturbCall&, Scratch&);
  // In place: takes back `old`, if any, by its record `from`; then applies `next`, if any, writes
  // its exceptions to `to` (record_bound bytes) and returns their size. A weight is read and
  // written once.
  size_t (*exchange)(const Segment&, const Chunk&, const PerturbCall* old, const uint8_t* from,
                     const PerturbCall* next, uint8_t* to, Scratch&);
  // Returns how many weights saturated.
  uint64_t (*update)(const Segment&, const Chunk&, const UpdateCall&, Scratch&);
  void (*capture)(const Segment&, const Chunk&);  // base = live
  void (*refresh)(const Segment&, const Chunk&);  // live = round(base)
  uint64_t (*checksum)(const Segment&, const Chunk&);
  void (*reveal)(const PerturbCall&, uint32_t tensor, uint64_t first, uint64_t count, float* out,
                 Scratch&);
};

// A vector may be read or written past a record's end.
constexpr size_t kRecordSlack = 64;

// Upper bound of a chunk's record: a 64-bit mask a group of 64 or fewer, every weight, the slack.
size_t record_bound(const Segment&, const Chunk&);

extern const Target scalar_target, avx2_target, avx512_target, neon_target;

}  // namespace esfast
