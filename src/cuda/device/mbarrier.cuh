// Barriers in shared memory that count the bytes of bulk loads; one arrival a phase, by the thread that announces them.
//
// Only for memory that the hardware copies: a wait ends like a load does, whatever peers do. Words of peers: words.cuh.
#pragma once

#include <cstdint>

#include "cuda/device/ptx.cuh"

namespace anyep::cuda::mbarrier {

/// One thread, before the first use. Others of the block may use the barriers after a barrier of theirs.
__device__ __forceinline__ void init(std::uint64_t* barriers, int count) {
  for (int i = 0; i < count; ++i) ptx::mbarrier_init(barriers + i, 1);
  ptx::fence_mbarrier_init();
}

/// The phase is complete when `bytes` have been loaded.
__device__ __forceinline__ void expect(std::uint64_t& barrier, std::uint32_t bytes) {
  ptx::mbarrier_arrive_expect_tx(&barrier, bytes);
}

/// Until the phase of this parity is complete: what was loaded may be read, or stored on by bulk copies of this thread
/// (pattern M).
__device__ __forceinline__ void wait(std::uint64_t& barrier, std::uint32_t parity) {
  while (!ptx::mbarrier_try_wait_parity(&barrier, parity)) {
  }
}

}  // namespace anyep::cuda::mbarrier
