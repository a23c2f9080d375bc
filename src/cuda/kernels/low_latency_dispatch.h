// Low-latency dispatch inside one NVLink domain: this rank's tokens to the slabs of the experts that they chose.
#pragma once

#include <anyep/config.h>

#include "cuda/kernels/low_latency.h"

namespace anyep::cuda::low_latency {

struct DispatchParams {
  CallParams call;
  Wire wire = Wire::kBF16;  ///< kBF16, kFP8 or kUE8M0
  bool round_scale = false;
  const std::byte* x = nullptr;   ///< [num_tokens, hidden] BF16, rows 16-byte aligned
  std::int64_t x_row_stride = 0;  ///< bytes
  // Out; S = num_ranks * max_tokens rows per expert.
  std::byte* slab = nullptr;  ///< [local_experts, S, hidden], dense
  std::uint32_t* scales = nullptr;
  std::int64_t scale_expert_stride = 0, scale_row_stride = 0, scale_column_stride = 0;  ///< in elements
  std::int32_t* counts = nullptr;                                                       ///< [local_experts]
  std::int32_t* source = nullptr;                                                       ///< [local_experts, S]
  std::int64_t* range = nullptr;  ///< [local_experts, num_ranks]: begin << 32 | count
  std::int32_t* rows = nullptr;   ///< [num_ranks, max_tokens, top_k]: where each choice lies (low_latency.h); or null
  std::int32_t* received = nullptr;  ///< [local_experts], added to; or null
};

/// `early`: programmatic dependent launch; only where this rank has the GPU for itself.
void launch_dispatch(const DispatchParams& params, int num_sms, bool early, cudaStream_t stream);

}  // namespace anyep::cuda::low_latency
