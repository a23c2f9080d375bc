// What the probes' kernels share: bulk copies by the library's names, tickets, launches.
#pragma once

#include <cstdint>

#include "bench/probes/check.h"
#include "bench/probes/kernels.h"
#include "cuda/device/bulk.cuh"
#include "cuda/device/mbarrier.cuh"
#include "cuda/device/ptx.cuh"

namespace anyep::bench::probes {

namespace bulk = cuda::bulk;
namespace mbarrier = cuda::mbarrier;

inline constexpr unsigned kAllLanes = 0xFFFF'FFFFu;
inline constexpr int kLanes = 32;
inline constexpr int kStages = 2;  ///< rows per warp in shared memory; three change push by 1 % and slow gather
/// Dynamic shared memory of a block; the rest of 227 KiB holds barriers.
inline constexpr int kSharedBytes = 222 * 1024;

/// A warp's share of `count` units, each number once, ascending; -1 when there are no more. The first kFirst are at equal
/// distances, so that nothing hides the latency of the counter; later ones are drawn one step before they are needed.
template <Order kOrder, int kFirst>
class Units {
 public:
  __device__ Units(int worker, int workers, int count, std::uint32_t* ticket)
      : worker_(worker), workers_(workers), count_(count), ticket_(ticket) {
    draw();
  }

  /// All lanes.
  __device__ int next() {
    const int unit = __shfl_sync(kAllLanes, drawn_, 0);
    draw();
    return unit < count_ ? unit : -1;
  }

 private:
  __device__ void draw() {
    const int turn = turn_++;
    if (kOrder == Order::kStrides || turn < kFirst) {
      drawn_ = worker_ + turn * workers_;
    } else if (threadIdx.x % kLanes == 0) {
      drawn_ = static_cast<int>(atomicAdd(ticket_, 1)) + kFirst * workers_;
    }
  }

  const int worker_, workers_, count_;
  std::uint32_t* const ticket_;
  int turn_ = 0, drawn_ = 0;
};

/// All threads, and a barrier: the starts of ranges are in shared memory afterwards.
__device__ inline void load_ranges(const Places& places, std::int32_t* before) {
  for (unsigned i = threadIdx.x; i < static_cast<unsigned>(Places::kRanges * places.num_ranks); i += blockDim.x) {
    before[i] = places.before[i];
  }
  __syncthreads();
}

/// The whole row number of what was loaded from `places.row`.
__device__ inline int row_at(const Places& places, const std::int32_t* before, int token, int rank, int row) {
  return row < 0 ? row : row + before[token / places.tokens_per_range * places.num_ranks + rank];
}

/// A warp copies a row: where the device code has no bulk copies.
__device__ inline void copy_row(std::byte* to, const std::byte* from, int bytes) {
  constexpr int kUnroll = 8, kAccess = 16;
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  for (int first = lane * kAccess; first < bytes; first += kUnroll * kLanes * kAccess) {
    uint4 values[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int at = first + i * kLanes * kAccess;
      if (at < bytes) values[i] = __ldcs(reinterpret_cast<const uint4*>(from + at));
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int at = first + i * kLanes * kAccess;
      if (at < bytes) __stcs(reinterpret_cast<uint4*>(to + at), values[i]);
    }
  }
}

/// All threads, at the end: the last block leaves the counters as they were found.
__device__ inline void end(Counters* counters) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (cuda::ptx::atom_add_acq_rel_gpu(&counters->finished, 1) != gridDim.x - 1) return;
  counters->ticket = 0;
  counters->finished = 0;
}

/// Has device code for this GPU bulk copies? Else the kernels need no shared memory for rows.
inline bool has_bulk_copies() {
  int device = 0, major = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  return major >= 9 && major < 12;
}

/// Launches with up to kSharedBytes of dynamic shared memory.
template <class Params>
void launch(void (*kernel)(Params), int blocks, int threads, std::size_t shared_bytes, cudaStream_t stream,
            const Params& params) {
  if (!has_bulk_copies()) shared_bytes = 0;
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               kSharedBytes),
          "cudaFuncSetAttribute");
  }
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared_bytes, stream>>>(params);
  check(cudaGetLastError(), "launch of a probe");
}

}  // namespace anyep::bench::probes
