// What the calls of one mode occupy on real ranks, beside what their plans say.
#pragma once

#include <anyep/plan.h>
#include <anyep/workload.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cli/team.h"

namespace anyep::cli {

struct MemoryOptions {
  TeamOptions team;
  workload::ModelPreset model;
  bool low_latency = false;
  std::int64_t tokens = 0;  ///< per rank
  std::uint64_t seed = 1;
};

/// Of the rank that occupies most.
struct MemoryUse {
  std::uint64_t shared_bytes = 0;   ///< blocks of its own memory files
  std::uint64_t private_bytes = 0;  ///< private anonymous memory, less that of the same process before the engine
  std::uint64_t planned_bytes = 0;  ///< backed bytes of all regions of the calls' plans, each region once
  std::vector<std::string> failures;
  std::uint64_t measured_bytes() const { return shared_bytes + private_bytes; }
};

/// Ranks as processes: high throughput runs route, dispatch and combine in the caller's memory, low latency a pair.
MemoryUse measure_memory(const MemoryOptions& options);

}  // namespace anyep::cli
