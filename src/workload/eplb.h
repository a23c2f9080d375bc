// Replicated experts in the manner of expert-parallel load balancing: more slots than experts, hottest experts several
// times.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace anyep::workload {

struct EplbShape {
  int num_slots = 0;  ///< at least one per expert
  int num_ranks = 1;  ///< slots lie on ranks in contiguous blocks
};

/// Slots of each expert, ascending. `load` per expert is what the balancer believes.
std::vector<std::vector<int>> place_replicas(std::span<const double> load, const EplbShape& shape);

}  // namespace anyep::workload
