// What a rank's own routing says, and final rows from places: no exchange.
#include <algorithm>

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

/// Counts are kept per block in shared memory and added once.
__global__ void __launch_bounds__(kThreads) layout_kernel(const __grid_constant__ LayoutParams p) {
  extern __shared__ __align__(16) std::byte memory[];
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
  for (int expert = thread; expert < p.num_experts; expert += kThreads) {
    if (pairs[expert] != 0) atomicAdd(p.pairs_per_expert + expert, pairs[expert]);
  }
  if (thread < p.num_ranks && tokens[thread] != 0) atomicAdd(p.tokens_per_rank + thread, tokens[thread]);
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

const Kernel<LayoutParams> kLayout(layout_kernel, "layout_kernel");
const Kernel<FinalPlacesParams> kFinalPlaces(final_places_kernel, "final_places_kernel");

unsigned blocks_for(std::int64_t items, std::int64_t most) {
  return static_cast<unsigned>(std::clamp<std::int64_t>((items + kThreads - 1) / kThreads, 1, most));
}

}  // namespace

void launch_layout(const LayoutParams& params, int num_sms, cudaStream_t stream) {
  if (!params.zeroed) {
    zero_later(params.tokens_per_rank, static_cast<std::size_t>(params.num_ranks) * 4, stream);
    zero_later(params.pairs_per_expert, static_cast<std::size_t>(params.num_experts) * 4, stream);
  }
  kLayout({.blocks = blocks_for(params.num_tokens, std::max(num_sms, 1)),
           .threads = kThreads,
           .shared_bytes = static_cast<std::size_t>(params.num_experts) * 5,
           .stream = stream},
          params);
}

void launch_final_places(const std::int32_t* place, const std::int32_t* before, int tokens_per_range, int num_tokens,
                         int num_ranks, std::int32_t* out, cudaStream_t stream) {
  const std::int64_t count = std::int64_t{num_tokens} * num_ranks;
  if (count == 0) return;
  kFinalPlaces({.blocks = blocks_for(count, 256), .threads = kThreads, .stream = stream},
               {place, before, out, count, tokens_per_range, num_ranks});
}

}  // namespace anyep::cuda
