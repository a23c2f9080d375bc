// The home's side of a combine: a token's rows, wherever each rank keeps them, added up.
#pragma once

#include "cuda/device/mbarrier.cuh"
#include "cuda/kernels/combine_turn.cuh"
#include "cuda/kernels/row_sums.cuh"

namespace anyep::cuda {

inline constexpr int kSumStages = 2;

/// One warp sums tokens by ticket, straight from memory. `tickets` has drawn two.
template <class Type, class Access>
__device__ bool sum_tokens(const CombineLaunch& a, const Turn& turn, RankRows* ranks, Tickets tickets,
                           const Access& access) {
  const CombineParams& p = a.params;
  RowsOfRanks rows(a, turn, ranks);
  std::uint32_t now = tickets.next(), next = now + 1;
  std::int32_t row = rows.place(now);
  if (!rows.meet()) return false;
  for (const std::uint32_t end = rows.num_tokens(); now < end;) {
    const std::int32_t next_row = rows.place(next);
    if (__all_sync(kAllLanes, rows.arrive(lane_index(), row)) == 0) return false;
    __syncwarp();  // pattern B: one lane has acquired, all read
    const std::int64_t token = p.first_token + now;
    const RowFrame frame{out_row(p, token), bias_row(p, 0, token, 0), bias_row(p, 1, token, 0), a.plan.row_bytes / 16};
    const std::byte* const from = row >= 0 ? rows.row(lane_index(), row) : nullptr;
    sum_row<Type>(access, frame, from, __ballot_sync(kAllLanes, row >= 0));
    now = next;
    row = next_row;
    next = tickets.next();
  }
  bulk::read_before_credit();  // pattern L; the block's barrier follows
  return true;
}

/// One warp sums pieces of tokens by ticket, through shared memory: lane r bulk-loads from rank r.
template <class Type>
class BulkSums {
 public:
  __device__ BulkSums(const CombineLaunch& a, const Turn& turn, RankRows* ranks, std::byte* stages,
                      std::uint64_t* loaded)
      : a_(a), p_(a.params), rows_(a, turn, ranks), stages_(stages), loaded_(loaded) {}

  /// `tickets` has drawn three. False: a wait has failed. Nothing is in flight afterwards.
  __device__ bool run(Tickets tickets) {
    if (lane_index() == 0) mbarrier::init(loaded_, kSumStages);
    const std::uint32_t items = rows_.num_tokens() * a_.plan.pieces;
    std::uint32_t now = tickets.next(), next = now + 1, after = now + 2;
    std::int32_t row = place(now), next_row = place(next), after_row = place(after);
    if (!rows_.meet()) return false;  // also: the barriers are there
    bool ok = now >= items || load(now, 0, row);
    std::uint32_t turn = 0;
    for (; ok && now < items; ++turn) {
      bulk::used_before_copy();
      __syncwarp();  // pattern J: the other stage has been read
      if (next < items) ok = load(next, turn + 1, next_row);
      mbarrier::wait(loaded_[turn % kSumStages], turn / kSumStages % 2);
      sum(now, turn, __ballot_sync(kAllLanes, row >= 0));
      now = next;
      row = next_row;
      next = after;
      next_row = after_row;
      after = tickets.next();
      after_row = place(after);
    }
    return ok;  // a load that failed has issued nothing
  }

 private:
  __device__ std::uint32_t offset_of(std::uint32_t item) const { return item % a_.plan.pieces * a_.plan.piece_bytes; }
  __device__ std::uint32_t bytes_of(std::uint32_t item) const {
    return min(a_.plan.piece_bytes, a_.plan.row_bytes - offset_of(item));
  }
  __device__ std::int32_t place(std::uint32_t item) const { return rows_.place(item / a_.plan.pieces); }
  __device__ std::byte* stage(std::uint32_t turn, int rank) const {
    return stages_ +
           (turn % kSumStages * static_cast<std::uint32_t>(p_.team.num_ranks) + static_cast<std::uint32_t>(rank)) *
               a_.plan.piece_bytes;
  }

  [[nodiscard]] __device__ bool load(std::uint32_t item, std::uint32_t turn, std::int32_t row) {
    bool ok = true;
    if (row >= 0 && rows_.slotted(lane_index())) {
      ok = rows_.arrive(lane_index(), row);
      bulk::acquired_for_loads();  // pattern K, in the lane that loads
    }
    if (__all_sync(kAllLanes, ok) == 0) return false;
    std::uint64_t& loaded = loaded_[turn % kSumStages];
    const std::uint32_t bytes = bytes_of(item);
    const unsigned ranks = __ballot_sync(kAllLanes, row >= 0);
    if (lane_index() == 0) mbarrier::expect(loaded, static_cast<std::uint32_t>(__popc(ranks)) * bytes);
    if (row >= 0) bulk::load(stage(turn, lane_index()), rows_.row(lane_index(), row) + offset_of(item), bytes, loaded);
    return true;
  }

