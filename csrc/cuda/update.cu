// The update of a whole population in one pass; each weight is read once and written once.
//
// Gaussian updates wait for arithmetic (about 30 instructions a normal), Hadamard updates for
// memory: their sums are look-ups in shared memory, in as many copies of the tables as fit, up to
// one a bank. Groups beyond what shared memory holds (about 50 of 32 members) are looked up in
// global memory.
#include <cstring>

#include "launch.hpp"
#include "tile_loop.hpp"

namespace esfast::cuda {

using namespace device;

namespace {

constexpr int kThreads = 128;
constexpr int kHadamardThreads = 512;   // one block a multiprocessor, which holds the tables
constexpr int kGroupEntries = 4 * 256;  // four bytes of a word
constexpr size_t kGroupBytes = 4 * kGroupEntries;
constexpr int kMostShift = 5;  // 32 copies: a bank a lane

// A small block of words by value: what a launch copies, a graph's capture too.
struct Words {
  uint32_t w[960];
};

__global__ void write_kernel(Words words, uint32_t* to, uint32_t count) {
  for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) to[i] = words.w[i];
}

// Entries of the groups' tables in global memory, where shared memory is too small for them.
__global__ void table_kernel(const int32_t* coefficients, uint32_t entries, int32_t* tables) {
  const uint32_t every = gridDim.x * blockDim.x;
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < entries; i += every)
    tables[i] =
        table_entry(coefficients + i / kGroupEntries * 32, static_cast<int>(i / 256 % 4), i % 256);
}

__device__ __forceinline__ void fill_tables(const int32_t* coefficients, int groups, int shift,
                                            int32_t* tables) {
  const uint32_t copies = 1u << shift;
  for (uint32_t i = threadIdx.x; i < static_cast<uint32_t>(groups) * kGroupEntries;
       i += blockDim.x) {
    const int32_t entry =
        table_entry(coefficients + i / kGroupEntries * 32, static_cast<int>(i / 256 % 4), i % 256);
    for (uint32_t c = 0; c < copies; ++c)  // lanes start at different banks
      tables[i << shift | ((c + threadIdx.x) & (copies - 1))] = entry;
  }
  __syncthreads();
}

template <Noise noise, int threads>
__device__ __forceinline__ void update_all(const Tiles& table, const Step& step,
                                           const Tables& tables, unsigned long long* saturated) {
  uint32_t sum = 0;
  for_tiles<threads>(table, 1, [&](const Span& s, uint32_t tile, uint32_t lane) {
    with_lane(s, tile, lane,
              [&](const auto& units) { sum += update_tile<noise>(s, units, step, tables); });
  });
  if (sum) atomicAdd(saturated, static_cast<unsigned long long>(sum));  // rare: no reduction
}

template <Noise noise>
__global__ void __launch_bounds__(kThreads, 4)
    update_kernel(Tiles table, Step step, unsigned long long* saturated) {
  update_all<noise, kThreads>(table, step, Tables{}, saturated);
}

// `lone`: one group, a copy of its tables a bank, as up to 32 members have where a block is lent
// 130 KB. Known when compiled, that saves a fifteenth of a tile's instructions.
template <bool lone>
__global__ void __launch_bounds__(kHadamardThreads, 1)
    hadamard_kernel(Tiles table, Step step, const int32_t* coefficients, int shift,
                    unsigned long long* saturated) {
  extern __shared__ int32_t tables[];
  if (lone) shift = kMostShift;
  fill_tables(coefficients, lone ? 1 : step.count, shift, tables);
  const uint32_t copy = threadIdx.x & ((1u << shift) - 1);
  update_all<Noise::hadamard, kHadamardThreads>(table, step, Tables{tables, shift, copy, lone},
                                                saturated);
}

// Too many groups for shared memory.
__global__ void __launch_bounds__(kThreads, 3)
    hadamard_global_kernel(Tiles table, Step step, const int32_t* tables,
                           unsigned long long* saturated) {
  update_all<Noise::hadamard, kThreads>(table, step, Tables{tables, 0, 0, false}, saturated);
}

