// How many rows an op must move, and the least time that takes at a given rate. Wire rows are deduplicated (token,
// rank) pairs that leave a rank or reach it; own rows stay. Pure arithmetic: the rates are measured elsewhere.
#pragma once

#include <cstdint>
#include <span>

namespace anyep::core {

/// Rows per token when every rank brings the same number of tokens and each token draws top_k distinct experts
/// uniformly. Ranks differ where experts do not divide by ranks: `wire` and `copied` belong to the busiest rank.
struct Traffic {
  double distinct_ranks = 0;  ///< ranks that a token goes to, own included
  double wire = 0;            ///< rows in the busiest direction of the busiest rank
  double own = 0;             ///< rows that stay on their rank, mean over ranks
  double copied = 0;          ///< rows that the busiest rank receives, own included: what CPU ranks copy
  double per_expert = 0;      ///< rows that would leave a rank if each choice travelled, mean over ranks
};

/// @throws Error kArgument unless 1 <= num_ranks and 1 <= top_k <= num_experts.
Traffic uniform_traffic(int num_ranks, int num_experts, int top_k);

/// The chance that one token with uniform choices goes to a rank with `local_experts` experts.
double chance_of_rank(int local_experts, int num_experts, int top_k);

/// Rows of a real routing.
struct WireRows {
  std::int64_t busiest = 0;  ///< max over ranks of max(out, in), own rows left out
  int busiest_rank = 0;      ///< the lowest rank that has it
  bool busiest_is_inbound = false;
  std::int64_t total = 0;          ///< that leave any rank
  std::int64_t own = 0;            ///< that stay, over all ranks
  std::int64_t most_received = 0;  ///< max over ranks of the rows received, own included
};

/// `rows` is [num_ranks, num_ranks]: tokens of the source (row) that go to the destination (column), each once
/// (Layout::tokens_per_rank of every source). @throws Error kArgument for another size or a negative number.
WireRows count_wire_rows(std::span<const std::int64_t> rows, int num_ranks);

/// Bytes of one row as rates count them: payload and scales, without side data.
std::int64_t counted_row_bytes(std::int64_t hidden, std::int64_t element_bytes, std::int64_t num_scales = 0);

/// Rows * bytes at `gbs` (10^9 bytes per second), in microseconds; 0 when no rate is known (gbs <= 0).
double floor_us(double rows, std::int64_t row_bytes, double gbs);

/// A decode step: dispatch, combine, and one flag each way.
struct PairFloor {
  double dispatch_us = 0, combine_us = 0, pair_us = 0;
};
struct PairShape {
  double wire_rows = 0;  ///< of one direction, both ops alike
  std::int64_t dispatch_row_bytes = 0, combine_row_bytes = 0;
  double gbs = 0, flag_us = 0;
};
PairFloor pair_floor(const PairShape& shape);

}  // namespace anyep::core
