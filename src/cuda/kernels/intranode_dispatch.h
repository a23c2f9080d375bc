// High-throughput dispatch inside one NVLink domain, into rows that peers can write.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/kernels/places.h"
#include "cuda/kernels/team.h"

namespace anyep::cuda {

/// A field of this rank's tokens that travels beside x. Elements of a row may lie apart.
struct SideField {
  const std::byte* data = nullptr;
  std::int64_t row_stride = 0, element_stride = 0;    ///< bytes
  std::uint32_t element_bytes = 0, num_elements = 0;  ///< of a row; 0 elements = does not travel

  ANYEP_HD bool given() const { return num_elements != 0; }
};

struct DispatchParams {
  Team team;
  Places places;
  const std::byte* x = nullptr;   ///< [num_tokens] rows; null with row_bytes 0: only the side fields travel
  std::int64_t x_row_stride = 0;  ///< bytes
  std::uint32_t row_bytes = 0;
  SideField scales;   ///< 4-byte elements
  SideField experts;  ///< global ids, 4 or 8 bytes
  SideField weights;  ///< float32
  SideField extra[Grant::kMaxExtra];
  int num_experts = 0;                  ///< for ids
  Grant grant{};                        ///< of this rank as receiver; same for every sender
  std::int32_t* final_place = nullptr;  ///< [num_tokens, num_ranks] final rows, or null
  /// Rows beyond those received have ids of -1 up to here, the room; 0 = leave them (exact-size outputs).
  std::int64_t mark_rest_until = 0;
  const std::int32_t* rows_until = nullptr;  ///< [num_ranks], device
  /// Where more rows come than the grant has room for, this launch does nothing and takes no turn, as if it had never been
  /// made: its peers wait for the next one, which has the room. Else the surplus is dropped.
  bool whole_or_nothing = false;
  /// Not 0: the launch before this one in the stream is the notify that makes `places`, of this number among the engine's with
  /// dispatch_behind, on a GPU that serves this rank only. Starts before notify has ended.
  std::uint64_t behind_notify = 0;
};

/// Which fields travel is the same on every rank (x and each SideField given or not, each offset of the grant kNone or
/// not). x whose address, stride or row bytes are no multiples of 16 takes a slower path; elements of side fields lie
/// aligned to their size.
/// @pre every rank launches it with the same code; `num_sms` may differ
void launch_dispatch(const DispatchParams& params, int num_sms, cudaStream_t stream);

/// Copies rows between arrays of one GPU, any alignment: the way out of the window into tensors that peers cannot write.
struct CopyRowsParams {
  struct Field {
    const std::byte* from = nullptr;
    std::byte* to = nullptr;
    std::uint32_t row_bytes = 0;
    std::int64_t from_stride = 0, to_stride = 0;
  } field[4 + Grant::kMaxExtra];
  int num_fields = 0;
  std::int64_t num_rows = 0;                 ///< at most; fewer if rows_until says so
  const std::int32_t* rows_until = nullptr;  ///< last entry = rows there are; null = num_rows
  int num_ranks = 1;
};
void launch_copy_rows(const CopyRowsParams& params, int num_sms, cudaStream_t stream);

}  // namespace anyep::cuda
