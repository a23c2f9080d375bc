// One function per machine instruction that CUDA C++ has no name for. Nothing else in the library's CUDA code holds `asm`.
//
// All are volatile and clobber memory: the compiler moves no access across them (memory model, pitfall 2). What each of
// them orders is said where it is used; functions that say it by name are in bulk.cuh and mbarrier.cuh.
#pragma once

#include <cstddef>
#include <cstdint>

/// Bulk copies and clusters: Hopper and data-center Blackwell, which have 227 KiB of shared memory. Elsewhere the portable path runs.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
#define ANYEP_BULK_COPIES 1
#else
#define ANYEP_BULK_COPIES 0
#endif

namespace anyep::cuda::ptx {

/// Does this device code have bulk copies, mbarriers with transaction counts, clusters? Without, the functions below do nothing.
inline constexpr bool kBulkCopies = ANYEP_BULK_COPIES != 0;

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

/// The shared memory that the launch asked for, beside what kernels declare. A unit uses one alignment.
template <std::size_t kAlignment>
__device__ __forceinline__ std::byte* dynamic_shared() {
  extern __shared__ __align__(kAlignment) std::byte of_the_launch[];
  return of_the_launch;
}

/// Makes the compiler have a pointer ready here, not where it is first used.
template <class T>
__device__ __forceinline__ void have_ready(T*& pointer) {
  asm volatile("" : "+l"(pointer));
}

// ---- atomics of one GPU --------------------------------------------------------------------------------------------

/// Adds and returns what was there; acquire and release at GPU scope (pattern D). A plain atomicAdd is relaxed.
__device__ __forceinline__ std::uint32_t atom_add_acq_rel_gpu(std::uint32_t* at, std::uint32_t value) {
  std::uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(at), "r"(value) : "memory");
  return before;
}

/// Adds; what the thread has done and learned comes before, for readers that acquire on the same GPU.
__device__ __forceinline__ void red_add_release_gpu(std::uint64_t* at, std::uint64_t value) {
  asm volatile("red.release.gpu.global.add.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}

// ---- loads and stores that others do not need soon -----------------------------------------------------------------

/// 16 bytes past L1. Never the non-coherent path (ld.global.nc): peers write what we read (pitfall 1).
__device__ __forceinline__ uint4 load_l2(const void* from) {
  uint4 value;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from)
               : "memory");
  return value;
}

/// If `wanted`: 16 bytes past L1 to an address in shared memory, or 16 zeros unless `here`; done when a wait for its group has
/// returned. Without a branch: behind one the compiler asks whether lanes have parted.
__device__ __forceinline__ void cp_async_if(bool wanted, std::uint32_t shared, const void* from, bool here) {
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.u32 wanted, %3, 0;\n"
      "@wanted cp.async.cg.shared.global [%0], [%1], 16, %2;\n"
      "}" ::"r"(shared),
      "l"(from), "r"(here ? 16 : 0), "r"(static_cast<std::uint32_t>(wanted))
      : "memory");
}
/// The thread's copies since the last one are a group.
__device__ __forceinline__ void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/// Until at most kGroups of the thread's groups are still on their way; it then reads what it copied itself.
template <int kGroups>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

/// Fetches the line of `from` into L2.
__device__ __forceinline__ void prefetch_l2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

/// 16 bytes that this kernel does not read again.
__device__ __forceinline__ void store_streaming(void* to, const uint4& value) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

// ---- fences --------------------------------------------------------------------------------------------------------

/// Acquire and release among the threads of a block. (__threadfence_block() is sequentially consistent: it waits for all loads.)
__device__ __forceinline__ void fence_block() {
  asm volatile("fence.acq_rel.cta;" ::: "memory");
}

// ---- proxies -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void fence_proxy_async() {
#if ANYEP_BULK_COPIES
  asm volatile("fence.proxy.async;" ::: "memory");
#endif
}
__device__ __forceinline__ void fence_proxy_async_global() {
#if ANYEP_BULK_COPIES
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}
__device__ __forceinline__ void fence_proxy_async_shared() {
#if ANYEP_BULK_COPIES
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- blocks of a cluster -------------------------------------------------------------------------------------------

/// All threads of the cluster; what they did before, in shared memory too, comes before what any of them does behind it.
__device__ __forceinline__ void cluster_sync() {
#if ANYEP_BULK_COPIES
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#endif
}

/// What lies at the same place of another block's shared memory.
__device__ __forceinline__ std::int32_t load_shared_of([[maybe_unused]] std::uint32_t block,
                                                       [[maybe_unused]] const std::int32_t* at) {
  std::int32_t value = 0;
#if ANYEP_BULK_COPIES
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %1, %2;\n"
      "ld.shared::cluster.s32 %0, [there];\n"
      "}"
      : "=r"(value)
      : "r"(shared_address(at)), "r"(block)
      : "memory");
#endif
  return value;
}

// ---- bulk copies ---------------------------------------------------------------------------------------------------

