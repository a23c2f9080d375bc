// Which experts every rank's tokens choose: the routing input of tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace anyep::test {

/// ids[rank] is [num_tokens, top_k], global experts.
struct Choices {
  int num_experts = 0, top_k = 0;
  std::vector<std::vector<std::int64_t>> ids = {};

  int num_ranks() const { return static_cast<int>(ids.size()); }
  std::int64_t num_tokens(int rank) const {
    return static_cast<std::int64_t>(ids[static_cast<std::size_t>(rank)].size()) / top_k;
  }
  std::int64_t at(int rank, std::int64_t token, int slot) const {
    return ids[static_cast<std::size_t>(rank)][static_cast<std::size_t>(token * top_k + slot)];
  }
  std::int64_t most_tokens() const;
};

/// Shares of choices, in percent, that are not an ordinary expert.
struct Spice {
  int unused = 0;        ///< -1
  int duplicate = 0;     ///< the expert of the slot before
  int out_of_range = 0;  ///< -2, num_experts, 2^32 + 3, the ends of 64 (or 32) bits, ...
  bool fits_32_bits = false;
};

struct ChoicesShape {
  int num_experts = 8, top_k = 2;
  std::vector<std::int64_t> tokens = {};  ///< per rank
};

/// Distinct experts per token, drawn uniformly; then the spice.
Choices random_choices(std::uint64_t seed, const ChoicesShape& shape, const Spice& spice = {});
/// Every token chooses the experts first, first + 1, ... (modulo the number of experts).
Choices all_to(int first, const ChoicesShape& shape);

/// `num_ranks` token counts between 0 and `most` that differ, zero among them when there are three ranks or more.
std::vector<std::int64_t> ragged(int num_ranks, std::int64_t most);
std::vector<std::int64_t> equal(int num_ranks, std::int64_t tokens);

}  // namespace anyep::test
