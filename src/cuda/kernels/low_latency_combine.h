// Low-latency combine inside one NVLink domain: rows of the experts' slabs back to the tokens' homes, weighted and added.
#pragma once

#include <anyep/config.h>

#include "cuda/kernels/low_latency.h"

namespace anyep::cuda::low_latency {

struct CombineParams {
  CallParams call;
  Wire wire = Wire::kBF16;  ///< kBF16 or kLogFMT
  bool exact = false;       ///< one rounding; rows travel per choice
  // As the rank of the experts.
  const std::byte* x = nullptr;                        ///< [local_experts, S, hidden] BF16, rows 16-byte aligned
  std::int64_t x_expert_stride = 0, x_row_stride = 0;  ///< bytes
  const std::int32_t* rows = nullptr;  ///< [num_ranks, max_tokens, top_k], as dispatch or launch_find_rows() made it
  // As the home of tokens.
  std::byte* out = nullptr;  ///< [num_tokens, hidden] BF16
  std::int64_t out_row_stride = 0;
  // Filled by the launch function.
  bool per_choice = false;
  int slots = 0;  ///< strips that a warp has on their way to shared memory
};

/// Makes a table of rows from what a handle says, where dispatch's own is not at hand.
struct FindRowsParams {
  const std::int32_t* source = nullptr;  ///< [local_experts, S], as dispatch gave it
  const std::int64_t* range = nullptr;   ///< [local_experts, num_ranks], likewise
  int num_ranks = 0, num_local_experts = 0, max_tokens = 0, top_k = 0;
  std::int32_t* rows = nullptr;  ///< out: [num_ranks, max_tokens, top_k]
};
void launch_find_rows(const FindRowsParams& params, int num_sms, cudaStream_t stream);

void launch_combine(const CombineParams& params, int num_sms, bool early, cudaStream_t stream);

}  // namespace anyep::cuda::low_latency
