// The core without Python: known answers on every target, then random tables, dtypes and settings.
//
//   check ANSWERS ROUNDS
//
// ANSWERS has a line an answer, with tensor ids for names (tests/test_native.py writes it). Prints
// a line a target: its name and a digest of every weight that the random rounds produced, which
// must be the same on every target and machine. Buffers are exactly as large as their tensors, so
// that the address sanitizer sees a byte too far.
#include <atomic>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <new>
#include <sstream>
#include <string>
#include <vector>

#include "../../csrc/cpu/cpu.hpp"
#include "../../csrc/population.hpp"

using namespace esfast;

namespace {

std::atomic<int64_t> allocations_left{INT64_MAX};  // then there is no memory

}  // namespace

void* operator new(size_t size) {
  void* memory = allocations_left-- > 0 ? std::malloc(size ? size : 1) : nullptr;
  if (!memory) throw std::bad_alloc();
  return memory;
}
void* operator new(size_t size, const std::nothrow_t&) noexcept {
  return std::malloc(size ? size : 1);
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, size_t) noexcept {
  std::free(memory);
}

namespace {

[[noreturn]] void fail(const std::string& what) {
  std::printf("FAILED on %s: %s\n", cpu::target().name, what.c_str());
  std::exit(1);
}

struct Random {  // xorshift64*, so that every machine draws the same rounds
  uint64_t state;
  uint64_t next() {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545F4914F6CDD1Dull;
  }
  uint64_t below(uint64_t n) { return next() % n; }
};

float show(Noise noise, uint64_t seed, uint32_t index, uint32_t tensor, uint64_t element) {
  const uint64_t before = element < 300 ? element : 300;
  std::vector<float> values(before + 1);
  const PerturbCall call{noise, make_source(noise, {seed, 1, index}), 1.0f};
  cpu::reveal(call, tensor, element - before, before + 1, values.data());
  return values.back();
}

void check_answer(const std::string& line) {
  std::istringstream in(line);
  std::string kind, seed, value;
  uint32_t tensor = 0, index = 0;
  uint64_t element = 0;
  in >> kind >> seed >> tensor >> index >> element >> value;
  const Noise noise = kind == "gaussian"     ? Noise::gaussian
                      : kind == "rademacher" ? Noise::rademacher
                                             : Noise::hadamard;
  const float wanted = std::strtof(value.c_str(), nullptr);
  const float got = show(noise, std::stoull(seed, nullptr, 16), index, tensor, element);
  if (got != wanted) fail(line + " gave " + std::to_string(got));
}

// One random tensor: a piece of a canonical one, in a buffer of its own, column stride 1 to 3.
struct Tensor {
  Segment segment{};
  std::vector<uint8_t> live, base, anchor;
};

uint32_t weight_bits(Random& random, Dtype dtype) {
  const uint32_t bits = static_cast<uint32_t>(random.next() >> 32);
  if (random.below(8) == 0) return bits;  // anything: NaN, infinity, subnormal, huge
  const uint32_t near_one = 0x3A000000u + bits % 0x06000000u, sign = bits & 0x80000000u;
  if (dtype == Dtype::float32) return near_one | sign;
  if (dtype == Dtype::bfloat16) return (near_one | sign) >> 16;
  return (0x1000u + (bits & 0x2FFFu)) | (bits >> 16 & 0x8000u);
}

void fill(std::vector<uint8_t>& bytes, uint64_t count, Dtype dtype, Random& random) {
  const size_t size = static_cast<size_t>(bytes_of(dtype));
  bytes.resize(count * size);
  for (uint64_t i = 0; i < count; ++i) {
    const uint32_t bits = weight_bits(random, dtype);
    std::memcpy(bytes.data() + i * size, &bits, size);
  }
}

Tensor make_tensor(Random& random, uint32_t tensor) {
  Tensor t;
  Segment& s = t.segment;
  s.tensor = tensor;
  s.live_dtype = s.base_dtype = static_cast<Dtype>(random.below(3));
  s.anchor_dtype = static_cast<Dtype>(random.below(3));
  s.rows = 1 + random.below(5);
  s.cols = 1 + random.below(random.below(4) ? 300 : 5000);
  s.live_column_stride = static_cast<int64_t>(1 + random.below(3));
  s.live_row_stride = static_cast<int64_t>(s.cols) * s.live_column_stride;
  s.canonical_row_stride = s.cols + random.below(100);
  s.origin = random.below(4) ? random.below(1000) : (1ull << 34) - random.below(2000);
  s.anchor_row_stride = static_cast<int64_t>(s.cols);
  const uint64_t last = (s.rows - 1) * static_cast<uint64_t>(s.live_row_stride) +
                        (s.cols - 1) * static_cast<uint64_t>(s.live_column_stride);
  fill(t.live, last + 1, s.live_dtype, random);
  fill(t.anchor, s.rows * s.cols, s.anchor_dtype, random);
  return t;
}

using Model = std::vector<Tensor>;

// memory: 0 lean, 1 shadow, 2 master
Table make_table(Model& model, int memory) {
  Table table;
  for (Tensor& t : model) {
    Segment& s = t.segment;
    s.live = reinterpret_cast<uint64_t>(t.live.data());
    s.anchor = reinterpret_cast<uint64_t>(t.anchor.data());
    s.base_dtype = memory == 2 ? Dtype::float32 : s.live_dtype;
    s.base_row_stride = static_cast<int64_t>(s.cols);
    if (memory) t.base.resize(s.rows * s.cols * static_cast<size_t>(bytes_of(s.base_dtype)));
    s.base = memory ? reinterpret_cast<uint64_t>(t.base.data()) : s.live;
    table.segments.push_back(s);
  }
  table.chunks = split(table.segments);
  if (memory) cpu::capture(table, 2);
  return table;
}

std::vector<std::vector<uint8_t>> bytes_of(const Model& model) {
  std::vector<std::vector<uint8_t>> all;
  for (const Tensor& t : model) all.push_back(t.live);
  return all;
}

UpdateCall update_call(const Terms& terms, Noise noise, Random& random) {
  const Decay decay = static_cast<Decay>(random.below(3));
  return {noise,
          terms.sources.data(),
          static_cast<int>(terms.sources.size()),
          terms.hadamard_coefficients.data(),
          terms.hadamard_scale,
          decay,
          decay == Decay::l2 ? 0.99f : 1e-3f,
          random.below(4) != 0,
          random.next()};
}

Terms random_terms(Noise noise, Random& random) {
  std::vector<MemberSpec> members;
  std::vector<double> coefficients;
  const uint64_t count = random.below(70), shared = random.next();
  for (uint64_t n = 0; n < count; ++n) {
    const uint64_t seed = noise == Noise::hadamard ? shared : random.below(1u << 20) + (n << 20);
    members.push_back({seed, random.below(2) ? 1 : -1, static_cast<uint32_t>(n)});
    coefficients.push_back((static_cast<double>(random.below(2001)) - 1000.0) * 1e-6);
  }
  return make_terms(noise, members, coefficients);
}

uint64_t digest_of(uint64_t digest, const Model& model) {
  for (const Tensor& t : model)
    for (uint8_t byte : t.live) digest = (digest ^ byte) * 0x100000001B3ull;  // FNV-1a
  return digest;
}

// One member for the next in a pass, as in a generation: a mirrored one or another.
void check_exchange(const Table& table, const Model& model, const PerturbCall& call,
                    Records& records, Random& random, int threads) {
  PerturbCall next{call.noise, call.source, -call.scale};
  if (random.below(2)) {
    next.noise = static_cast<Noise>(random.below(kNoises));
    next.source = make_source(next.noise, {random.next(), 1, 7});
  }
  cpu::perturb(table, next, records, threads);
  const auto exchanged = bytes_of(model);
  cpu::restore(table, records, threads);
  cpu::perturb(table, next, records, threads);
  if (bytes_of(model) != exchanged) fail("an exchange gave other bits than a perturbation");
}

// Whether `call` ends for want of memory, somewhere in its first allocations.
template <class Call>
bool runs_out(Random& random, Call&& call) {
  allocations_left = static_cast<int64_t>(random.below(12));
  bool out = false;
  try {
    call();
  } catch (const std::bad_alloc&) {
    out = true;
  }
  allocations_left = INT64_MAX;
  return out;
}

// Memory that ends anywhere leaves the old member applied or none.
void check_shortage(const Table& table, const Model& model, PerturbCall call, Records& records,
                    Random& random, int threads) {
  const auto applied = bytes_of(model);
  call.scale = 10.0f;  // so that records outgrow the memory that they have
  const auto perturb = [&] { cpu::perturb(table, call, records, threads); };
  if (runs_out(random, perturb) && records.active && bytes_of(model) != applied)
    fail("without memory for another the member was changed");
}

uint64_t round_trip(Random& random, int memory, uint64_t digest) {
  Model model;
  const uint64_t tensors = 1 + random.below(4);
  for (uint32_t i = 0; i < tensors; ++i) model.push_back(make_tensor(random, i * 77 + 5));
  const Table table = make_table(model, memory);
  const auto before = bytes_of(model);
  const Noise noise = static_cast<Noise>(random.below(kNoises));
  const MemberSpec member{random.next(), 1, static_cast<uint32_t>(random.below(100))};
  const float scales[4] = {1e-3f, -3e-2f, 1e-8f, 10.0f};
  const PerturbCall call{noise, make_source(noise, member), scales[random.below(4)]};
  const int threads = static_cast<int>(1 + random.below(3));
  Records records;
  if (memory)
    cpu::perturb(table, call, threads);
  else
    cpu::perturb(table, call, records, threads);
  digest = digest_of(digest, model) ^ cpu::checksum(table, threads);
  if (memory) {
    cpu::refresh(table, threads);
  } else {
    check_exchange(table, model, call, records, random, threads);
    check_shortage(table, model, call, records, random, threads);
    cpu::restore(table, records, threads);
  }
  if (bytes_of(model) != before) fail("restore left other bits");
  const Terms terms = random_terms(noise, random);
  const UpdateCall step = update_call(terms, noise, random);
  const auto update = [&] { cpu::update(table, step, threads); };
  if (runs_out(random, update)) {
    if (bytes_of(model) != before) fail("an update without memory changed the weights");
    update();
  }
  return digest_of(digest, model);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  for (const std::string& name : cpu::targets()) {
    cpu::set_target(name);
    std::ifstream answers(arguments[1]);
    int checked = 0;
    for (std::string line; std::getline(answers, line); ++checked) check_answer(line);
    if (checked == 0) fail("no answers in the file");
    uint64_t digest = 0xCBF29CE484222325ull;
    Random random{20240607};
    for (int i = 0; i < std::atoi(arguments[2]); ++i) digest = round_trip(random, i % 3, digest);
    std::printf("%s %016" PRIx64 "\n", name.c_str(), digest);
  }
  return 0;
}
