// Chunks over threads. Which thread takes which chunk never touches a result: no reduction across
// threads reaches a weight, and the checksum is a sum of integers.
#include <atomic>
#include <memory>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "../float_environment.hpp"
#include "cpu.hpp"

namespace esfast {

uint64_t Records::bytes() const {
  uint64_t sum = chunks.capacity() * sizeof(std::vector<uint8_t>);
  for (const auto& chunk : chunks) sum += chunk.capacity();
  return sum;
}

namespace cpu {
namespace {

struct FreeScratch {
  const Target* target;
  void operator()(Scratch* s) const { target->free_scratch(s); }
};
using OwnedScratch = std::unique_ptr<Scratch, FreeScratch>;

size_t thread_count(const Table& table, int asked) {
  const size_t cores = std::thread::hardware_concurrency();
  const size_t wanted = asked > 0 ? static_cast<size_t>(asked) : (cores ? cores : 1);
  const size_t useful = table.chunks.empty() ? 1 : table.chunks.size();
  return wanted < useful ? wanted : useful;
}

// Scratch for every thread is made before any weight is touched.
std::vector<OwnedScratch> make_scratch(const Target& t, size_t count, const UpdateCall* update) {
  std::vector<OwnedScratch> all;
  for (size_t i = 0; i < count; ++i) {
    all.emplace_back(t.make_scratch(update), FreeScratch{&t});
    if (!all.back()) throw std::bad_alloc();
  }
  return all;
}

// Calls work(chunk number, thread number) for every stride-th chunk. A thread that the system
// refuses is done without: the others take its chunks.
template <class Work>
void for_chunks(const Table& table, size_t threads, size_t stride, const Work& work) {
  std::atomic<size_t> next{0};
  const auto run = [&](size_t thread) {
    const DefaultFloats floats;
    for (size_t i; (i = next.fetch_add(stride)) < table.chunks.size();) work(i, thread);
  };
  std::vector<std::thread> others;
  others.reserve(threads);
  for (size_t thread = 1; thread < threads; ++thread) {
    try {
      others.emplace_back(run, thread);
    } catch (const std::system_error&) {
      break;
    }
  }
  run(0);
  for (auto& other : others) other.join();
}

size_t longest_record(const Table& table) {
  size_t longest = 0;
  for (const Chunk& c : table.chunks) {
    const size_t bound = record_bound(table.segments[c.segment], c);
    longest = bound > longest ? bound : longest;
  }
  return longest;
}

std::vector<std::unique_ptr<uint8_t[]>> record_buffers(const Table& table, size_t threads) {
  std::vector<std::unique_ptr<uint8_t[]>> buffers;
  const size_t bound = longest_record(table);
  for (size_t i = 0; i < threads; ++i) buffers.emplace_back(new uint8_t[bound]);
  return buffers;
}

void restore_chunks(const Table& table, Records& records,
                    const std::vector<OwnedScratch>& scratch) {
  const Target& t = target();
  for_chunks(table, scratch.size(), 1, [&](size_t i, size_t thread) {
    if (records.chunks[i].empty()) return;
    const Chunk& c = table.chunks[i];
    t.restore(table.segments[c.segment], c, records.call, *scratch[thread],
              records.chunks[i].data());
    records.chunks[i].clear();
  });
  records.active = false;
}

}  // namespace

void perturb(const Table& table, const PerturbCall& call, int threads) {
  const Target& t = target();
  const auto scratch = make_scratch(t, thread_count(table, threads), nullptr);
  for_chunks(table, scratch.size(), 1, [&](size_t i, size_t thread) {
    const Chunk& c = table.chunks[i];
    t.perturb(table.segments[c.segment], c, call, *scratch[thread]);
  });
}

// A chunk whose record finds no memory is put back from the buffer at once; then all the others.
void perturb(const Table& table, const PerturbCall& call, Records& records, int threads) {
  if (records.active) throw std::logic_error("the weights are perturbed already");
  const Target& t = target();
  const auto scratch = make_scratch(t, thread_count(table, threads), nullptr);
  const auto buffers = record_buffers(table, scratch.size());
  records.chunks.resize(table.chunks.size());
  records.call = call;
  std::atomic<bool> short_of_memory{false};
  records.active = true;
  for_chunks(table, scratch.size(), 1, [&](size_t i, size_t thread) {
    if (short_of_memory) return;
    const Chunk& c = table.chunks[i];
    const Segment& s = table.segments[c.segment];
    uint8_t* buffer = buffers[thread].get();
    const size_t size = t.perturb_recorded(s, c, call, *scratch[thread], buffer);
    try {
      records.chunks[i].assign(buffer, buffer + size + kRecordSlack);
    } catch (const std::bad_alloc&) {
      t.restore(s, c, call, *scratch[thread], buffer);
      records.chunks[i].clear();
      short_of_memory = true;
    }
  });
  if (!short_of_memory) return;
  restore_chunks(table, records, scratch);
  throw std::bad_alloc();
}

void restore(const Table& table, Records& records, int threads) {
  if (!records.active) return;
  restore_chunks(table, records, make_scratch(target(), thread_count(table, threads), nullptr));
}

void refresh(const Table& table, int threads) {
  const Target& t = target();
  for_chunks(table, thread_count(table, threads), 1, [&](size_t i, size_t) {
    const Chunk& c = table.chunks[i];
    t.refresh(table.segments[c.segment], c);
  });
}

void capture(const Table& table, int threads) {
  const Target& t = target();
  for_chunks(table, thread_count(table, threads), 1, [&](size_t i, size_t) {
    const Chunk& c = table.chunks[i];
    t.capture(table.segments[c.segment], c);
  });
}

uint64_t update(const Table& table, const UpdateCall& call, int threads) {
  const Target& t = target();
  const auto scratch = make_scratch(t, thread_count(table, threads), &call);
  std::atomic<uint64_t> saturated{0};
  for_chunks(table, scratch.size(), 1, [&](size_t i, size_t thread) {
    const Chunk& c = table.chunks[i];
    saturated += t.update(table.segments[c.segment], c, call, *scratch[thread]);
  });
  return saturated;
}

uint64_t checksum(const Table& table, int threads) {
  const Target& t = target();
  std::atomic<uint64_t> sum{0};
  for_chunks(table, thread_count(table, threads), 1, [&](size_t i, size_t) {
    const Chunk& c = table.chunks[i];
    sum += t.checksum(table.segments[c.segment], c);
  });
  return sum;
}

uint64_t expected_record_bytes(const Table& table, const PerturbCall& call, int stride,
                               int threads) {
  const Target& t = target();
  const auto scratch = make_scratch(t, thread_count(table, threads), nullptr);
  const auto buffers = record_buffers(table, scratch.size());
  std::atomic<uint64_t> bytes{0}, sampled{0}, all{0};
  for (const Chunk& c : table.chunks) all += c.rows * c.columns;
  for_chunks(table, scratch.size(), static_cast<size_t>(stride), [&](size_t i, size_t thread) {
    const Chunk& c = table.chunks[i];
    const Segment& s = table.segments[c.segment];
    uint8_t* buffer = buffers[thread].get();
    bytes += t.perturb_recorded(s, c, call, *scratch[thread], buffer);
    t.restore(s, c, call, *scratch[thread], buffer);
    sampled += c.rows * c.columns;
  });
  if (sampled == 0) return 0;
  return static_cast<uint64_t>(static_cast<double>(bytes) * static_cast<double>(all) /
                               static_cast<double>(sampled));
}

void reveal(const PerturbCall& call, uint32_t tensor, uint64_t first, uint64_t count, float* out) {
  const DefaultFloats floats;
  const Target& t = target();
  const auto scratch = make_scratch(t, 1, nullptr);
  t.reveal(call, tensor, first, count, out, *scratch.front());
}

}  // namespace cpu
}  // namespace esfast
