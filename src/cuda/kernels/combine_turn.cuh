// One turn of a combine: which rows go to which home, what each rank offers, where a home finds its rows.
//
//   word             lives on     written by    meaning
//   combine_offered  home         expert rank   this turn's offer is there (pattern A); x that is gathered may be read
//   chunk            home         expert rank   these rows have landed in their slots (pattern I', A)
//   combine_read     expert rank  home          this turn's rows have been read: the slots of the turn after the next may
//                                               be written, x may be overwritten (patterns F, L)
//
// combine_read runs on from op to op, so its marks carry no code. The first two turns of an engine need no credit: nothing
// was ever in their slots.
#pragma once

#include "cuda/device/bulk.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/device/words.cuh"
#include "cuda/kernels/intranode_combine.h"

namespace anyep::cuda {

/// How a launch cuts its work.
struct CombinePlan {
  std::uint32_t row_bytes = 0, slot_bytes = 0;
  std::uint64_t slots = 0;  ///< of a pair
  int send_warps = 0, sum_warps = 1, weight_warps = 0;
  std::uint32_t pieces = 1, piece_bytes = 0;  ///< of a row, where it moves through shared memory
  std::uint32_t width = 16;                   ///< of accesses on the portable path
};

/// What the kernel gets.
struct CombineLaunch {
  CombineParams params;
  CombinePlan plan;
};

/// Piles of tickets.
inline constexpr int kPileChunks = 0, kPileTokens = 1, kPileWeights = 2, kPileOffer = 3;

/// The rows of x that this turn sends to each home, in shared memory.
struct TurnRows {
  std::int32_t first[kMaxRanks], end[kMaxRanks];
};

/// First row in [first, end) whose token is at least `token`.
__device__ inline std::int32_t lower_bound(const std::int32_t* source, std::int32_t first, std::int32_t end,
                                           std::int64_t token) {
  while (first < end) {
    const std::int32_t middle = first + (end - first) / 2;
    if (source[middle] < token) {
      first = middle + 1;
    } else {
      end = middle;
    }
  }
  return first;
}

/// Of the rank with most.
__device__ inline std::int64_t most_tokens(const CombineParams& p) {
  std::int32_t most = 0;
  for (int rank = 0; rank < p.team.num_ranks; ++rank) most = max(most, p.tokens[rank]);
  return most;
}

/// One thread per home; a barrier follows. False: x lacks rows, or the slots do not hold those of the pair.
[[nodiscard]] __device__ inline bool find_rows(const CombineLaunch& a, int home, TurnRows& rows) {
  const CombineParams& p = a.params;
  const std::int32_t begin = home == 0 ? 0 : p.rows_until[home - 1], until = p.rows_until[home];
  std::int32_t first = begin, end = until;
  const bool cut = p.last_token != INT64_MAX && until <= p.num_rows;
  if (cut && p.first_token > 0) first = lower_bound(p.source, begin, until, p.first_token);
  if (cut && p.last_token < most_tokens(p)) end = lower_bound(p.source, first, until, p.last_token);
  rows.first[home] = first;
  rows.end[home] = end;
  if (end > p.num_rows) return false;
  return home == p.team.rank || p.x_in_window != Grant::kNone ||
         static_cast<std::uint64_t>(end - first) <= a.plan.slots;
}

/// The thread whose find_rows() was false, behind the barrier.
__device__ inline void refuse_rows(const CombineLaunch& a, const Turn& turn, int home, const TurnRows& rows) {
  const CombineParams& p = a.params;
  if (rows.end[home] > p.num_rows) {
    (void)give_up_on(p.team, {p.team.rank, kWaitBeforeSend}, turn, static_cast<std::uint64_t>(p.num_rows),
                     static_cast<std::uint64_t>(rows.end[home]));
  } else {
    (void)give_up_on(p.team, {home, kWaitBeforeSend}, turn, a.plan.slots,
                     static_cast<std::uint64_t>(rows.end[home] - rows.first[home]));
  }
}

__device__ inline std::uint64_t read_mark(const Team& team, std::uint32_t turn) {
  return protocol::make_mark(team.generation, turn, 0);
}

/// One thread: the home has read what lay in these slots, and this rank's offer, two turns ago (pattern F).
[[nodiscard]] __device__ inline bool reach_slots(const Team& team, const Turn& turn, int home) {
  std::uint64_t& word = word_of(team, team.rank, team.layout.combine_read, home);
  const bool first_turns = turn.number - protocol::kFirstEpoch <= kSlotRegions;
  if (first_turns && protocol::Shared(word).load(protocol::kRelaxed) == 0) return true;
  const std::uint32_t before = protocol::previous_epoch(protocol::previous_epoch(turn.number));
  return reach(team, turn, home, kWaitMidSend, word, read_mark(team, before));
}

/// One warp of the first block to come: what this rank offers each home.
[[nodiscard]] __device__ inline bool offer_rows(const CombineParams& p, const Turn& turn, const TurnRows& rows) {
  const int home = lane_index(), me = p.team.rank;
  bool ok = true;
  if (home < p.team.num_ranks && home != me) {
    ok = reach_slots(p.team, turn, home);
    if (ok) {
      auto& offer = *reinterpret_cast<Offer*>(p.team.window[home] + p.team.layout.offer_record(me, turn.number));
      offer = {p.x_in_window, p.weights_in_window, static_cast<std::uint64_t>(rows.first[home])};
      publish(word_of(p.team, home, p.team.layout.combine_offered, me), turn.mark);  // pattern A; x: stream order
    }
  }
  return __all_sync(kAllLanes, ok) != 0;
}

/// Where a home finds a rank's rows.
struct RankRows {
  const std::byte* rows;     ///< row 0, though it may lie elsewhere
  const std::byte* weights;  ///< likewise
  std::int64_t stride, weights_stride;
  std::uint64_t* chunks;  ///< words of rows in slots; null = the rows are there
  std::int32_t first;     ///< row of slot 0
};

/// One warp's view of all ranks, in shared memory: it costs the loops around it no registers. Lane r asks for rank r.
class RowsOfRanks {
 public:
  __device__ RowsOfRanks(const CombineLaunch& a, const Turn& turn, RankRows* ranks)
      : a_(a), p_(a.params), turn_(turn), ranks_(ranks) {}

