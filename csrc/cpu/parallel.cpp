// Chunks over threads. Which thread takes which chunk never touches a result: no reduction across
// threads reaches a weight, and the checksum is a sum of integers.
#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <new>
#include <thread>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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
  all.reserve(count);  // first: growth that fails would lose the one in hand
  for (size_t i = 0; i < count; ++i) {
    all.emplace_back(t.make_scratch(update), FreeScratch{&t});
    if (!all.back()) throw std::bad_alloc();
  }
  return all;
}

// Calls work(chunk number, thread number) for every stride-th chunk. A thread that the system
// refuses, or has no memory for, is done without: the others take its chunks.
template <class Work>
void for_chunks(const Table& table, size_t threads, size_t stride, const Work& work) {
  std::atomic<size_t> next{0};
  const auto run = [&](size_t thread) {
    const DefaultFloats floats;
    for (size_t i; (i = next.fetch_add(stride)) < table.chunks.size();) work(i, thread);
  };
  std::vector<std::thread> others;
  try {
    others.reserve(threads);
    for (size_t thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
  } catch (const std::exception&) {
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
  buffers.reserve(threads);
  const size_t bound = longest_record(table);
  for (size_t i = 0; i < threads; ++i) buffers.emplace_back(new uint8_t[bound]);
  return buffers;
}

// Gives back the pages of a mapped anchor that the chunks from first to last of a segment made
// resident: clean ones of a file, read again from the page cache by whoever still needs them. Linux
// maps the aligned 64 KiB around a fault, so those go as well, as far as the mapping reaches.
void give_back([[maybe_unused]] const Segment& s, [[maybe_unused]] const Chunk& first,
               [[maybe_unused]] const Chunk& last) {
#if defined(__linux__)
  if (s.anchor_map == 0) return;
  constexpr uint64_t around = 1u << 16;
  const uint64_t bytes = static_cast<uint64_t>(bytes_of(s.anchor_dtype));
  const uint64_t stride = static_cast<uint64_t>(s.anchor_row_stride);
  const uint64_t from = s.anchor + (first.row * stride + first.column) * bytes;
  const uint64_t last_row = last.row + last.rows - 1;
  const uint64_t to = s.anchor + (last_row * stride + last.column + last.columns) * bytes;
  const uint64_t begin = std::max(from / around * around, s.anchor_map);
  const uint64_t end = std::min((to + around - 1) / around * around, s.anchor_map_end);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
#endif
}

// Gives a mapped anchor back behind the threads of one pass; its owner does so with the last
// chunks. Chunk by chunk, system calls and second faults took 11 % of an update of one member.
struct AnchorPages {
  const Table& table;
  size_t threads;
  std::atomic<size_t> given{0};  // the first chunk that is not given back yet

  void after(size_t chunk) {
    constexpr size_t together = 16;  // 4 MB of fp32
    const Chunk& own = table.chunks[chunk];
    if (chunk < given) give_back(table.segments[own.segment], own, own);  // a thread left behind
    const size_t begun = chunk + 1, behind = together + threads;
    if (begun % together != 0 || begun < behind) return;
    const size_t end = begun - behind;
    for (size_t was = given; was < end && !given.compare_exchange_weak(was, end);) {
    }
    give_back_run(end < together ? 0 : end - together, end);
  }

  void give_back_run(size_t i, size_t end) const {
    while (i < end) {
      const Chunk& first = table.chunks[i];
      while (i < end && table.chunks[i].segment == first.segment) ++i;
      give_back(table.segments[first.segment], first, table.chunks[i - 1]);
    }
  }
};

void restore_chunks(const Table& table, Records& records,
                    const std::vector<OwnedScratch>& scratch) {
  const Target& t = target();
  for_chunks(table, scratch.size(), 1, [&](size_t i, size_t thread) {
    std::vector<uint8_t>& record = records.chunks[i];
    if (record.empty()) return;
    const Chunk& c = table.chunks[i];
    t.exchange(table.segments[c.segment], c, &records.call, record.data(), nullptr, nullptr,
               *scratch[thread]);
    record.clear();
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
  const Target& t = target();
  const auto scratch = make_scratch(t, thread_count(table, threads), nullptr);
  const auto buffers = record_buffers(table, scratch.size());
  records.chunks.resize(table.chunks.size());
  const PerturbCall before = records.call;
  const PerturbCall* old = records.active ? &before : nullptr;
  records.call = call;
  std::atomic<bool> short_of_memory{false};
  records.active = true;
  for_chunks(table, scratch.size(), 1, [&](size_t i, size_t thread) {
    const Chunk& c = table.chunks[i];
    const Segment& s = table.segments[c.segment];
    const PerturbCall* next = short_of_memory ? nullptr : &call;
    uint8_t* buffer = buffers[thread].get();
    std::vector<uint8_t>& record = records.chunks[i];
    const size_t size = t.exchange(s, c, old, record.data(), next, buffer, *scratch[thread]);
    if (!next) return record.clear();
    try {
      record.assign(buffer, buffer + size + kRecordSlack);
    } catch (const std::bad_alloc&) {
      t.exchange(s, c, next, buffer, nullptr, nullptr, *scratch[thread]);
      record.clear();
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
  AnchorPages pages{table, scratch.size()};
  std::atomic<uint64_t> saturated{0};
  for_chunks(table, scratch.size(), 1, [&](size_t i, size_t thread) {
    const Chunk& c = table.chunks[i];
    saturated += t.update(table.segments[c.segment], c, call, *scratch[thread]);
    if (call.decay != Decay::none) pages.after(i);
  });
  return saturated;
}

uint64_t checksum(const Table& table, int threads) {
  const Target& t = target();
  AnchorPages pages{table, thread_count(table, threads)};
  std::atomic<uint64_t> sum{0};
  for_chunks(table, pages.threads, 1, [&](size_t i, size_t) {
    const Chunk& c = table.chunks[i];
    const Segment& s = table.segments[c.segment];
    sum += t.checksum(s, c);
    if (s.live == s.anchor) pages.after(i);  // the checksum of an anchor
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
  const size_t every = static_cast<size_t>(stride), count = table.chunks.size();
  for_chunks(table, scratch.size(), every, [&](size_t i, size_t thread) {
    const size_t moved = i + i / every * 7 % every;  // or a layout that repeats would be seen askew
    const Chunk& c = table.chunks[moved < count ? moved : i];
    const Segment& s = table.segments[c.segment];
    uint8_t* buffer = buffers[thread].get();
    bytes += t.exchange(s, c, nullptr, nullptr, &call, buffer, *scratch[thread]);
    t.exchange(s, c, &call, buffer, nullptr, nullptr, *scratch[thread]);
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
