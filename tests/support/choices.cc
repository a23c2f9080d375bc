#include "support/choices.h"

#include <algorithm>
#include <array>
#include <limits>

#include "support/payload.h"

namespace anyep::test {
namespace {

std::int64_t stray_id(std::uint64_t random, int num_experts, bool fits_32_bits) {
  const std::array<std::int64_t, 8> ids = {num_experts,
                                           -2,
                                           std::numeric_limits<std::int32_t>::max(),
                                           std::numeric_limits<std::int32_t>::min(),
                                           (std::int64_t{1} << 32) + num_experts / 2,
                                           -(std::int64_t{1} << 32),
                                           std::numeric_limits<std::int64_t>::max(),
                                           std::numeric_limits<std::int64_t>::min()};
  return ids[random % (fits_32_bits ? 4 : ids.size())];
}

}  // namespace

std::int64_t Choices::most_tokens() const {
  std::int64_t most = 0;
  for (int rank = 0; rank < num_ranks(); ++rank) most = std::max(most, num_tokens(rank));
  return most;
}

Choices random_choices(std::uint64_t seed, const ChoicesShape& shape, const Spice& spice) {
  Choices choices{shape.num_experts, shape.top_k, {}};
  std::vector<std::int64_t> deck(static_cast<std::size_t>(shape.num_experts));
  for (std::size_t rank = 0; rank < shape.tokens.size(); ++rank) {
    std::vector<std::int64_t>& ids = choices.ids.emplace_back();
    for (std::int64_t token = 0; token < shape.tokens[rank]; ++token) {
      for (std::size_t i = 0; i < deck.size(); ++i) deck[i] = static_cast<std::int64_t>(i);
      for (int slot = 0; slot < shape.top_k; ++slot) {
        const auto place = static_cast<std::size_t>(slot);
        const std::uint64_t random = mix(seed, rank, static_cast<std::uint64_t>(token), place);
        std::swap(deck[place], deck[place + (random >> 32) % (deck.size() - place)]);
        std::int64_t id = deck[place];
        const int percent = static_cast<int>(random % 100);
        if (percent < spice.unused)
          id = -1;
        else if (percent < spice.unused + spice.out_of_range)
          id = stray_id(random / 100, shape.num_experts, spice.fits_32_bits);
        else if (percent < spice.unused + spice.out_of_range + spice.duplicate && slot > 0)
          id = ids.back();
        ids.push_back(id);
      }
    }
  }
  return choices;
}

Choices all_to(int first, const ChoicesShape& shape) {
  Choices choices{shape.num_experts, shape.top_k, {}};
  for (const std::int64_t tokens : shape.tokens) {
    std::vector<std::int64_t>& ids = choices.ids.emplace_back();
    for (std::int64_t token = 0; token < tokens; ++token) {
      for (int slot = 0; slot < shape.top_k; ++slot) ids.push_back((first + slot) % shape.num_experts);
    }
  }
  return choices;
}

std::vector<std::int64_t> ragged(int num_ranks, std::int64_t most) {
  std::vector<std::int64_t> tokens;
  for (int rank = 0; rank < num_ranks; ++rank)
    tokens.push_back(rank == 1 && num_ranks > 2 ? 0 : most * (rank + 1) / num_ranks);
  return tokens;
}

std::vector<std::int64_t> equal(int num_ranks, std::int64_t tokens) {
  return std::vector<std::int64_t>(static_cast<std::size_t>(num_ranks), tokens);
}

}  // namespace anyep::test
