// Low-latency dispatch: where among its tokens of an expert a token stands. Counts of earlier tokens, no order of atomics.
#pragma once

#include <cstdint>

#include "cuda/device/packets.cuh"
#include "cuda/kernels/low_latency_gate.cuh"

namespace anyep::cuda::low_latency {

/// Value of a choice's word: {local expert, position}. A repetition of a choice has the place of the first.
inline constexpr int kPositionBits = 12;
inline constexpr std::uint32_t kNoChoice = ~std::uint32_t{0};
static_assert(kMaxTokens == 1 << kPositionBits);

/// What counting needs to know of a call: in registers, since a function that is not inlined finds the parameters far away.
struct Choices {
  const void* experts;
  bool wide_ids;
  int top_k, num_experts, tokens_per_warp;
  std::uint32_t choice_reciprocal;

  __device__ __forceinline__ explicit Choices(const CallParams& call)
      : experts(call.routing.experts),
        wide_ids(call.routing.wide_ids),
        top_k(call.top_k),
        num_experts(call.num_experts),
        tokens_per_warp(call.tokens_per_warp),
        choice_reciprocal(call.choice_reciprocal) {}
};

/// count_tokens() with kUnroll loads of a warp on their way.
template <int kUnroll>
__device__ __forceinline__ unsigned count_some(const Choices& choices, std::int32_t* histogram, int begin, int end,
                                               int warp, int warps) {
  const LaneOfChoices lane(choices.choice_reciprocal, choices.top_k);
  const int each = choices.tokens_per_warp, step = warps * each;
  unsigned strays = 0;
#pragma unroll 1
  for (int first = begin + warp * each; first < end; first += kUnroll * step) {
    std::int64_t raw[kUnroll];
    int expert[kUnroll];
    bool counts[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int token = first + i * step + lane.number;
      raw[i] = -1;
      if (lane.number < each && token < end) {
        raw[i] = raw_id(choices.experts, choices.wide_ids, token * choices.top_k + lane.choice);
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      expert[i] = checked_id(choices.num_experts, raw[i]);
      strays += expert[i] < 0 && raw[i] != -1 ? 1 : 0;
      counts[i] = expert[i] >= 0;
    }
    // Shuffles: a match of 32 different values takes 420 cycles (decision 0017).
#pragma unroll 1
    for (int back = 1; back < choices.top_k; ++back) {
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int earlier = __shfl_up_sync(kAllLanes, expert[i], static_cast<unsigned>(back));
        counts[i] = counts[i] & ((earlier != expert[i]) | (lane.choice < back));
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (counts[i]) atomicAdd(histogram + expert[i], 1);
    }
  }
  return strays;
}
/// count_tokens() out of line, with more loads on their way: in small batches each warp has one or two.
static __device__ __noinline__ unsigned count_many(const Choices choices, std::int32_t* histogram, int begin, int end,
                                                   int warp, int warps) {
  return count_some<5>(choices, histogram, begin, end, warp, warps);
}
/// Adds tokens [begin, end) to `histogram` [num_experts] in shared memory: a (token, expert) pair counts once. By `warps`
/// warps of which this is number `warp`; a barrier must follow. Returns how many of this lane's ids are neither an expert
/// nor -1.
__device__ __forceinline__ unsigned count_tokens(const CallParams& call, std::int32_t* histogram, int begin, int end,
                                                 int warp, int warps) {
  const Choices choices(call);
  if (end - begin <= 2 * warps * choices.tokens_per_warp) {
    return count_some<2>(choices, histogram, begin, end, warp, warps);
  }
  return count_many(choices, histogram, begin, end, warp, warps);
}

/// What a choice's word says to the rank that hosts the expert; other ranks get kNoChoice.
struct Place {
  int home = -1;  ///< -1 = none
  std::uint32_t value = kNoChoice;
};

/// One warp: the place of this lane's choice of a token, of which `histogram` holds all earlier ones; adds the token. Where
/// several lanes name an expert, one of them, whose number stays in `owner` [num_experts], counts for all.
__device__ __forceinline__ Place take_place(const CallParams& call, std::int32_t* histogram, std::uint8_t* owner,
                                            int id) {
  const int at = max(id, 0);
  if (id >= 0) owner[at] = static_cast<std::uint8_t>(lane_index());
  __syncwarp();
  const int speaker = owner[at];
  const int position = histogram[at];
  __syncwarp();
  if (id >= 0 && speaker == lane_index()) histogram[at] = position + 1;
  __syncwarp();  // the next token finds the histogram complete
  if (id < 0) return {};
  const int home = rank_of(call, id);
  return {home, static_cast<std::uint32_t>(id - first_expert(call, home)) << kPositionBits |
                    static_cast<std::uint32_t>(position)};
}

/// One warp sends a token's choices to `ranks`, this one last: its own rows wait for the others anyway. Pattern G.
__device__ __forceinline__ void send_places(const CallParams& call, const Turn& turn, unsigned ranks, int token,
                                            const Place& place) {
  const int lane = lane_index();
  if (lane >= call.top_k) return;
  const std::uint32_t index = call.cut.table_word(static_cast<unsigned>(token), lane);
#pragma unroll 1
  for (int step = 1; step <= call.team.num_ranks; ++step) {
    const int rank = rank_above(call, step);
    if ((ranks >> rank & 1) == 0) continue;
    protocol::put_count(word_in(call, region_to(call, turn, rank), index), turn.number,
                        rank == place.home ? place.value : kNoChoice);
  }
}

/// Counts per expert to `ranks`, from the histogram of all tokens; by threads [0, threads). Pattern G.
__device__ inline void send_counts(const CallParams& call, const Turn& turn, unsigned ranks,
                                   const std::int32_t* histogram, int thread, int threads) {
  const int pairs = static_cast<int>(call.cut.count_pairs());
  // Peers side by side as far as there are threads: here all of them wait for these words.
#pragma unroll 1
  for (int step = 1, pair = thread;; pair += threads) {
    for (; pair >= pairs; pair -= pairs) ++step;
    if (step > call.team.num_ranks) return;
    const int rank = rank_above(call, step), local = 2 * pair;
    if ((ranks >> rank & 1) == 0) continue;
    const int first = first_expert(call, rank), count = first_expert(call, rank + 1) - first;
    const std::int32_t low = local < count ? histogram[first + local] : 0;
    const std::int32_t high = local + 1 < count ? histogram[first + local + 1] : 0;
    ptx::store_two_words(&word_in(call, region_to(call, turn, rank), call.cut.count_word(static_cast<unsigned>(local))),
                         make_word(static_cast<std::uint32_t>(low), turn.number),
                         make_word(static_cast<std::uint32_t>(high), turn.number));
  }
}

}  // namespace anyep::cuda::low_latency
