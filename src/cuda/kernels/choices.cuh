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

__device__ inline std::int64_t id_at(const Choices& choices, std::int64_t token, std::uint32_t choice) {
  const std::int64_t at = token * choices.token_stride + choice * choices.choice_stride;
  return choices.wide ? static_cast<const std::int64_t*>(choices.ids)[at]
                      : static_cast<const std::int32_t*>(choices.ids)[at];
}

/// rank_of[expert] for all experts, by all threads of the block; a barrier must follow.
__device__ inline void fill_rank_of(std::uint8_t* rank_of, int num_experts, int num_ranks) {
  for (int expert = static_cast<int>(threadIdx.x); expert < num_experts; expert += static_cast<int>(blockDim.x)) {
    rank_of[expert] = static_cast<std::uint8_t>(core::rank_of_expert(num_experts, num_ranks, expert));
  }
}

/// All threads of the block: adds the choices of `tokens` tokens from `first` on to `pairs` (null = does not count) and to
/// ranks_of[token - first], a set of ranks; both in shared memory, zero before, with a barrier before and after. Returns how
/// many of this thread's ids are neither an expert nor -1. Threads take ids as they lie, not a token each: loads of
/// neighbours are adjacent.
__device__ inline unsigned count_choices(const Choices& choices, std::int64_t first, std::uint32_t tokens,
                                         const std::uint8_t* rank_of, std::int32_t* pairs, std::uint32_t* ranks_of) {
  constexpr std::uint32_t kUnroll = 4;
  const auto top_k = static_cast<std::uint32_t>(choices.top_k), count = tokens * top_k;
  // element / top_k, exact below 2^32 / top_k elements.
  const std::uint32_t inverse = 0xFFFF'FFFFu / top_k + 1;
  const auto token_of = [=](std::uint32_t element) { return top_k == 1 ? element : __umulhi(element, inverse); };
  unsigned out_of_range = 0;
  for (std::uint32_t step = threadIdx.x; step < count; step += kUnroll * blockDim.x) {
    std::int64_t ids[kUnroll];
#pragma unroll
    for (std::uint32_t i = 0; i < kUnroll; ++i) {
      const std::uint32_t element = step + i * blockDim.x, token = token_of(element);
      ids[i] = element < count ? id_at(choices, first + token, element - token * top_k) : -1;
    }
#pragma unroll
    for (std::uint32_t i = 0; i < kUnroll; ++i) {
      const std::int64_t id = ids[i];
      if (id < 0 || id >= choices.num_experts) {
        out_of_range += id != -1;
        continue;
      }
      if (pairs != nullptr) atomicAdd(pairs + id, 1);
      atomicOr(ranks_of + token_of(step + i * blockDim.x), 1u << rank_of[id]);
    }
  }
  return out_of_range;
}

/// The set of ranks in a row of in_rank: bytes, dense.
__device__ inline unsigned given_ranks(const std::uint8_t* in_rank, std::int64_t token, int num_ranks) {
  unsigned ranks = 0;
  for (int rank = 0; rank < num_ranks; ++rank) ranks |= (in_rank[token * num_ranks + rank] != 0 ? 1u : 0u) << rank;
  return ranks;
}

}  // namespace anyep::cuda
