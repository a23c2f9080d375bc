#include <anyep/workload.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <numeric>

#include "core/check.h"
#include "core/routing.h"
#include "workload/batch.h"
#include "workload/math.h"

namespace anyep::workload {
namespace {

constexpr double kLn2 = 0x1.62e42fefa39efp-1;

double ratio(double part, double whole) {
  return whole > 0 ? part / whole : 0;
}

double max_over_mean(std::span<const std::int64_t> load) {
  const double sum = static_cast<double>(std::accumulate(load.begin(), load.end(), std::int64_t{0}));
  const auto most = static_cast<double>(*std::max_element(load.begin(), load.end()));
  return ratio(most * static_cast<double>(load.size()), sum);
}

void describe_experts(Statistics& result) {
  std::vector<std::int64_t> load = result.pairs_per_expert;
  std::sort(load.begin(), load.end());
  const auto size = static_cast<double>(load.size());
  const auto total = static_cast<double>(result.pairs);
  double ranked = 0;
  for (std::size_t place = 0; place < load.size(); ++place) {
    const auto count = static_cast<double>(load[place]);
    ranked += (2 * static_cast<double>(place + 1) - size - 1) * count;
    if (count > 0) result.entropy_bits -= count / total * log(count / total) / kLn2;
  }
  result.gini = ratio(ranked, size * total);
  const auto fifth = static_cast<std::ptrdiff_t>(std::max(1.0, size / 5));
  const std::int64_t top = std::accumulate(load.end() - fifth, load.end(), std::int64_t{0});
  result.top_fifth_share = ratio(static_cast<double>(top), total);
  result.expert_max_over_mean = max_over_mean(result.pairs_per_expert);
}

/// One token's choices into the counts. `seen_at[rank]` is the last token that was counted there.
void count_token(std::span<const std::int64_t> ids, std::int64_t token, Statistics& result,
                 std::vector<std::int64_t>& seen_at) {
  const auto num_experts = static_cast<int>(result.pairs_per_expert.size());
  const auto num_ranks = static_cast<int>(result.rows_per_rank.size());
  for (std::size_t choice = 0; choice < ids.size(); ++choice) {
    const std::int64_t id = ids[choice];
    if (id < 0) continue;
    const auto rank = static_cast<std::size_t>(core::rank_of_expert(num_experts, num_ranks, static_cast<int>(id)));
    ++result.pairs;
    ++result.pairs_per_expert[static_cast<std::size_t>(id)];
    ++result.pairs_per_rank[rank];
    const auto earlier = ids.first(choice);
    if (std::find(earlier.begin(), earlier.end(), id) != earlier.end()) ++result.duplicate_pairs;
    if (seen_at[rank] != token) {
      seen_at[rank] = token;
      ++result.rows;
      ++result.rows_per_rank[rank];
    }
  }
}

void check_range(std::string_view argument, int got, int most) {
  if (got >= 1 && got <= most) return;
  core::throw_argument("measure", argument, fmt::format("{}", got), fmt::format("1..{}", most));
}

}  // namespace

Statistics measure(const Batch& batch, int num_experts, int num_ranks) {
  check_range("num_experts", num_experts, 1 << 24);
  check_range("num_ranks", num_ranks, 1 << 16);
  check_batch("measure", batch, num_experts);
  Statistics result;
  result.tokens = batch.num_tokens();
  result.pairs_per_expert.assign(static_cast<std::size_t>(num_experts), 0);
  result.pairs_per_rank.assign(static_cast<std::size_t>(num_ranks), 0);
  result.rows_per_rank.assign(static_cast<std::size_t>(num_ranks), 0);
  const auto top_k = static_cast<std::size_t>(batch.top_k);
  std::vector<std::int64_t> seen_at(static_cast<std::size_t>(num_ranks), -1);
  std::int64_t unrouted = 0;
  for (std::int64_t token = 0; token < result.tokens; ++token) {
    const std::int64_t rows_before = result.rows;
    count_token(std::span(batch.experts).subspan(static_cast<std::size_t>(token) * top_k, top_k), token, result,
                seen_at);
    unrouted += result.rows == rows_before ? 1 : 0;
  }
  const auto tokens = static_cast<double>(result.tokens);
  const auto choices = static_cast<double>(batch.experts.size());
  result.unused_share = ratio(choices - static_cast<double>(result.pairs), choices);
  result.unrouted_share = ratio(static_cast<double>(unrouted), tokens);
  result.distinct_ranks_per_token = ratio(static_cast<double>(result.rows), tokens);
  result.rank_rows_max_over_mean = max_over_mean(result.rows_per_rank);
  result.rank_pairs_max_over_mean = max_over_mean(result.pairs_per_rank);
  describe_experts(result);
  return result;
}

std::string Statistics::to_text() const {
  return fmt::format(
      "tokens {}, pairs {}, rows {}, ranks per token {:.2f}, unused {:.1f} %, whole tokens unused {:.1f} %, duplicates "
      "{}\n"
      "max/mean: ranks by rows {:.3f}, ranks by pairs {:.3f}, experts {:.2f}; experts: Gini {:.3f}, entropy {:.2f} of "
      "{:.2f} "
      "bits, top fifth {:.1f} %",
      tokens, pairs, rows, distinct_ranks_per_token, 100 * unused_share, 100 * unrouted_share, duplicate_pairs,
      rank_rows_max_over_mean, rank_pairs_max_over_mean, expert_max_over_mean, gini, entropy_bits,
      log(static_cast<double>(std::max<std::size_t>(1, pairs_per_expert.size()))) / kLn2, 100 * top_fifth_share);
}

}  // namespace anyep::workload
