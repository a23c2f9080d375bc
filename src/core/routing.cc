#include "core/routing.h"

#include <cstddef>

namespace anyep::core {

ExpertIds::ExpertIds(const TensorView& ids, int num_experts)
    : data_(ids.data),
      wide_(ids.dtype == DType::kI64),
      top_k_(static_cast<int>(ids.shape[1])),
      num_experts_(num_experts),
      num_tokens_(ids.shape[0]),
      token_stride_(ids.strides[0]),
      choice_stride_(ids.strides[1]) {}

std::uint64_t ExpertIds::count_out_of_range() const {
  std::uint64_t count = 0;
  for (std::int64_t token = 0; token < num_tokens_; ++token) {
    for (int choice = 0; choice < top_k_; ++choice) {
      const std::int64_t value = raw(token, choice);
      count += value < -1 || value >= num_experts_;
    }
  }
  return count;
}

Layout count_layout(const ExpertIds& ids, int num_experts, int num_ranks) {
  Layout layout;
  layout.tokens_per_rank.assign(static_cast<std::size_t>(num_ranks), 0);
  layout.pairs_per_expert.assign(static_cast<std::size_t>(num_experts), 0);
  layout.token_in_rank.assign(static_cast<std::size_t>(ids.num_tokens() * num_ranks), 0);
  std::vector<std::int32_t> home(static_cast<std::size_t>(num_experts));
  for (int expert = 0; expert < num_experts; ++expert) {
    home[static_cast<std::size_t>(expert)] = rank_of_expert(num_experts, num_ranks, expert);
  }
  for (std::int64_t token = 0; token < ids.num_tokens(); ++token) {
    std::uint8_t* const in_rank = layout.token_in_rank.data() + token * num_ranks;
    for (int choice = 0; choice < ids.top_k(); ++choice) {
      const int expert = ids.at(token, choice);
      if (expert < 0) continue;
      ++layout.pairs_per_expert[static_cast<std::size_t>(expert)];
      const auto rank = static_cast<std::size_t>(home[static_cast<std::size_t>(expert)]);
      layout.tokens_per_rank[rank] += in_rank[rank] == 0;
      in_rank[rank] = 1;
    }
  }
  return layout;
}

std::vector<std::int32_t> places(std::span<const std::uint8_t> token_in_rank, int num_ranks,
                                 std::span<const std::int64_t> first) {
  std::vector<std::int32_t> place(token_in_rank.size());
  std::vector<std::int64_t> next(first.begin(), first.end());
  for (std::size_t at = 0; at < token_in_rank.size(); ++at) {
    std::int64_t& row = next[at % static_cast<std::size_t>(num_ranks)];
    place[at] = token_in_rank[at] != 0 ? static_cast<std::int32_t>(row++) : -1;
  }
  return place;
}

}  // namespace anyep::core