// What the device lends a block beside the warps' spans and the 1 KB that the driver takes of each
// block (nvcc's report counts it to the kernel's own), or 0. The 56 groups of an H200 are as many
// without that 1 KB.
size_t shared_limit(int device) {
  constexpr size_t spans = kHadamardThreads / kWarp * sizeof(Span) + 1024;
  int most = 0;
  if (cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
    return 0;
  return static_cast<size_t>(most) < spans ? 0 : static_cast<size_t>(most) - spans;
}

// As many copies as fit, or -1.
int table_shift(int groups, size_t limit) {
  for (int shift = kMostShift; shift >= 0; --shift)
    if ((static_cast<size_t>(groups) * kGroupBytes << shift) <= limit) return shift;
  return -1;
}

// The workspace: draws, then (Hadamard) the groups' coefficients, then their tables.
std::vector<uint32_t> words_of(const UpdateCall& call) {
  std::vector<uint32_t> words;
  for (int n = 0; n < call.count; ++n) {
    const Draw draw = draw_of(call.sources[n]);
    words.resize(words.size() + sizeof(Draw) / 4);
    std::memcpy(words.data() + words.size() - sizeof(Draw) / 4, &draw, sizeof(Draw));
  }
  if (call.noise == Noise::hadamard)
    for (int i = 0; i < 32 * call.count; ++i)
      words.push_back(static_cast<uint32_t>(call.hadamard_coefficients[i]));
  return words;
}

Status write_words(const Place& place, const std::vector<uint32_t>& words, uint64_t workspace) {
  auto* to = reinterpret_cast<uint32_t*>(workspace);
  constexpr size_t most = sizeof(Words) / 4;
  for (size_t first = 0; first < words.size(); first += most) {
    Words part{};
    const size_t count = words.size() - first < most ? words.size() - first : most;
    for (size_t i = 0; i < count; ++i) part.w[i] = words[first + i];
    write_kernel<<<1, kThreads, 0, reinterpret_cast<cudaStream_t>(place.stream)>>>(
        part, to + first, static_cast<uint32_t>(count));
    const Status status = status_of(cudaGetLastError(), "update (members)");
    if (!status.ok()) return status;
  }
  return {};
}

Status update_hadamard(const Place& place, const Step& step, uint64_t workspace,
                       unsigned long long* saturated) {
  const uint64_t coefficients = workspace + sizeof(Draw) * static_cast<uint64_t>(step.count);
  const auto* ints = reinterpret_cast<const int32_t*>(coefficients);
  const int shift = table_shift(step.count, shared_limit(place.device));
  if (shift >= 0) {
    const size_t bytes = static_cast<size_t>(step.count) * kGroupBytes << shift;
    const Shape shape{kHadamardThreads, bytes};
    constexpr const char* what = "update (Hadamard)";
    if (step.count == 1 && shift == kMostShift)
      return launch<hadamard_kernel<true>>(place, place.tiles, shape, what, tiles_of(place), step,
                                           ints, shift, saturated);
    return launch<hadamard_kernel<false>>(place, place.tiles, shape, what, tiles_of(place), step,
                                          ints, shift, saturated);
  }
  auto* tables = reinterpret_cast<int32_t*>(coefficients + 128 * static_cast<uint64_t>(step.count));
  const uint32_t entries = static_cast<uint32_t>(step.count) * kGroupEntries;
  table_kernel<<<(entries + kThreads - 1) / kThreads, kThreads, 0,
                 reinterpret_cast<cudaStream_t>(place.stream)>>>(ints, entries, tables);
  const Status status = status_of(cudaGetLastError(), "update (Hadamard tables)");
  if (!status.ok()) return status;
  return launch<hadamard_global_kernel>(place, place.tiles, {kThreads, 0}, "update (Hadamard)",
                                        tiles_of(place), step, tables, saturated);
}

}  // namespace

cudaError_t load_update(int device) {
  const int most = static_cast<int>(shared_limit(device));
  constexpr auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  for (const cudaError_t error :
       {cudaFuncSetAttribute(hadamard_kernel<true>, attribute, most),
        cudaFuncSetAttribute(hadamard_kernel<false>, attribute, most),
        load(update_kernel<Noise::gaussian>), load(update_kernel<Noise::rademacher>),
        load(hadamard_kernel<true>), load(hadamard_kernel<false>), load(hadamard_global_kernel),
        load(write_kernel), load(table_kernel)})
    if (error != cudaSuccess) return error;
  return cudaSuccess;
}

uint64_t update_bytes(const UpdateCall& call) {
  const uint64_t count = static_cast<uint64_t>(call.count);
  const uint64_t group = sizeof(Draw) + 128 + kGroupBytes;
  return 16 + count * (call.noise == Noise::hadamard ? group : sizeof(Draw));
}

Status update(const Place& place, const UpdateCall& call, uint64_t workspace, uint64_t saturated) {
  if (place.tiles == 0) return {};
  const DeviceGuard guard(place.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error(), "choosing the device");
  const Status written = write_words(place, words_of(call), workspace);
  if (!written.ok()) return written;
  const Step step{reinterpret_cast<const Draw*>(workspace),
                  call.count,
                  call.hadamard_scale,
                  Rule{call.decay, call.strength, call.stochastic},
                  keyed_draw_of({call.rounding_seed, 1u << 24, 0, 0.0f}),
                  keyed_draw_of(call.count > 0 ? call.sources[0] : Source{})};
  auto* count = reinterpret_cast<unsigned long long*>(saturated);
  constexpr Shape shape{kThreads, 0};
  switch (call.noise) {
    case Noise::hadamard: return update_hadamard(place, step, workspace, count);
    case Noise::rademacher:
      return launch<update_kernel<Noise::rademacher>>(place, place.tiles, shape, "update",
                                                      tiles_of(place), step, count);
    default:
      return launch<update_kernel<Noise::gaussian>>(place, place.tiles, shape, "update",
                                                    tiles_of(place), step, count);
  }
}

}  // namespace esfast::cuda
