// The semantics of routing as loops: which rank hosts an expert, counts, places.
#pragma once

#include <anyep/types.h>

#include <cstdint>
#include <span>
#include <vector>

#include "core/hd.h"

namespace anyep::core {

/// A rank's contiguous block of experts.
struct ExpertBlock {
  int first = 0;
  int count = 0;
};

/// base = E / R experts each, the first E % R ranks one more.
ANYEP_HD constexpr ExpertBlock expert_block(int num_experts, int num_ranks, int rank) {
  const int base = num_experts / num_ranks;
  const int rest = num_experts % num_ranks;
  return {rank * base + (rank < rest ? rank : rest), base + (rank < rest ? 1 : 0)};
}

/// The rank that hosts `expert` (0 <= expert < num_experts).
ANYEP_HD constexpr int rank_of_expert(int num_experts, int num_ranks, int expert) {
  const int base = num_experts / num_ranks;
  const int rest = num_experts % num_ranks;
  const int in_larger_blocks = rest * (base + 1);
  return expert < in_larger_blocks ? expert / (base + 1) : rest + (expert - in_larger_blocks) / base;
}

/// Ids of one rank, checked: int32 or int64, any strides; out of range counts as -1, compared before narrowing.
class ExpertIds {
 public:
  ExpertIds() = default;
  ExpertIds(const TensorView& ids, int num_experts);

  std::int64_t num_tokens() const { return num_tokens_; }
  int top_k() const { return top_k_; }
  /// The expert, or -1.
  int at(std::int64_t token, int choice) const {
    const std::int64_t value = raw(token, choice);
    return value >= 0 && value < num_experts_ ? static_cast<int>(value) : -1;
  }
  std::int64_t raw(std::int64_t token, int choice) const {
    const std::int64_t index = token * token_stride_ + choice * choice_stride_;
    return wide_ ? static_cast<const std::int64_t*>(data_)[index] : static_cast<const std::int32_t*>(data_)[index];
  }
  /// How many ids are neither -1 nor an expert.
  std::uint64_t count_out_of_range() const;

 private:
  const void* data_ = nullptr;
  bool wide_ = false;
  int top_k_ = 0, num_experts_ = 0;
  std::int64_t num_tokens_ = 0, token_stride_ = 0, choice_stride_ = 0;
};

/// Which ranks each token goes to and how often each expert is chosen.
Layout count_layout(const ExpertIds& ids, int num_experts, int num_ranks);

/// place[token][rank]: first[rank] + number of earlier tokens that go to the rank; -1 = not sent there.
/// `token_in_rank` is [num_tokens, num_ranks], 0 or 1. `first` = row where this source's range begins at each rank.
std::vector<std::int32_t> places(std::span<const std::uint8_t> token_in_rank, int num_ranks,
                                 std::span<const std::int64_t> first);

}  // namespace anyep::core
