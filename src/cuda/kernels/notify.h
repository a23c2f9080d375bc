// Routing: counts per rank and expert, exchanged; every place by prefix sums.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/kernels/team.h"

namespace anyep::cuda {

/// Counts of one route, in pinned host memory. The kernel writes the rest before `word` (pattern Q).
struct CountsPage {
  static constexpr int kMaxLocalExperts = 1024;
  std::uint64_t word;                    ///< turn of notify (low 32 bits), once the rest is there
  std::int32_t rows_until[kMaxRanks];    ///< rows received from ranks 0..s
  std::int32_t tokens[kMaxRanks];        ///< every rank's number of tokens
  std::int32_t rows_of[kMaxRanks];       ///< rows that every rank receives in all
  std::int32_t most_rows_of_a_pair;      ///< largest entry of the matrix
  std::int32_t pairs[kMaxLocalExperts];  ///< (token, choice) pairs per local expert
};

/// One block per range of tokens_per_range = max(1, ceil(num_tokens / num_ranges)) adjacent tokens, any number of them.
struct NotifyParams {
  Team team;
  // This rank's routing. Either `experts` or `in_rank` or both; where both are given, in_rank says where tokens go.
  const void* experts = nullptr;  ///< [num_tokens, top_k] int32 or int64; out of range counts as -1 and is counted
  bool wide_ids = true;
  std::int64_t token_stride = 0, choice_stride = 0;  ///< in elements
  const std::uint8_t* in_rank = nullptr;             ///< [num_tokens, num_ranks], dense
  const std::int32_t* pairs_given = nullptr;         ///< [num_experts]: instead of counting
  int num_tokens = 0, top_k = 0, num_experts = 0;
  // Results, in this GPU's memory.
  std::int32_t* place = nullptr;   ///< as Places
  std::int32_t* before = nullptr;  ///< [num_ranges, num_ranks]
  int tokens_per_range = 0, num_ranges = 0;
  std::int32_t* rows_until = nullptr;  ///< [num_ranks]
  std::int32_t* tokens = nullptr;      ///< [num_ranks]
  std::int32_t* partial = nullptr;     ///< scratch, [num_ranges, num_experts + num_ranks]
  CountsPage* page = nullptr;
  bool dispatch_behind = false;  ///< counted: the next launch in the stream may be a dispatch with behind_notify
};

/// Ranges, hence blocks, for so many tokens with at most `num_sms` blocks.
int notify_ranges(int num_tokens, int num_sms);
void launch_notify(const NotifyParams& params, cudaStream_t stream);

/// What a rank's own routing says, without any exchange (get_dispatch_layout).
struct LayoutParams {
  const void* experts = nullptr;
  bool wide_ids = true;
  std::int64_t token_stride = 0, choice_stride = 0;
  int num_tokens = 0, top_k = 0, num_experts = 0, num_ranks = 1;
  std::int32_t* tokens_per_rank = nullptr;   ///< [num_ranks]
  std::int32_t* pairs_per_expert = nullptr;  ///< [num_experts]
  std::uint8_t* token_in_rank = nullptr;     ///< [num_tokens, num_ranks]
};
void launch_layout(const LayoutParams& params, int num_sms, cudaStream_t stream);

/// Final rows from a Places: out [num_tokens, num_ranks], -1 = not sent.
void launch_final_places(const std::int32_t* place, const std::int32_t* before, int tokens_per_range, int num_tokens,
                         int num_ranks, std::int32_t* out, cudaStream_t stream);

}  // namespace anyep::cuda
