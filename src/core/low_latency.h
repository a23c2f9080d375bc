// The form of one low-latency call: what its records and rows hold. Both ends compute it from the shape and the options
// alone.
#pragma once

#include <anyep/config.h>

#include <algorithm>
#include <cstdint>

#include "core/fp8.h"
#include "core/layout.h"
#include "core/logfmt.h"
#include "core/routing.h"

namespace anyep::core {

/// Local experts of the rank that has most: layouts are cut for it, so that both ends agree.
constexpr std::int64_t most_local_experts(int num_experts, int num_ranks) {
  return expert_block(num_experts, num_ranks, 0).count;
}
/// Distinct experts that one token can have at one rank.
constexpr std::int64_t most_choices_per_rank(const Shape& shape, int num_ranks) {
  return std::min<std::int64_t>(shape.top_k, most_local_experts(shape.num_experts, num_ranks));
}

/// A dispatched row: payload and 4-byte scale words.
constexpr std::int64_t dispatch_payload_bytes(const Shape& shape, Wire wire) {
  return wire == Wire::kBF16 ? 2 * shape.hidden : shape.hidden;
}
constexpr std::int64_t num_dispatch_scales(const Shape& shape, Wire wire) {
  if (wire == Wire::kFP8) return num_fp8_scales(shape.hidden);
  return wire == Wire::kUE8M0 ? num_packed_scales(shape.hidden) : 0;
}
constexpr DispatchRegionLayout dispatch_region(const Shape& shape, int num_ranks, Wire wire) {
  return DispatchRegionLayout::make(static_cast<std::uint64_t>(most_local_experts(shape.num_experts, num_ranks)),
                                    static_cast<std::uint64_t>(most_choices_per_rank(shape, num_ranks)),
                                    static_cast<std::uint64_t>(num_dispatch_scales(shape, wire)) * 4,
                                    static_cast<std::uint64_t>(dispatch_payload_bytes(shape, wire)),
                                    static_cast<std::uint64_t>(shape.max_tokens));
}

/// The expert rank adds a token's rows up when it may wait for the weights and the arithmetic allows it; otherwise one
/// row per choice travels (a hook's send half waits for nobody; LogFMT codes rows; exact arithmetic rounds once, at the
/// source).
constexpr bool sums_at_expert_rank(const LowLatencyOptions& options, bool exact) {
  return !options.hook && options.wire != Wire::kLogFMT && !exact;
}
constexpr std::int64_t combine_row_bytes(const Shape& shape, Wire wire) {
  return wire == Wire::kLogFMT ? logfmt_max_bytes(shape.hidden) : 2 * shape.hidden;
}
constexpr CombineRegionLayout combine_region(const Shape& shape, int num_ranks, bool sums, Wire wire) {
  const std::int64_t rows_per_token = sums ? 1 : most_choices_per_rank(shape, num_ranks);
  return CombineRegionLayout::make(
      sums ? static_cast<std::uint64_t>(shape.top_k) : 0, static_cast<std::uint64_t>(rows_per_token),
      static_cast<std::uint64_t>(combine_row_bytes(shape, wire)), static_cast<std::uint64_t>(shape.max_tokens));
}

}  // namespace anyep::core