/// Global to shared memory; the barrier counts the bytes. All three multiples of 16.
__device__ __forceinline__ void cp_async_bulk_load([[maybe_unused]] void* shared, [[maybe_unused]] const void* global,
                                                   [[maybe_unused]] std::uint32_t bytes,
                                                   [[maybe_unused]] std::uint64_t* barrier) {
#if ANYEP_BULK_COPIES
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#endif
}

/// Shared to global memory, in the thread's current bulk group.
__device__ __forceinline__ void cp_async_bulk_store([[maybe_unused]] void* global, [[maybe_unused]] const void* shared,
                                                    [[maybe_unused]] std::uint32_t bytes) {
#if ANYEP_BULK_COPIES
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
               "r"(bytes)
               : "memory");
#endif
}

__device__ __forceinline__ void cp_async_bulk_commit_group() {
#if ANYEP_BULK_COPIES
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

/// Until at most kGroups of this thread's bulk groups still read shared memory. Says nothing about their writes.
template <int kGroups>
__device__ __forceinline__ void cp_async_bulk_wait_group_read() {
#if ANYEP_BULK_COPIES
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
#endif
}

/// Until at most kGroups of this thread's bulk groups are incomplete; the writes of the others are visible to this thread.
template <int kGroups>
__device__ __forceinline__ void cp_async_bulk_wait_group() {
#if ANYEP_BULK_COPIES
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

// ---- mbarriers -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init([[maybe_unused]] std::uint64_t* barrier,
                                              [[maybe_unused]] std::uint32_t arrivals) {
#if ANYEP_BULK_COPIES
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

/// Makes initialised barriers visible to the async proxy.
__device__ __forceinline__ void fence_mbarrier_init() {
#if ANYEP_BULK_COPIES
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive_expect_tx([[maybe_unused]] std::uint64_t* barrier,
                                                          [[maybe_unused]] std::uint32_t bytes) {
#if ANYEP_BULK_COPIES
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

/// Suspends for a while at most; true = the phase of this parity is complete.
__device__ __forceinline__ bool mbarrier_try_wait_parity([[maybe_unused]] std::uint64_t* barrier,
                                                         [[maybe_unused]] std::uint32_t parity) {
#if ANYEP_BULK_COPIES
  std::uint32_t complete;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(complete)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return complete != 0;
#else
  return true;
#endif
}

// ---- dependent launch ----------------------------------------------------------------------------------------------

/// Until the kernels that this one was launched behind are complete and their writes visible. Returns at once in a launch
/// without the attribute.
__device__ __forceinline__ void grid_dependency_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Lets a dependent kernel start as soon as all blocks have said so or have ended.
__device__ __forceinline__ void grid_dependents_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- words and packets that carry their epoch ----------------------------------------------------------------------

/// Two words of 64 bits, each whole, in no order (pattern G: each carries its own epoch). 16-byte aligned.
__device__ __forceinline__ void store_two_words(void* to, std::uint64_t first, std::uint64_t second) {
  asm volatile("st.relaxed.sys.global.v2.b64 [%0], {%1, %2};" ::"l"(to), "l"(first), "l"(second) : "memory");
}
__device__ __forceinline__ void load_two_words(const void* from, std::uint64_t& first, std::uint64_t& second) {
  asm volatile("ld.relaxed.sys.global.v2.b64 {%0, %1}, [%2];" : "=l"(first), "=l"(second) : "l"(from) : "memory");
}
/// 128 bits in one access (pattern G'): never a vector, whose elements may come apart.
__device__ __forceinline__ void store_packet(void* to, std::uint64_t low, std::uint64_t high) {
  asm volatile(
      "{\n"
      ".reg .b128 packet;\n"
      "mov.b128 packet, {%1, %2};\n"
      "st.relaxed.sys.global.b128 [%0], packet;\n"
      "}" ::"l"(to),
      "l"(low), "l"(high)
      : "memory");
}
__device__ __forceinline__ void load_packet(const void* from, std::uint64_t& low, std::uint64_t& high) {
  asm volatile(
      "{\n"
      ".reg .b128 packet;\n"
      "ld.relaxed.sys.global.b128 packet, [%2];\n"
      "mov.b128 {%0, %1}, packet;\n"
      "}"
      : "=l"(low), "=l"(high)
      : "l"(from)
      : "memory");
}

// ---- barriers of some warps of a block -----------------------------------------------------------------------------

/// Until `threads` threads, whole warps, have come or arrived. Orders their memory accesses before those behind it. A warp
/// whose lanes went different ways comes together first.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  __syncwarp();
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  __syncwarp();
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- conversions ---------------------------------------------------------------------------------------------------

/// Does this device code have an instruction for E4M3? Without, core/fp8.h does the arithmetic.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
inline constexpr bool kConvertsE4m3 = true;
#else
inline constexpr bool kConvertsE4m3 = false;
#endif

/// Two floats to E4M3, to nearest even, saturating, NaN to 0x7f: the bits of core::e4m3_of_float. `low` in the low byte.
__device__ __forceinline__ std::uint32_t e4m3_of_two([[maybe_unused]] float low, [[maybe_unused]] float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  std::uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return 0;
#endif
}

}  // namespace anyep::cuda::ptx
