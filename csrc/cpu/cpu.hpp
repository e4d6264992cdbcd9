// The CPU half of the core: a whole model in one call, split over threads, on the best target.
#pragma once

#include <string>
#include <vector>

#include "target.hpp"

namespace esfast {

struct Table {
  std::vector<Segment> segments;
  std::vector<Chunk> chunks;
};

// What rounding loses between a perturbation in place and its restore, chunk by chunk, together
// with the perturbation itself, so that the two can never disagree.
struct Records {
  std::vector<std::vector<uint8_t>> chunks;
  PerturbCall call{};
  bool active = false;
  uint64_t bytes() const;
};

namespace cpu {

std::vector<std::string> targets();        // what this processor can run, best first
const Target& target();                    // ESFAST_TARGET, else the best
void set_target(const std::string& name);  // throws std::invalid_argument naming what there is

// threads < 1 means one a core. All of these leave the weights as they were when they throw.
void perturb(const Table&, const PerturbCall&, int threads);
// Takes back the member that the records hold, if any, in the same pass. A record that finds no
// memory leaves the weights restored.
void perturb(const Table&, const PerturbCall&, Records&, int threads);
void restore(const Table&, Records&, int threads);
void capture(const Table&, int threads);  // base = live
void refresh(const Table&, int threads);  // live = round(base)
uint64_t update(const Table&, const UpdateCall&, int threads);
uint64_t checksum(const Table&, int threads);
// Bytes of records that the perturbation would leave, from every `stride`-th chunk.
uint64_t expected_record_bytes(const Table&, const PerturbCall&, int stride, int threads);
void reveal(const PerturbCall&, uint32_t tensor, uint64_t first, uint64_t count, float* out);

}  // namespace cpu
}  // namespace esfast
