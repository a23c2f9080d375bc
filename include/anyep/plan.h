// What one call will do, as data: regions, passes, choices with their reasons, memory, predicted time.
#pragma once

#include <anyep/config.h>
#include <anyep/topology.h>
#include <anyep/types.h>

#include <cstdint>
#include <string>
#include <vector>

namespace anyep {

struct Choice {
  std::string what, value, why;
};

/// A range of memory that the op uses. `memory`: "window" (peers read and write), "staging" (peers read), "private".
struct PlanRegion {
  std::string name, memory;
  std::uint64_t offset = 0, bytes = 0;  ///< bytes reserved
  std::uint64_t backed = 0;             ///< bytes that this call touches, hence occupies
};

struct ANYEP_API Plan {
  Op op = Op::kRoute;
  Shape shape;
  int num_ranks = 1;
  int rank = 0;
  int local_experts = 0;             ///< of this rank
  std::int64_t tokens_per_turn = 0;  ///< of a staged or slotted path; 0 = no turns
  int regions = 1;                   ///< turns in flight
  int num_threads = 1;               ///< per rank
  std::int64_t row_bytes = 0;        ///< payload + scales + side data of one row on the wire
  bool sums_at_expert_rank = false;  ///< low-latency combine: one row per (token, rank) instead of one per choice
  std::vector<PlanRegion> memory;
  std::vector<Choice> choices;   ///< also every rejected alternative, with its reason
  std::uint64_t wire_bytes = 0;  ///< leaving this rank, uniform routing, `max_tokens` tokens per rank
  double predicted_us = 0;       ///< the floor of the performance model; 0 = no rate known

  std::uint64_t bytes(const char* memory_kind) const;  ///< sum of `backed` over that kind
  std::string to_text() const;                         ///< what `anyep plan` prints
};

/// Pure; one per op and shape. For high throughput `shape.max_tokens` is the caller's estimate of tokens per rank.
/// `hook` and `wire` matter for low latency only. `copy_gbs`: memory-copy rate per rank, 0 = unknown.
/// @throws Error kArgument, kUnsupported, kCapacity: the field, its value, what is allowed.
ANYEP_API Plan make_plan(Op, const Shape&, const Budget&, const Topology&, const Tuning& = {},
                         const LowLatencyOptions& = {}, double copy_gbs = 0);

/// The low_latency_bytes that one shape needs: four regions of every source.
ANYEP_API std::int64_t low_latency_bytes_for(const Shape&, int num_ranks);

}  // namespace anyep