  /// All lanes; waits for the offers. What the lane loads or bulk-loads afterwards lies behind its acquire (patterns B, K).
  [[nodiscard]] __device__ bool meet() {
    const int rank = lane_index(), me = p_.team.rank;
    bool ok = true;
    if (rank == me) {
      const auto* const weights = reinterpret_cast<const std::byte*>(p_.weights);
      ranks_[rank] = {p_.x, weights, p_.x_row_stride, p_.num_weights * std::int64_t{4}, nullptr, 0};
    } else if (rank < p_.team.num_ranks) {
      ok = reach(p_.team, turn_, rank, kWaitInReceive, word_of(p_.team, me, p_.team.layout.combine_offered, rank),
                 turn_.mark);
      if (ok) read_offer(rank);
      bulk::acquired_for_loads();
    }
    ok = __all_sync(kAllLanes, ok) != 0;
    __syncwarp();  // pattern B: one lane has acquired, all read
    return ok;
  }

  /// Tokens of this rank in this turn.
  [[nodiscard]] __device__ std::uint32_t num_tokens() const {
    const std::int64_t end = min(p_.last_token, static_cast<std::int64_t>(p_.places.num_tokens));
    return end > p_.first_token ? static_cast<std::uint32_t>(end - p_.first_token) : 0;
  }
  /// A rank's row of the turn's token `token` < num_tokens(); -1 = none.
  [[nodiscard]] __device__ std::int32_t place(std::uint32_t token, int rank) const {
    return p_.places.row(static_cast<std::uint32_t>(p_.first_token) + token, rank, p_.team.num_ranks);
  }
  /// Lane r: rank r's row; -1 beyond the last token too. Issued long before it is needed.
  [[nodiscard]] __device__ std::int32_t place(std::uint32_t token) const {
    return lane_index() < p_.team.num_ranks && token < num_tokens() ? place(token, lane_index()) : -1;
  }

  /// One lane waits until a rank's row is there. A barrier of the warp must follow where other lanes read it.
  [[nodiscard]] __device__ bool arrive(int rank, std::int32_t row) const {
    if (row < 0 || ranks_[rank].chunks == nullptr) return true;
    const std::int32_t index = row - ranks_[rank].first;
    if (static_cast<std::uint64_t>(index) >= a_.plan.slots) {
      return give_up_on(p_.team, {rank, kWaitInReceive}, turn_, a_.plan.slots, static_cast<std::uint64_t>(index));
    }
    std::uint64_t& word = ranks_[rank].chunks[static_cast<std::uint32_t>(index) / kRowsPerChunk];
    const bool there = protocol::Shared(word).load(protocol::kAcquire) == turn_.mark;  // nearly always
    return there || reach(p_.team, turn_, rank, kWaitInReceive, word, turn_.mark);
  }

  __device__ bool slotted(int rank) const { return ranks_[rank].chunks != nullptr; }
  __device__ const std::byte* row(int rank, std::int32_t row) const {
    return ranks_[rank].rows + row * ranks_[rank].stride;
  }
  __device__ const float* weights(int rank, std::int32_t row) const {
    return reinterpret_cast<const float*>(ranks_[rank].weights + row * ranks_[rank].weights_stride);
  }

 private:
  __device__ void read_offer(int rank) {
    const WindowLayout& layout = p_.team.layout;
    std::byte* const mine = p_.team.window[p_.team.rank];
    const Offer offer = *reinterpret_cast<const Offer*>(mine + layout.offer_record(rank, turn_.number));
    if (offer.x != Grant::kNone) {
      const std::byte* const theirs = p_.team.window[rank];
      ranks_[rank] = {
          theirs + offer.x, theirs + offer.weights, a_.plan.row_bytes, p_.num_weights * std::int64_t{4}, nullptr, 0};
      return;
    }
    const auto first = static_cast<std::int32_t>(offer.first_row);
    const std::int64_t stride = a_.plan.slot_bytes;
    const std::byte* const rows = mine + layout.slot_region(rank, turn_.number) - first * stride;
    auto* const chunks = reinterpret_cast<std::uint64_t*>(mine + layout.chunk_word(rank, turn_.number, 0));
    ranks_[rank] = {rows, rows + a_.plan.row_bytes, stride, stride, chunks, first};
  }

  const CombineLaunch& a_;
  const CombineParams& p_;
  const Turn& turn_;
  RankRows* const ranks_;
};

/// Bias and output of a token from `offset` on.
__device__ inline std::byte* out_row(const CombineParams& p, std::int64_t token) {
  return p.out + token * p.out_row_stride;
}
__device__ inline const std::byte* bias_row(const CombineParams& p, int which, std::int64_t token,
                                            std::uint32_t offset) {
  return p.bias[which] == nullptr ? nullptr : p.bias[which] + token * p.bias_row_stride[which] + offset;
}

}  // namespace anyep::cuda
