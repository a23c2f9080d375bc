// What a rank's own routing says, and final rows from places: no exchange.
#include <algorithm>

#include "cuda/device/ptx.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/kernels/choices.cuh"
#include "cuda/kernels/notify.h"
#include "cuda/runtime/launch.h"

namespace anyep::cuda {
namespace {

constexpr int kThreads = 512;

struct FinalPlacesParams {
  const std::int32_t* place;
  const std::int32_t* before;  ///< null = zeros
  std::int32_t* out;
  std::int64_t count;  ///< tokens * ranks
  int tokens_per_range, num_ranks;
};

}  // namespace

namespace {

/// What one block has counted, in shared memory.
struct Counted {
  std::int32_t* pairs;   ///< [num_experts]
  std::int32_t* tokens;  ///< [num_ranks]
};

/// The blocks are one cluster, which reads what each has counted.
__device__ void sum_in_cluster(const LayoutParams& p, const Counted& mine) {
  ptx::cluster_sync();  // all have counted
  const auto sum = [](const std::int32_t* at) {
    std::int32_t total = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) total += ptx::load_shared_of(block, at);
    return total;
  };
  const int thread = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  for (int expert = thread; expert < p.num_experts; expert += static_cast<int>(gridDim.x) * kThreads) {
    p.pairs_per_expert[expert] = sum(mine.pairs + expert);
  }
  if (thread < p.num_ranks) p.tokens_per_rank[thread] = sum(mine.tokens + thread);
  ptx::cluster_sync();  // nobody leaves while others read what it has
}

/// The outputs hold zeros.
__device__ void add_to_outputs(const LayoutParams& p, const Counted& mine) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int expert = thread; expert < p.num_experts; expert += kThreads) {
    if (mine.pairs[expert] != 0) atomicAdd(p.pairs_per_expert + expert, mine.pairs[expert]);
  }
  if (thread < p.num_ranks && mine.tokens[thread] != 0) atomicAdd(p.tokens_per_rank + thread, mine.tokens[thread]);
}

}  // namespace

/// Counts are kept per block in shared memory and added once.
template <bool kCluster>
__global__ void __launch_bounds__(kThreads) layout_kernel(const __grid_constant__ LayoutParams p) {
  std::byte* const memory = ptx::dynamic_shared<16>();
  __shared__ std::int32_t tokens[32];
  __shared__ std::uint32_t ranks_of[kThreads];
  auto* const pairs = reinterpret_cast<std::int32_t*>(memory);
  auto* const rank_of = reinterpret_cast<std::uint8_t*>(pairs + p.num_experts);
  const int thread = static_cast<int>(threadIdx.x);
  fill_rank_of(rank_of, p.num_experts, p.num_ranks);
  for (int expert = thread; expert < p.num_experts; expert += kThreads) pairs[expert] = 0;
  if (thread < 32) tokens[thread] = 0;
  __syncthreads();
  const Choices choices{p.experts, p.wide_ids, p.token_stride, p.choice_stride, p.top_k, p.num_experts};
  for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads; first < p.num_tokens;
       first += static_cast<std::int64_t>(gridDim.x) * kThreads) {
    ranks_of[thread] = 0;
    __syncthreads();
    const std::int64_t count = min(p.num_tokens - first, static_cast<std::int64_t>(kThreads));
    (void)count_choices(choices, first, static_cast<std::uint32_t>(count), rank_of, pairs, ranks_of);
    __syncthreads();
    for (int rank = 0; thread < count && rank < p.num_ranks; ++rank) {
      const bool goes = (ranks_of[thread] >> rank & 1u) != 0;
      p.token_in_rank[(first + thread) * p.num_ranks + rank] = goes ? 1 : 0;
      if (goes) atomicAdd(tokens + rank, 1);
    }
  }
  __syncthreads();
  if constexpr (kCluster) {
    sum_in_cluster(p, {pairs, tokens});
  } else {
    add_to_outputs(p, {pairs, tokens});
  }
}

__global__ void __launch_bounds__(kThreads) final_places_kernel(const __grid_constant__ FinalPlacesParams p) {
  for (std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < p.count;
       at += static_cast<std::int64_t>(gridDim.x) * kThreads) {
    const std::int64_t range = at / p.num_ranks / p.tokens_per_range;
    const std::int32_t place = p.place[at];
    const std::int32_t before = p.before != nullptr ? p.before[range * p.num_ranks + at % p.num_ranks] : 0;
    p.out[at] = place < 0 ? -1 : place + before;
  }
}

namespace {

const Kernel<LayoutParams> kClusterLayout(layout_kernel<true>, "layout_kernel");
const Kernel<LayoutParams> kLayout(layout_kernel<false>, "layout_kernel");
const Kernel<FinalPlacesParams> kFinalPlaces(final_places_kernel, "final_places_kernel");

unsigned blocks_for(std::int64_t items, std::int64_t most) {
  return static_cast<unsigned>(std::clamp<std::int64_t>((items + kThreads - 1) / kThreads, 1, most));
}

}  // namespace

void launch_layout(const LayoutParams& params, int num_sms, cudaStream_t stream) {
  // One cluster needs no zeros in front, which are two more launches; many tokens are counted sooner by many blocks.
  constexpr unsigned kClusterBlocks = 8;
  constexpr int kClusterTokens = 1 << 15;
  const bool cluster = device_traits().bulk_copies && params.num_tokens <= kClusterTokens;
  LaunchShape shape{.blocks = blocks_for(params.num_tokens, cluster ? kClusterBlocks : std::max(num_sms, 1)),
                    .threads = kThreads,
                    .shared_bytes = static_cast<std::size_t>(params.num_experts) * 5,
                    .stream = stream};
  if (cluster) {
    shape.cluster = shape.blocks;
    kClusterLayout(shape, params);
    return;
  }
  zero_later(params.tokens_per_rank, static_cast<std::size_t>(params.num_ranks) * 4, stream);
  zero_later(params.pairs_per_expert, static_cast<std::size_t>(params.num_experts) * 4, stream);
  kLayout(shape, params);
}

void launch_final_places(const std::int32_t* place, const std::int32_t* before, int tokens_per_range, int num_tokens,
                         int num_ranks, std::int32_t* out, cudaStream_t stream) {
  const std::int64_t count = std::int64_t{num_tokens} * num_ranks;
  if (count == 0) return;
  kFinalPlaces({.blocks = blocks_for(count, 256), .threads = kThreads, .stream = stream},
               {place, before, out, count, tokens_per_range, num_ranks});
}

}  // namespace anyep::cuda
