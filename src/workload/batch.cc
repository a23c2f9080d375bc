#include "workload/batch.h"

#include <fmt/format.h>

#include <cstddef>
#include <numeric>

#include "core/check.h"

namespace anyep::workload {
namespace {

void check_size(std::string_view op, std::string_view what, std::size_t got, std::uint64_t needed) {
  if (got == needed) return;
  core::throw_argument(op, what, fmt::format("{} entries", got), fmt::format("{}, tokens times top_k", needed));
}

}  // namespace

void check_batch(std::string_view op, const Batch& batch, std::int64_t num_experts) {
  if (batch.top_k < 1) core::throw_argument(op, "batch.top_k", fmt::format("{}", batch.top_k), "1 or more");
  std::uint64_t tokens = 0;
  for (const std::int64_t count : batch.tokens_per_rank) {
    constexpr std::int64_t kMost = std::int64_t{1} << 40;
    if (count < 0 || count > kMost) {
      core::throw_argument(op, "batch.tokens_per_rank", fmt::format("{}", count), fmt::format("0..{}", kMost));
    }
    tokens += static_cast<std::uint64_t>(count);
  }
  check_size(op, "batch.experts", batch.experts.size(), tokens * static_cast<std::uint64_t>(batch.top_k));
  check_size(op, "batch.weights", batch.weights.size(), tokens * static_cast<std::uint64_t>(batch.top_k));
  for (std::size_t index = 0; index < batch.experts.size(); ++index) {
    const std::int64_t id = batch.experts[index];
    if (id >= -1 && id < num_experts) continue;
    const std::size_t top_k = static_cast<std::size_t>(batch.top_k);
    core::throw_argument(op, fmt::format("batch.experts[{}][{}]", index / top_k, index % top_k), fmt::format("{}", id),
                         fmt::format("-1..{}", num_experts - 1));
  }
}

std::int64_t Batch::num_tokens() const {
  return std::accumulate(tokens_per_rank.begin(), tokens_per_rank.end(), std::int64_t{0});
}

std::int64_t Batch::first_token(int rank) const {
  return std::accumulate(tokens_per_rank.begin(), tokens_per_rank.begin() + rank, std::int64_t{0});
}

std::span<const std::int64_t> Batch::experts_of(int rank) const {
  return std::span(experts).subspan(static_cast<std::size_t>(first_token(rank) * top_k),
                                    static_cast<std::size_t>(num_tokens(rank) * top_k));
}

std::span<const float> Batch::weights_of(int rank) const {
  return std::span(weights).subspan(static_cast<std::size_t>(first_token(rank) * top_k),
                                    static_cast<std::size_t>(num_tokens(rank) * top_k));
}

Batch split(const Batch& batch, int num_ranks) {
  if (num_ranks < 1) core::throw_argument("split", "num_ranks", fmt::format("{}", num_ranks), "1 or more");
  Batch cut = batch;
  const std::int64_t base = batch.num_tokens() / num_ranks;
  const std::int64_t rest = batch.num_tokens() % num_ranks;
  cut.tokens_per_rank.resize(static_cast<std::size_t>(num_ranks));
  for (int rank = 0; rank < num_ranks; ++rank) {
    cut.tokens_per_rank[static_cast<std::size_t>(rank)] = base + (rank < rest ? 1 : 0);
  }
  return cut;
}

}  // namespace anyep::workload
