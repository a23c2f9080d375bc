// Whether a batch holds together.
#pragma once

#include <anyep/workload.h>

#include <cstdint>
#include <string_view>

namespace anyep::workload {

/// Sizes that fit together and ids from -1 to num_experts - 1. @throws Error kArgument with `op`.
void check_batch(std::string_view op, const Batch& batch, std::int64_t num_experts);

}  // namespace anyep::workload
