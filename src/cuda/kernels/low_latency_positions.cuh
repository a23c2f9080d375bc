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
#pragma unroll 1
  for (int token = begin + warp * call.tokens_per_warp; token < end; token += warps * call.tokens_per_warp) {
    const LaneChoice choice = choice_of_lane(call, token, end, lane_token, lane_choice);
    if (choice.first) atomicAdd(histogram + choice.expert, 1);
    if (strays != nullptr) *strays += choice.stray;
  }
}

/// The expert that this lane's choice of a token names, or -1.
__device__ __forceinline__ int id_of_lane(const CallParams& call, int token) {
  return lane_index() < call.top_k ? checked_id(call, raw_id(call, token, lane_index())) : -1;
}

/// What a choice's word says to the rank that hosts the expert; other ranks get kNoChoice.
struct Place {
  int home;             ///< -1 = none
  std::uint32_t value;  ///< kNoChoice for a repetition
};

/// One warp: the place of this lane's choice of a token, of which `histogram` holds all earlier ones; adds the token.
__device__ __forceinline__ Place take_place(const CallParams& call, std::int32_t* histogram, int id) {
  const unsigned same = __match_any_sync(kAllLanes, id);
  Place place{-1, kNoChoice};
  if (id >= 0) {
    place.home = rank_of(call, id);
    if (__ffs(static_cast<int>(same)) - 1 == lane_index()) {
      const auto local = static_cast<std::uint32_t>(id - call.first_expert[place.home]);
      place.value = local << kPositionBits | static_cast<std::uint32_t>(histogram[id]++);
    }
  }
  __syncwarp();  // the next token finds the histogram complete
  return place;
}

/// One warp sends a token's choices to every rank, this one last: its own rows wait for the others anyway. Pattern G.
__device__ __forceinline__ void send_places(const CallParams& call, const Block& block, int token, const Place& place) {
  const int lane = lane_index();
  if (lane >= call.top_k) return;
  const std::uint32_t index = call.cut.table_word(static_cast<unsigned>(token), lane);
#pragma unroll 1
  for (int step = 1; step <= call.team.num_ranks; ++step) {
    const int rank = around(call, call.team.rank + step);
    if ((block.dead >> rank & 1) != 0) continue;
    protocol::put_count(word_in(call, block.to[rank], index), block.turn, rank == place.home ? place.value : kNoChoice);
  }
}

/// Counts per expert to every rank, from the histogram of all tokens; by threads [0, threads). Pattern G.
__device__ inline void send_counts(const CallParams& call, const Block& block, const std::int32_t* histogram,
                                   int thread, int threads) {
  const int me = call.team.rank, most = static_cast<int>(call.cut.table_words) - 1;
#pragma unroll 1
  for (int step = 1; step <= call.team.num_ranks; ++step) {
    const int rank = around(call, me + step);
    if ((block.dead >> rank & 1) != 0) continue;
    std::byte* const region = block.to[rank];
    const int first = call.first_expert[rank], count = call.first_expert[rank + 1] - first;
#pragma unroll 1
    for (int local = thread; local < most; local += threads) {
      protocol::put_count(word_in(call, region, 1 + static_cast<unsigned>(local)), block.turn,
                          local < count ? static_cast<std::uint32_t>(histogram[first + local]) : 0);
    }
  }
}

}  // namespace anyep::cuda::low_latency