  /// kTwo: exactly ranks 0 and 1, no bias.
  template <bool kTwo>
  __device__ __forceinline__ void sum_vector(const RowFrame& frame, const std::byte* staged, unsigned ranks,
                                             std::uint32_t vector) {
    const auto at = [&](int rank) {
      return *reinterpret_cast<const uint4*>(staged + static_cast<std::uint32_t>(rank) * a_.plan.piece_bytes +
                                             vector * 16u);
    };
    if constexpr (kTwo) {
      WideAccess::write(frame.out + vector * 16u, sum_of_two<Type>(at(0), at(1)));
    } else {
      Sum<Type> sum = frame.start<Type>(WideAccess{}, vector * 16u);
      for (unsigned rest = ranks; rest != 0; rest &= rest - 1) sum.add(at(__ffs(static_cast<int>(rest)) - 1));
      WideAccess::write(frame.out + vector * 16u, sum.rounded());
    }
  }

  template <bool kTwo>
  __device__ __forceinline__ void sum_piece(const RowFrame& frame, const std::byte* staged, unsigned ranks) {
    constexpr std::uint32_t kUnroll = 7;
    std::uint32_t vector = static_cast<std::uint32_t>(lane_index());
    for (; vector - static_cast<std::uint32_t>(lane_index()) + kUnroll * kLanes <= frame.vectors;
         vector += kUnroll * kLanes) {
#pragma unroll
      for (std::uint32_t i = 0; i < kUnroll; ++i) sum_vector<kTwo>(frame, staged, ranks, vector + i * kLanes);
    }
    for (; vector < frame.vectors; vector += kLanes) sum_vector<kTwo>(frame, staged, ranks, vector);
  }

  __device__ void sum(std::uint32_t item, std::uint32_t turn, unsigned ranks) {
    const std::int64_t token = p_.first_token + item / a_.plan.pieces;
    const std::uint32_t offset = offset_of(item);
    const RowFrame frame{out_row(p_, token) + offset, bias_row(p_, 0, token, offset), bias_row(p_, 1, token, offset),
                         bytes_of(item) / 16};
    const std::byte* const staged = stage(turn, 0);
    if (ranks == 3 && !frame.has_bias()) {
      sum_piece<true>(frame, staged, ranks);
    } else {
      sum_piece<false>(frame, staged, ranks);
    }
  }

  const CombineLaunch& a_;
  const CombineParams& p_;
  RowsOfRanks rows_;
  std::byte* const stages_;
  std::uint64_t* const loaded_;
};

/// One warp sums the weights of 32 tokens a ticket: small rows, so many at once.
class WeightSums {
 public:
  __device__ WeightSums(const CombineLaunch& a, const Turn& turn, RankRows* ranks)
      : p_(a.params), rows_(a, turn, ranks) {}

  __device__ bool run(Tickets tickets) {
    if (!rows_.meet()) return false;
    const std::uint32_t chunks = (rows_.num_tokens() + kLanes - 1) / kLanes;
    for (std::uint32_t chunk = tickets.next(); chunk < chunks; chunk = tickets.next()) {
      if (!sum(chunk * kLanes)) return false;
    }
    bulk::read_before_credit();  // pattern L; the block's barrier follows
    return true;
  }

 private:
  /// Tokens first..first+31 of the turn.
  __device__ bool sum(std::uint32_t first) {
    const std::uint32_t token = first + static_cast<std::uint32_t>(lane_index()), tokens = rows_.num_tokens();
    std::int32_t row[kMaxRanks];  // of the lane's token
    bool ok = true;
#pragma unroll
    for (int rank = 0; rank < kMaxRanks; ++rank) {
      row[rank] = -1;
      if (rank >= p_.team.num_ranks) continue;
      if (token < tokens) row[rank] = rows_.place(token, rank);
      ok = ok && rows_.arrive(rank, row[rank]);
    }
    if (__all_sync(kAllLanes, ok) == 0) return false;
    __syncwarp();  // pattern B: any lane may read what another has acquired
    const auto columns = static_cast<std::uint32_t>(p_.num_weights), count = columns * kLanes;
    for (std::uint32_t step = 0; step < count; step += kLanes) {
      const std::uint32_t element = step + static_cast<std::uint32_t>(lane_index());
      const std::uint32_t in_chunk = element / columns, column = element - in_chunk * columns;
      float weights[kMaxRanks];
      bool there[kMaxRanks];
#pragma unroll
      for (int rank = 0; rank < kMaxRanks; ++rank) {
        if (rank >= p_.team.num_ranks) break;
        const std::int32_t at = from_lane(row[rank], static_cast<int>(in_chunk));
        there[rank] = at >= 0;
        if (at >= 0) weights[rank] = rows_.weights(rank, at)[column];
      }
      float sum = 0;
#pragma unroll
      for (int rank = 0; rank < kMaxRanks; ++rank) {
        if (rank >= p_.team.num_ranks) break;
        if (there[rank]) sum += weights[rank];
      }
      if (first + in_chunk >= tokens) continue;
      p_.out_weights[(p_.first_token + first + in_chunk) * columns + column] = sum;
    }
    return true;
  }

  const CombineParams& p_;
  RowsOfRanks rows_;
};

}  // namespace anyep::cuda
