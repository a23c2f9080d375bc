// Stands in for CUDA's: the language's words and functions, as far as kernels of this repository use them.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cuda_runtime_api.h"

#ifndef ANYEP_BULK_COPIES
#define ANYEP_BULK_COPIES 1  // 0 = the portable path
#endif

#define __global__
#define __device__
#define __host__
#define __shared__ thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

#define threadIdx (::anyep::emulation::here().thread)
#define blockIdx (::anyep::emulation::here().block)
#define blockDim (::anyep::emulation::here().block_size)
#define gridDim (::anyep::emulation::here().grid_size)

// ---- vectors -------------------------------------------------------------------------------------------------------

struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline uint4 make_uint4(std::uint32_t x, std::uint32_t y, std::uint32_t z, std::uint32_t w) {
  return {x, y, z, w};
}

// ---- threads of a block and of a warp ------------------------------------------------------------------------------

inline void __syncthreads() {
  (void)anyep::emulation::sync_block(true);
}
inline int __syncthreads_and(int vote) {
  return anyep::emulation::sync_block(vote != 0).all ? 1 : 0;
}
inline int __syncthreads_or(int vote) {
  return anyep::emulation::sync_block(vote != 0).any ? 1 : 0;
}
inline void __syncwarp(unsigned mask = ~0u) {
  (void)anyep::emulation::meet("__syncwarp", mask, 0);
}
inline void __threadfence_block() {}

namespace anyep::emulation {

template <class T>
std::uint64_t bits_of_value(T value) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T value_of_bits(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

/// What the lane gets that `lane` names; itself where it names none.
template <class T>
T shuffle(const char* what, unsigned mask, T value, int from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "what the hardware moves");
  const std::uint64_t* const all = meet(what, mask, bits_of_value(value));
  return value_of_bits<T>(all[from]);
}
inline int own_lane() {
  return static_cast<int>(threadIdx.x % 32);
}
inline unsigned ballot(const char* what, unsigned mask, bool vote) {
  const std::uint64_t* const all = meet(what, mask, vote ? 1 : 0);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) != 0 && all[lane] != 0) bits |= 1u << lane;
  }
  return bits;
}
template <class T, class Both>
T reduce(const char* what, unsigned mask, T value, const Both& both) {
  const std::uint64_t* const all = meet(what, mask, bits_of_value(value));
  bool first = true;
  T result{};
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    const T one = value_of_bits<T>(all[lane]);
    result = first ? one : both(result, one);
    first = false;
  }
  return result;
}

}  // namespace anyep::emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int = 32) {
  return anyep::emulation::shuffle("__shfl_sync", mask, value, lane & 31);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int = 32) {
  return anyep::emulation::shuffle("__shfl_xor_sync", mask, value, (anyep::emulation::own_lane() ^ bits) & 31);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int = 32) {
  const int own = anyep::emulation::own_lane(), from = own - static_cast<int>(by);
  return anyep::emulation::shuffle("__shfl_up_sync", mask, value, from < 0 ? own : from);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int = 32) {
  const int own = anyep::emulation::own_lane(), from = own + static_cast<int>(by);
  return anyep::emulation::shuffle("__shfl_down_sync", mask, value, from > 31 ? own : from);
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
  return anyep::emulation::ballot("__ballot_sync", mask, vote != 0);
}
inline int __all_sync(unsigned mask, int vote) {
  return anyep::emulation::ballot("__all_sync", mask, vote == 0) == 0 ? 1 : 0;
}
inline int __any_sync(unsigned mask, int vote) {
  return anyep::emulation::ballot("__any_sync", mask, vote != 0) != 0 ? 1 : 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  const std::uint64_t own = anyep::emulation::bits_of_value(value);
  const std::uint64_t* const all = anyep::emulation::meet("__match_any_sync", mask, own);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) != 0 && all[lane] == own) bits |= 1u << lane;
  }
  return bits;
}
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return anyep::emulation::reduce("__reduce_add_sync", mask, value, [](T a, T b) { return static_cast<T>(a + b); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return anyep::emulation::reduce("__reduce_max_sync", mask, value, [](T a, T b) { return std::max(a, b); });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return anyep::emulation::reduce("__reduce_or_sync", mask, value, [](unsigned a, unsigned b) { return a | b; });
}

// ---- numbers -------------------------------------------------------------------------------------------------------

inline int __ffs(int value) {
  return value == 0 ? 0 : std::countr_zero(static_cast<unsigned>(value)) + 1;
}
inline int __popc(unsigned value) {
  return std::popcount(value);
}
inline int __clz(int value) {
  return std::countl_zero(static_cast<unsigned>(value));
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(std::uint64_t{a} * b >> 32);
}
inline float __uint_as_float(unsigned bits) {
  return std::bit_cast<float>(bits);
}
/// Arithmetic on a GPU makes one NaN only, on this processor it keeps a summand's.
inline unsigned __float_as_uint(float value) {
  return value != value ? 0x7FFF'FFFFu : std::bit_cast<unsigned>(value);
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class A, class B>
requires std::integral<A> && std::integral<B>
constexpr auto min(A a, B b) -> decltype(a + b) {
  using Both = decltype(a + b);
  return static_cast<Both>(a) < static_cast<Both>(b) ? static_cast<Both>(a) : static_cast<Both>(b);
}
template <class A, class B>
requires std::integral<A> && std::integral<B>
constexpr auto max(A a, B b) -> decltype(a + b) {
  using Both = decltype(a + b);
  return static_cast<Both>(a) < static_cast<Both>(b) ? static_cast<Both>(b) : static_cast<Both>(a);
}

// ---- atomics, relaxed ----------------------------------------------------------------------------------------------

template <class T, class U>
T atomicAdd(T* at, U value) {
  return __atomic_fetch_add(at, static_cast<T>(value), __ATOMIC_RELAXED);
}
template <class T, class U>
T atomicOr(T* at, U value) {
  return __atomic_fetch_or(at, static_cast<T>(value), __ATOMIC_RELAXED);
}
template <class T, class U>
T atomicExch(T* at, U value) {
  return __atomic_exchange_n(at, static_cast<T>(value), __ATOMIC_RELAXED);
}
template <class T, class U, class V>
T atomicCAS(T* at, U expected, V desired) {
  T seen = static_cast<T>(expected);
  __atomic_compare_exchange_n(at, &seen, static_cast<T>(desired), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return seen;
}
