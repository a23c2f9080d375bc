// Low-latency dispatch: where among its tokens of an expert a token stands. Counts of earlier tokens, no order of atomics.
#pragma once

#include <cstdint>

#include "cuda/kernels/low_latency_frame.cuh"

namespace anyep::cuda::low_latency {

/// Value of a choice's word: {local expert, position}.
inline constexpr int kPositionBits = 12;
inline constexpr std::uint32_t kNoChoice = ~std::uint32_t{0};
static_assert(kMaxTokens == 1 << kPositionBits);

/// One choice of a token, in one lane.
struct LaneChoice {
  int expert = -1;     ///< global
  bool first = false;  ///< not a repetition of an earlier choice of the token: a (token, expert) pair counts once
  bool stray = false;  ///< neither an expert nor -1
};

/// Lane i holds choice i % top_k of token `first_token + i / top_k`, as far as whole tokens below `end` go. All lanes.
__device__ __forceinline__ LaneChoice choice_of_lane(const CallParams& call, int first_token, int end, int lane_token,
                                                     int lane_choice) {
  LaneChoice choice;
  const int token = first_token + lane_token;
  const bool here = lane_token < call.tokens_per_warp && token < end;
  if (here) {
    const std::int64_t raw = raw_id(call, token, lane_choice);
    choice.expert = checked_id(call, raw);
    choice.stray = choice.expert < 0 && raw != -1;
  }
  const unsigned key = choice.expert >= 0
                           ? static_cast<unsigned>(lane_token) << 16 | static_cast<unsigned>(choice.expert)
                           : 0x8000'0000u | static_cast<unsigned>(lane_index());
  const unsigned same = __match_any_sync(kAllLanes, key);
  choice.first = choice.expert >= 0 && __ffs(static_cast<int>(same)) - 1 == lane_index();
  return choice;
}

/// Adds tokens [begin, end) to `histogram` [num_experts] in shared memory. By `warps` warps of which this is number `warp`;
/// a barrier must follow.
__device__ inline void count_tokens(const CallParams& call, std::int32_t* histogram, int begin, int end, int warp,
                                    int warps, unsigned* strays = nullptr) {
  const int lane_token = lane_index() / call.top_k, lane_choice = lane_index() % call.top_k;
  for (int token = begin + warp * call.tokens_per_warp; token < end; token += warps * call.tokens_per_warp) {
    const LaneChoice choice = choice_of_lane(call, token, end, lane_token, lane_choice);
    if (choice.first) atomicAdd(histogram + choice.expert, 1);
    if (strays != nullptr) *strays += choice.stray;
  }
}

/// One warp sends the choices of tokens [begin, end), of which `histogram` holds all earlier ones, to every rank; adds them
/// to the histogram. Pattern G.
__device__ inline void send_choices(const CallParams& call, const Block& block, std::int32_t* histogram, int begin,
                                    int end) {
  const int lane = lane_index(), me = call.team.rank;
  for (int token = begin; token < end; ++token) {
    const int raw = lane < call.top_k ? checked_id(call, raw_id(call, token, lane)) : -1;
    const unsigned same = __match_any_sync(kAllLanes, raw);
    const bool first = raw >= 0 && __ffs(static_cast<int>(same)) - 1 == lane;
    const int home = raw >= 0 ? rank_of(call, raw) : -1;
    std::uint32_t value = kNoChoice;
    if (first) {
      const auto local = static_cast<std::uint32_t>(raw - call.first_expert[home]);
      value = local << kPositionBits | static_cast<std::uint32_t>(histogram[raw]++);
    }
    if (lane < call.top_k) {
      const std::uint64_t index = call.cut.table_word(static_cast<std::uint64_t>(token), lane);
      for (int step = 1; step <= call.team.num_ranks;
           ++step) {  // this rank last: its own rows wait for the rest anyway
        const int rank = (me + step) % call.team.num_ranks;
        if ((block.dead >> rank & 1) != 0) continue;
        protocol::put_count(word_in(call, region_of(call, rank, me, block.turn), index), block.turn,
                            rank == home ? value : kNoChoice);
      }
    }
    __syncwarp();  // the next token finds the histogram complete
  }
}

/// Head and counts per expert to every rank, from the histogram of all tokens; by threads [0, threads). Pattern G.
__device__ inline void send_counts(const CallParams& call, const Block& block, const std::int32_t* histogram,
                                   int thread, int threads) {
  const int me = call.team.rank, most = static_cast<int>(call.cut.table_words) - 1;
  for (int step = 1; step <= call.team.num_ranks; ++step) {
    const int rank = (me + step) % call.team.num_ranks;
    if ((block.dead >> rank & 1) != 0) continue;
    std::byte* const region = region_of(call, rank, me, block.turn);
    if (thread == 0 && rank != me) send_head(call, block, rank);
    const int first = call.first_expert[rank], count = call.first_expert[rank + 1] - first;
    for (int local = thread; local < most; local += threads) {
      protocol::put_count(word_in(call, region, 1 + static_cast<unsigned>(local)), block.turn,
                          local < count ? static_cast<std::uint32_t>(histogram[first + local]) : 0);
    }
  }
}

}  // namespace anyep::cuda::low_latency
