// What the sweeps of CPU ranks and of GPU ranks share: where numbers lie on the board, and the figures made of them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bench/support/memory_copy.h"
#include "cli/sweep.h"

namespace anyep::cli {

/// Decode is measured as a loop of pairs without a barrier in between; a figure is the loop over its length.
inline constexpr int kPairsPerIteration = 20;

inline std::int64_t most_tokens(const workload::Batch& batch) {
  return *std::max_element(batch.tokens_per_rank.begin(), batch.tokens_per_rank.end());
}
inline bool is_pair(const FigureSpec& figure) {
  return figure.op == BenchOp::kPair;
}

/// Low-latency memory that a pair of this figure needs.
inline std::int64_t pair_bytes(const SweepOptions& options, const FigureSpec& figure) {
  Shape shape;
  shape.num_experts = options.batches.front().num_experts;
  shape.top_k = options.model.top_k;
  shape.hidden = options.model.hidden;
  shape.max_tokens = figure.tokens;
  return low_latency_bytes_for(shape, options.team.num_ranks);
}

/// Series on the board: a time and a number of wrong elements per figure, rows per figure, copies.
struct SeriesOf {
  int figures = 0;
  int time(int figure) const { return figure; }
  int wrong(int figure) const { return figures + figure; }
  int wire_rows(int figure) const { return 2 * figures + figure; }
  int logical_rows(int figure) const { return 3 * figures + figure; }
  int copy(int method) const { return 4 * figures + method; }
  int count() const { return copy(bench::MemoryCopy::kNumMethods); }
};

bench::Figure figure_of(const SweepOptions& options, int index, const Board& board, double ceiling_gbs);
/// @throws UsageError where this build has no CUDA backend
SweepResult run_gpu_sweep(const SweepOptions& options);

}  // namespace anyep::cli
