// Bulk copies between global and shared memory, named by what holds afterwards. Addresses and sizes: multiples of 16.
//
// Groups belong to the thread that issued the copies: only that thread can wait for them (memory model, pitfall 6).
#pragma once

#include <cstdint>

#include "cuda/device/ptx.cuh"

namespace anyep::cuda::bulk {

/// Global to shared memory; `barrier` counts the bytes.
__device__ __forceinline__ void load(void* shared, const void* global, std::uint32_t bytes, std::uint64_t& barrier) {
  ptx::cp_async_bulk_load(shared, global, bytes, &barrier);
}

/// Shared to global memory, own or a peer's.
__device__ __forceinline__ void store(void* global, const void* shared, std::uint32_t bytes) {
  ptx::cp_async_bulk_store(global, shared, bytes);
}

/// Closes the group of the stores so far.
__device__ __forceinline__ void commit() {
  ptx::cp_async_bulk_commit_group();
}

/// All but the last kGroups groups have read their shared memory. Their writes may still be under way: no flag may follow.
template <int kGroups = 0>
__device__ __forceinline__ void wait_source_reusable() {
  ptx::cp_async_bulk_wait_group_read<kGroups>();
}

/// All but the last kGroups groups are complete: a release that follows, here or behind a barrier, covers them
/// (patterns I, I').
template <int kGroups = 0>
__device__ __forceinline__ void wait_delivered() {
  ptx::cp_async_bulk_wait_group<kGroups>();
}

/// Between an acquire and this thread's bulk loads of what the peer wrote (pattern K).
__device__ __forceinline__ void acquired_for_loads() {
  ptx::fence_proxy_async_global();
}

/// Between the acquire of a credit and this thread's bulk stores over what the peer has read (pattern L, the writer).
__device__ __forceinline__ void acquired_for_stores() {
  ptx::fence_proxy_async();
}

/// Between this thread's ordinary loads and the barrier in front of the credit that lets a peer's bulk stores come
/// (pattern L, the reader).
__device__ __forceinline__ void read_before_credit() {
  ptx::fence_proxy_async();
}

/// Between this thread's ordinary accesses to shared memory and the barrier in front of a bulk copy from it, or into it (pattern J).
__device__ __forceinline__ void used_before_copy() {
  ptx::fence_proxy_async_shared();
}

}  // namespace anyep::cuda::bulk
