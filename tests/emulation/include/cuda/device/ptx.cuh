// Stands in for src/cuda/device/ptx.cuh, which says what each of them is for: machine instructions, emulated.
#pragma once

#include <cuda_runtime.h>
#include <emmintrin.h>

#include <cstdint>

namespace anyep::cuda::ptx {

inline constexpr bool kBulkCopies = ANYEP_BULK_COPIES != 0;

template <class T>
void have_ready(T*&) {}

template <std::size_t kAlignment>
std::byte* dynamic_shared() {
  return emulation::dynamic_shared();
}

inline std::uint32_t atom_add_acq_rel_gpu(std::uint32_t* at, std::uint32_t value) {
  return __atomic_fetch_add(at, value, __ATOMIC_ACQ_REL);
}
inline void red_add_release_gpu(std::uint64_t* at, std::uint64_t value) {
  __atomic_fetch_add(at, value, __ATOMIC_RELEASE);
}

inline uint4 load_l2(const void* from) {
  uint4 value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
/// Of dynamic shared memory only.
inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(static_cast<const std::byte*>(pointer) - emulation::dynamic_shared());
}
inline void cp_async_if(bool wanted, std::uint32_t shared, const void* from, bool here) {
  if (wanted) emulation::small_load(emulation::dynamic_shared() + shared, from, here);
}
inline void cp_async_commit_group() {
  emulation::small_commit();
}
template <int kGroups>
void cp_async_wait_group() {
  emulation::small_wait(kGroups);
}
inline void prefetch_l2(const void*) {}
inline void store_streaming(void* to, const uint4& value) {
  std::memcpy(to, &value, sizeof value);
}

inline void fence_block() {}
inline void fence_proxy_async() {}
inline void fence_proxy_async_global() {}
inline void fence_proxy_async_shared() {}

inline void cluster_sync() {
  emulation::sync_cluster();
}
inline std::int32_t load_shared_of(std::uint32_t block, const std::int32_t* at) {
  return *static_cast<const volatile std::int32_t*>(emulation::in_block_of_cluster(block, at));
}

inline void cp_async_bulk_load(void* shared, const void* global, std::uint32_t bytes, std::uint64_t* barrier) {
  emulation::bulk_load(shared, global, bytes, barrier);
}
inline void cp_async_bulk_store(void* global, const void* shared, std::uint32_t bytes) {
  emulation::bulk_store(global, shared, bytes);
}
inline void cp_async_bulk_commit_group() {
  emulation::bulk_commit();
}
template <int kGroups>
void cp_async_bulk_wait_group_read() {
  emulation::bulk_wait(kGroups, false);
}
template <int kGroups>
void cp_async_bulk_wait_group() {
  emulation::bulk_wait(kGroups, true);
}

inline void mbarrier_init(std::uint64_t* barrier, std::uint32_t arrivals) {
  emulation::mbarrier_init(barrier, arrivals);
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive_expect_tx(std::uint64_t* barrier, std::uint32_t bytes) {
  emulation::mbarrier_arrive_expect(barrier, bytes);
}
inline bool mbarrier_try_wait_parity(std::uint64_t* barrier, std::uint32_t parity) {
  return emulation::mbarrier_complete(barrier, parity);
}

inline void grid_dependency_wait() {
  emulation::wait_for_earlier_launches();
}
inline void grid_dependents_launch() {
  emulation::let_later_launches_start();
}

inline void store_two_words(void* to, std::uint64_t first, std::uint64_t second) {
  auto* const words = static_cast<std::uint64_t*>(to);
  __atomic_store_n(words, first, __ATOMIC_RELAXED);
  emulation::yield();  // in no order, and not at once
  __atomic_store_n(words + 1, second, __ATOMIC_RELAXED);
}
inline void load_two_words(const void* from, std::uint64_t& first, std::uint64_t& second) {
  const auto* const words = static_cast<const std::uint64_t*>(from);
  first = __atomic_load_n(words, __ATOMIC_RELAXED);
  second = __atomic_load_n(words + 1, __ATOMIC_RELAXED);
}
inline void store_packet(void* to, std::uint64_t low, std::uint64_t high) {
  _mm_store_si128(static_cast<__m128i*>(to), _mm_set_epi64x(static_cast<long long>(high), static_cast<long long>(low)));
}
inline void load_packet(const void* from, std::uint64_t& low, std::uint64_t& high) {
  const __m128i packet = _mm_load_si128(static_cast<const __m128i*>(from));
  std::uint64_t halves[2];
  std::memcpy(halves, &packet, sizeof packet);
  low = halves[0];
  high = halves[1];
}

inline void barrier_sync(int id, int threads) {
  __syncwarp();
  emulation::sync_some(id, threads);
}
inline void barrier_arrive(int id, int threads) {
  __syncwarp();
  emulation::arrive_some(id, threads);
}

inline constexpr bool kConvertsE4m3 = false;
inline std::uint32_t e4m3_of_two(float, float) {
  return 0;
}

}  // namespace anyep::cuda::ptx
