// Where each token's row lies at each rank, in the form that notify leaves it in: two levels, so that it needs one pass.
#pragma once

#include <cstdint>

namespace anyep::cuda {

/// row(token, rank) = place[token * num_ranks + rank] + before[token / tokens_per_range * num_ranks + rank];
/// a negative place = not sent there. An adopted handle has final rows in `place` and no `before`.
struct Places {
  const std::int32_t* place = nullptr;   ///< [num_tokens, num_ranks]
  const std::int32_t* before = nullptr;  ///< [ranges, num_ranks]; null = zeros
  int tokens_per_range = 1;
  int num_tokens = 0;
};

}  // namespace anyep::cuda
