// High-throughput combine inside one NVLink domain.
#pragma once

#include <anyep/types.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/kernels/places.h"
#include "cuda/kernels/team.h"

namespace anyep::cuda {

struct CombineParams {
  Team team;
  DType dtype = DType::kBF16;  ///< BF16, FP16 or FP32
  std::int64_t hidden = 0;
  // As the rank that holds expert outputs.
  const std::byte* x = nullptr;  ///< [num_rows] rows, sorted by (source rank, source token)
  std::int64_t x_row_stride = 0;
  std::int64_t num_rows = 0;  ///< rows of x; fewer than rows_until says is an error noticed by the kernel
  std::uint64_t x_in_window =
      Grant::kNone;                ///< offset of x in the own window if homes gather it, dense rows; else kNone
  const float* weights = nullptr;  ///< [num_rows, num_weights] dense, or null
  std::uint64_t weights_in_window =
      Grant::kNone;  ///< when x is gathered and weights are given: they lie in the window too
  int num_weights = 0;
  const std::int32_t* rows_until = nullptr;  ///< [num_ranks], device
  const std::int32_t* source = nullptr;      ///< [num_rows] token at its home, device; needed only with several turns
  // As the home of tokens.
  Places places;
  const std::int32_t* tokens = nullptr;  ///< [num_ranks] every rank's number of tokens, device
  const std::byte* bias[2] = {};
  std::int64_t bias_row_stride[2] = {};
  std::byte* out = nullptr;
  std::int64_t out_row_stride = 0;
  float* out_weights = nullptr;  ///< [num_tokens, num_weights] dense
  // The turn: tokens [first_token, last_token) of every home. One turn holds all when the slots hold all.
  std::int64_t first_token = 0, last_token = INT64_MAX;
};

/// Bytes of one row's slot: the row, then its weights, rounded up to 16.
std::uint64_t slot_bytes(DType dtype, std::int64_t hidden, int num_weights);

/// Tokens per turn that the slots hold; every launch takes one turn of the combine sequence.
/// Ranks whose x is gathered and ranks whose rows come in slots mix freely: each home learns which from the offer.
void launch_combine(const CombineParams& params, int num_sms, cudaStream_t stream);

}  // namespace anyep::cuda
