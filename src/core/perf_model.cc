#include "core/perf_model.h"

#include <fmt/format.h>

#include <algorithm>

#include "core/check.h"
#include "core/routing.h"

namespace anyep::core {

// 1 - C(E - L, K) / C(E, K): the quotient is the chance that K draws without repetition all miss the rank's L experts.
double chance_of_rank(int local_experts, int num_experts, int top_k) {
  double all_miss = 1;
  for (int draw = 0; draw < top_k; ++draw) {
    const int elsewhere = std::max(num_experts - local_experts - draw, 0);
    all_miss *= static_cast<double>(elsewhere) / static_cast<double>(num_experts - draw);
  }
  return 1 - all_miss;
}

Traffic uniform_traffic(int num_ranks, int num_experts, int top_k) {
  constexpr std::string_view kOp = "uniform_traffic";
  if (num_ranks < 1) throw_argument(kOp, "num_ranks", fmt::format("{}", num_ranks), ">= 1");
  if (num_experts < 1) throw_argument(kOp, "num_experts", fmt::format("{}", num_experts), ">= 1");
  if (top_k < 1 || top_k > num_experts) {
    throw_argument(kOp, "top_k", fmt::format("{}", top_k), fmt::format("1..num_experts = {}", num_experts));
  }
  // Blocks differ by one expert at most, so there are two kinds of ranks: the first E % R, and the others.
  const double larger = chance_of_rank(expert_block(num_experts, num_ranks, 0).count, num_experts, top_k);
  const double smaller = chance_of_rank(expert_block(num_experts, num_ranks, num_ranks - 1).count, num_experts, top_k);
  const int num_larger = num_experts % num_ranks;

  Traffic traffic;
  traffic.distinct_ranks = num_larger * larger + (num_ranks - num_larger) * smaller;
  traffic.own = traffic.distinct_ranks / num_ranks;
  traffic.wire = std::max(traffic.distinct_ranks - smaller, (num_ranks - 1) * larger);
  traffic.copied = num_ranks * larger;
  traffic.per_expert = static_cast<double>(top_k) * (num_ranks - 1) / num_ranks;
  return traffic;
}

WireRows count_wire_rows(std::span<const std::int64_t> rows, int num_ranks) {
  constexpr std::string_view kOp = "count_wire_rows";
  if (num_ranks < 1 || rows.size() != static_cast<std::size_t>(num_ranks) * static_cast<std::size_t>(num_ranks)) {
    throw_argument(kOp, "rows.size()", fmt::format("{}", rows.size()), fmt::format("num_ranks^2, {}", num_ranks));
  }
  const auto sent = [&](int source, int destination) {
    const std::int64_t count = rows[static_cast<std::size_t>(source) * static_cast<std::size_t>(num_ranks) +
                                    static_cast<std::size_t>(destination)];
    if (count < 0) throw_argument(kOp, "rows", fmt::format("{}", count), ">= 0");
    return count;
  };
  WireRows result;
  for (int rank = 0; rank < num_ranks; ++rank) {
    std::int64_t out = 0;
    std::int64_t in = 0;
    for (int peer = 0; peer < num_ranks; ++peer) {
      if (peer == rank) continue;
      out += sent(rank, peer);
      in += sent(peer, rank);
    }
    const std::int64_t own = sent(rank, rank);
    result.own += own;
    result.total += out;
    result.most_received = std::max(result.most_received, in + own);
    if (std::max(out, in) > result.busiest) {
      result.busiest = std::max(out, in);
      result.busiest_rank = rank;
      result.busiest_is_inbound = in > out;
    }
  }
  return result;
}

std::int64_t counted_row_bytes(std::int64_t hidden, std::int64_t element_bytes, std::int64_t num_scales) {
  constexpr std::int64_t kScaleBytes = 4;
  return hidden * element_bytes + num_scales * kScaleBytes;
}

double floor_us(double rows, std::int64_t row_bytes, double gbs) {
  constexpr double kBytesPerUsAtOneGbs = 1000;
  return gbs > 0 ? rows * static_cast<double>(row_bytes) / (gbs * kBytesPerUsAtOneGbs) : 0;
}

PairFloor pair_floor(const PairShape& shape) {
  PairFloor result;
  result.dispatch_us = floor_us(shape.wire_rows, shape.dispatch_row_bytes, shape.gbs);
  result.combine_us = floor_us(shape.wire_rows, shape.combine_row_bytes, shape.gbs);
  result.pair_us = result.dispatch_us + result.combine_us + 2 * shape.flag_us;
  return result;
}

}  // namespace anyep::core
