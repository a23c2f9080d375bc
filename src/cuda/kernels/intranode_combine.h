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
  const std::int32_t* tokens = nullptr;  ///< [num_ranks], device: of every rank; needed where the turns cut the tokens
  /// [num_rows] token at its home, device; needed where the turns cut the tokens.
  const std::int32_t* source = nullptr;
  // As the home of tokens.
  Places places;
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

/// Rows of one ordered pair of ranks that the slots of a turn hold. A turn in which a pair has more is refused by the
/// kernel (Ended::kTooMany); as many tokens never have more.
ANYEP_HD constexpr std::uint64_t slots_of_pair(const WindowLayout& layout, std::uint64_t bytes_of_slot) {
  const std::uint64_t slots = layout.slot_region_bytes / bytes_of_slot;
  const std::uint64_t counted = layout.chunks_per_region * kRowsPerChunk;
  return slots < counted ? slots : counted;
}

/// Every launch takes one turn of the combine sequence, on every rank. Ranks whose x is gathered and ranks whose rows come
/// in slots mix freely: each home learns which from the offer. Addresses and strides of x, bias and out that are no
/// multiples of 16 take a slower path; x that is gathered, and its weights, lie on 16 bytes.
void launch_combine(const CombineParams& params, int num_sms, cudaStream_t stream);
/// The turns from params' turn on, of as many tokens each, until every rank's tokens are through: one launch, whose blocks meet
/// between turns, for callers who do not know how many turns there are. Where there are none it takes none.
void launch_further_turns(const CombineParams& params, int num_sms, cudaStream_t stream);

}  // namespace anyep::cuda
