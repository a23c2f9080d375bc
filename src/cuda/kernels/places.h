// Where each token's row lies at each rank, in the form that notify leaves it in: two levels, so that it needs one pass.
#pragma once

#include <cstdint>

#include "core/hd.h"

namespace anyep::cuda {

/// row(token, rank) = place[token * num_ranks + rank] + before[token / tokens_per_range * num_ranks + rank];
/// a negative place = not sent there. An adopted handle has final rows in `place` and no `before`.
struct Places {
  const std::int32_t* place = nullptr;   ///< [num_tokens, num_ranks]
  const std::int32_t* before = nullptr;  ///< [ranges, num_ranks]; null = zeros
  int tokens_per_range = 1;              ///< at least 1
  int num_tokens = 0;

  /// -1 = not sent there. The two loads do not wait for each other.
  ANYEP_HD std::int32_t row(std::uint32_t token, int rank, int num_ranks) const {
    const auto ranks = static_cast<std::uint32_t>(num_ranks), at = static_cast<std::uint32_t>(rank);
    const std::int32_t inside = place[std::uint64_t{token} * ranks + at];
    const std::int32_t first =
        before != nullptr ? before[token / static_cast<std::uint32_t>(tokens_per_range) * ranks + at] : 0;
    return inside < 0 ? -1 : inside + first;
  }
};

}  // namespace anyep::cuda
