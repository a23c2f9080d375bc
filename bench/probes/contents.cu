#include <cuda_bf16.h>

#include "bench/probes/device.cuh"

namespace anyep::bench::probes {
namespace {

constexpr int kBlocks = 512, kThreads = 256;

/// Steele, Lea and Flood's SplitMix64 at counter `index`.
__device__ std::uint64_t mixed(std::uint64_t seed, std::uint64_t index) {
  std::uint64_t z = (seed << 40) + (index + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

/// Two normal bfloat16 numbers (Box and Muller), or 32 random bits.
__device__ std::uint32_t word_at(std::uint64_t seed, std::uint64_t index, bool bits) {
  const std::uint64_t random = mixed(seed, index);
  if (bits) return static_cast<std::uint32_t>(random);
  const float uniform = static_cast<float>((random >> 40) + 1) * 0x1p-24f;  // in (0, 1]
  const float radius = sqrtf(-2.0f * logf(uniform)), angle = static_cast<float>(random & 0xffffff) * 0x1p-23f;
  const __nv_bfloat162 pair = __floats2bfloat162_rn(radius * cospif(angle), radius * sinpif(angle));
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}

__device__ std::uint64_t first_index() {
  return blockIdx.x * static_cast<std::uint64_t>(blockDim.x) + threadIdx.x;
}
__device__ std::uint64_t stride() {
  return gridDim.x * static_cast<std::uint64_t>(blockDim.x);
}

struct Fill {
  std::uint32_t* to;
  std::uint64_t words, seed;
  bool bits;
};
__global__ void fill_words(const __grid_constant__ Fill p) {
  for (std::uint64_t i = first_index(); i < p.words; i += stride()) p.to[i] = word_at(p.seed, i, p.bits);
}

__global__ void check_rows(const __grid_constant__ RowCheck p) {
  const auto per_row = static_cast<std::uint64_t>(p.row_bytes) / 4;
  const std::uint64_t words = per_row * static_cast<std::uint64_t>(p.num_rows);
  unsigned long long wrong = 0;
  for (std::uint64_t i = first_index(); i < words; i += stride()) {
    const std::uint64_t row = i / per_row;
    const std::uint64_t index = static_cast<std::uint64_t>(p.token[row]) * per_row + i % per_row;
    const std::uint64_t seed = p.seed + static_cast<std::uint64_t>(p.source[row]);
    wrong += reinterpret_cast<const std::uint32_t*>(p.rows)[i] != word_at(seed, index, p.bits) ? 1 : 0;
  }
  if (wrong != 0) atomicAdd(p.wrong, wrong);
}

struct SumCheck {
  Gather gather;
  std::uint64_t seed;
  unsigned long long* wrong;
};
__global__ void check_sums(const __grid_constant__ SumCheck p) {
  const Places& places = p.gather.places;
  const auto per_row = static_cast<std::uint64_t>(p.gather.row_bytes) / 4;
  const std::uint64_t words = per_row * static_cast<std::uint64_t>(places.num_tokens);
  unsigned long long wrong = 0;
  for (std::uint64_t i = first_index(); i < words; i += stride()) {
    float2 sum{0, 0};
    for (int rank = 0; rank < places.num_ranks; ++rank) {
      const int token = static_cast<int>(i / per_row);
      const int row = row_at(places, places.before, token, rank, places.row[token * places.num_ranks + rank]);
      if (row < 0) continue;
      const std::uint32_t word = word_at(p.seed + static_cast<std::uint64_t>(rank),
                                         static_cast<std::uint64_t>(row) * per_row + i % per_row, false);
      const float2 pair = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&word));
      sum.x += pair.x;
      sum.y += pair.y;
    }
    const __nv_bfloat162 want = __floats2bfloat162_rn(sum.x, sum.y);
    const std::uint32_t got = reinterpret_cast<const std::uint32_t*>(p.gather.out)[i];
    wrong += got != *reinterpret_cast<const std::uint32_t*>(&want) ? 1 : 0;
  }
  if (wrong != 0) atomicAdd(p.wrong, wrong);
}

}  // namespace

void fill(std::byte* to, std::size_t bytes, std::uint64_t seed, bool bits, cudaStream_t stream) {
  launch(fill_words, kBlocks, kThreads, 0, stream, Fill{reinterpret_cast<std::uint32_t*>(to), bytes / 4, seed, bits});
}

void count_wrong_rows(const RowCheck& check, cudaStream_t stream) {
  launch(check_rows, kBlocks, kThreads, 0, stream, check);
}

void count_wrong_sums(const Gather& gather, std::uint64_t seed, unsigned long long* wrong, cudaStream_t stream) {
  launch(check_sums, kBlocks, kThreads, 0, stream, SumCheck{gather, seed, wrong});
}

}  // namespace anyep::bench::probes
