#include "bench/support/budget.h"

#include <algorithm>

#include "core/buffers.h"

namespace anyep::bench {

std::int64_t rows_bytes_for(std::int64_t heap_bytes, int num_ranks) {
  // Rings take a fixed share until they are as large as they get.
  const auto share = static_cast<std::int64_t>(core::kRingShare);
  const std::int64_t regions = num_ranks * static_cast<std::int64_t>(core::kRegions);
  const std::int64_t rings = regions * static_cast<std::int64_t>(core::kMaxSlotRegionBytes) +
                             static_cast<std::int64_t>(core::kRegions * core::kMaxStagingRegionBytes);
  return std::max(share * rings, heap_bytes + rings);
}

std::int64_t most_rows_bytes(int num_ranks, std::int64_t tokens_per_rank, std::int64_t row_bytes) {
  constexpr std::int64_t kSlack = 1 << 20;  // alignment of each array
  return num_ranks * tokens_per_rank * row_bytes + kSlack;
}

}  // namespace anyep::bench
