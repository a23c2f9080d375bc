// Low-latency combine: a table of rows from a handle's sources and ranges.
//
//   after   rows[s][t] holds {local expert, row} of every row of this rank that token t of rank s has, ascending by expert, -1
//           behind them
//   roles   a warp per token: a lane per expert
//   needs   nothing of other ranks
#include "cuda/device/warp.cuh"
#include "cuda/kernels/low_latency_combine.h"
#include "cuda/runtime/launch.h"

namespace anyep::cuda::low_latency {
namespace {

constexpr int kWarps = 8;

/// The row of `token` among a source's rows of one expert, which ascend by token; -1 = none. Cut to the slab, since the
/// arrays are the caller's.
__device__ int row_of(const std::int32_t* source, std::int64_t range, int slab_rows, int token) {
  const std::int64_t begin = min(max(range >> 32, std::int64_t{0}), std::int64_t{slab_rows});
  int low = static_cast<int>(begin);
  int high = low + static_cast<int>(min(range & 0xFFFF'FFFF, slab_rows - begin));
  while (low < high) {
    const int middle = (low + high) / 2, its = source[middle];
    if (its == token) return middle;
    if (its < token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return -1;
}

__global__ void find_rows_kernel(const __grid_constant__ FindRowsParams p) {
  const int slab_rows = p.num_ranks * p.max_tokens, lane = lane_index();
  for (int pair = static_cast<int>(blockIdx.x) * kWarps + warp_index(); pair < slab_rows;
       pair += static_cast<int>(gridDim.x) * kWarps) {
    const int rank = pair / p.max_tokens, token = pair - rank * p.max_tokens;
    std::int32_t* const rows = p.rows + static_cast<std::int64_t>(pair) * p.top_k;
    int found = 0;
    for (int first = 0; first < p.num_local_experts; first += kLanes) {
      const int expert = first + lane;
      const int row = expert < p.num_local_experts ? row_of(p.source + static_cast<std::int64_t>(expert) * slab_rows,
                                                            p.range[expert * p.num_ranks + rank], slab_rows, token)
                                                   : -1;
      const unsigned here = __ballot_sync(kAllLanes, row >= 0);
      const int index = found + __popc(here & ((1u << lane) - 1));
      if (row >= 0 && index < p.top_k) rows[index] = expert << kRowBits | row;
      found += __popc(here);
    }
    for (int index = found + lane; index < p.top_k; index += kLanes) rows[index] = -1;
  }
}

const Kernel<FindRowsParams> kFindRows(find_rows_kernel, "low_latency::find_rows_kernel");

}  // namespace

void launch_find_rows(const FindRowsParams& params, int num_sms, cudaStream_t stream) {
  const int blocks = (params.num_ranks * params.max_tokens + kWarps - 1) / kWarps;
  LaunchShape shape;
  shape.blocks = static_cast<unsigned>(num_sms > 0 ? (blocks < num_sms ? blocks : num_sms) : blocks);
  shape.threads = kWarps * kLanes;
  shape.stream = stream;
  kFindRows(shape, params);
}

}  // namespace anyep::cuda::low_latency
