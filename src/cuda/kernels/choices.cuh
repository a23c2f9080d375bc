// Reading a rank's routing: which ranks a token goes to, which experts it chooses.
#pragma once

#include <cstdint>

#include "core/routing.h"

namespace anyep::cuda {

/// Expert ids of this rank's tokens, int32 or int64, any strides (in elements).
struct Choices {
  const void* ids;
  bool wide;
  std::int64_t token_stride, choice_stride;
  int top_k, num_experts;
};

/// Calls with(id) for every choice of a token, ids as they stand there, several loads in flight.
template <class With>
__device__ inline void for_each_choice(const Choices& choices, std::int64_t token, With&& with) {
  constexpr int kBatch = 8;
  for (int first = 0; first < choices.top_k; first += kBatch) {
    std::int64_t ids[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i >= choices.top_k) break;
      const std::int64_t at = token * choices.token_stride + (first + i) * choices.choice_stride;
      ids[i] = choices.wide ? static_cast<const std::int64_t*>(choices.ids)[at]
                            : static_cast<const std::int32_t*>(choices.ids)[at];
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i >= choices.top_k) break;
      with(ids[i]);
    }
  }
}

/// rank_of[expert] for all experts, by all threads of the block; a barrier must follow.
__device__ inline void fill_rank_of(std::uint8_t* rank_of, int num_experts, int num_ranks) {
  for (int expert = static_cast<int>(threadIdx.x); expert < num_experts; expert += static_cast<int>(blockDim.x)) {
    rank_of[expert] = static_cast<std::uint8_t>(core::rank_of_expert(num_experts, num_ranks, expert));
  }
}

/// Counts a token's choices in `pairs` (shared memory; null = do not count) and returns the set of their ranks. Ids that
/// are neither an expert nor -1 are counted in `out_of_range`.
__device__ inline unsigned count_choices(const Choices& choices, std::int64_t token, const std::uint8_t* rank_of,
                                         std::int32_t* pairs, unsigned& out_of_range) {
  unsigned ranks = 0;
  for_each_choice(choices, token, [&](std::int64_t id) {
    if (id < 0 || id >= choices.num_experts) {
      out_of_range += id != -1;
      return;
    }
    if (pairs != nullptr) atomicAdd(pairs + id, 1);
    ranks |= 1u << rank_of[id];
  });
  return ranks;
}

/// The set of ranks in a row of in_rank: bytes, dense.
__device__ inline unsigned given_ranks(const std::uint8_t* in_rank, std::int64_t token, int num_ranks) {
  unsigned ranks = 0;
  for (int rank = 0; rank < num_ranks; ++rank) ranks |= (in_rank[token * num_ranks + rank] != 0 ? 1u : 0u) << rank;
  return ranks;
}

}  // namespace anyep::cuda
