// Low-latency dispatch and combine: all ranks' tokens -> slabs per expert, and back.
#pragma once

#include <anyep/config.h>
#include <anyep/handle.h>
#include <anyep/types.h>

#include "reference/routing.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace anyep::reference {

/// What low-latency dispatch writes on one rank; S = num_ranks * max_tokens. Rows from counts[e] on are zero here and
/// garbage in an engine.
struct Slabs {
  int local_experts = 0;
  std::int64_t rows_per_expert = 0;  ///< S
  std::vector<std::byte> x;          ///< [local_experts, S, hidden]
  std::vector<std::byte> scales;     ///< [local_experts, P, S], 4 bytes each: token fastest; empty without FP8
  std::vector<std::int32_t> counts;  ///< [local_experts]
  std::vector<std::int32_t> source;  ///< [local_experts, S]
  std::vector<std::int64_t> range;   ///< [local_experts, num_ranks]: (begin << 32) | count
};

/// Scale columns of a row in a slab: float32 per 128 elements, or four packed exponents per int32.
std::int64_t scale_columns(Wire wire, std::int64_t hidden);

/// How dispatch casts rows (specification 10.1).
struct CastRule {
  Wire wire = Wire::kBF16;
  bool round_scale = false;
};

/// Rows of an expert in (source rank, source token) order, one per (token, expert).
std::vector<Slabs> low_latency_dispatch(const Shape& shape, std::span<const TensorView> x,
                                        std::span<const Routing> routing, const CastRule& cast = {});

/// How combine adds (specification 10.3) and what travels (10.4).
struct SumRule {
  Wire wire = Wire::kBF16;  ///< or kLogFMT
  bool exact = false;       ///< one rounding, slots in top-k order, instead of one per rank and one at the end
};

/// in[r]: x, source and range of rank r. The answer is bfloat16 [num_tokens, hidden] per rank.
std::vector<std::vector<std::byte>> low_latency_combine(const Shape& shape, std::span<const ExpertSlabs> in,
                                                        std::span<const Routing> routing, const SumRule& rule = {});

}  // namespace anyep::reference
