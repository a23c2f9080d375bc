// What a warp does together: who is who, broadcasts, copies of any alignment.
#pragma once

#include <cstdint>

#include "cuda/device/ptx.cuh"

namespace anyep::cuda {

inline constexpr unsigned kAllLanes = 0xFFFF'FFFFu;
inline constexpr int kLanes = 32;

__device__ __forceinline__ int lane_index() {
  return static_cast<int>(threadIdx.x % kLanes);
}
__device__ __forceinline__ int warp_index() {
  return static_cast<int>(threadIdx.x / kLanes);
}

template <class T>
__device__ __forceinline__ T from_lane(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
template <class T>
__device__ __forceinline__ T* from_lane(T* pointer, int lane) {
  return reinterpret_cast<T*>(__shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(pointer), lane));
}

/// warp_index(), known to be one for all lanes: behind a branch on it the compiler need not ask whether lanes have parted. All
/// lanes.
__device__ __forceinline__ int uniform_warp_index() {
  return from_lane(warp_index(), 0);
}

/// The widest access, 1 to 16 bytes, to which all of these addresses, strides and sizes are aligned.
__host__ __device__ __forceinline__ std::uint32_t common_alignment(std::uint64_t bits) {
  const std::uint64_t lowest = bits & (~bits + 1);
  return lowest == 0 || lowest > 16 ? 16 : static_cast<std::uint32_t>(lowest);
}
__host__ __device__ __forceinline__ std::uint64_t address_bits(const void* pointer) {
  return static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(pointer));
}

/// One warp copies `count` Words, kUnroll loads of each lane in flight.
template <class Word, int kUnroll = 8>
__device__ __forceinline__ void copy_words(Word* to, const Word* from, std::uint32_t count) {
  for (std::uint32_t first = static_cast<std::uint32_t>(lane_index()); first < count; first += kUnroll * kLanes) {
    Word words[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (first + i * kLanes < count) words[i] = from[first + i * kLanes];
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (first + i * kLanes < count) to[first + i * kLanes] = words[i];
    }
  }
}

/// Calls `with(Word{})` with the unsigned type of `width` bytes: 16 (uint4), 8, 4, 2 or 1.
template <class With>
__device__ __forceinline__ void with_word(std::uint32_t width, With&& with) {
  switch (width) {
    case 16:
      return with(uint4{});
    case 8:
      return with(std::uint64_t{});
    case 4:
      return with(std::uint32_t{});
    case 2:
      return with(std::uint16_t{});
    default:
      return with(std::uint8_t{});
  }
}

/// One warp copies `bytes`, as wide as both addresses and the size allow.
__device__ inline void copy_bytes(std::byte* to, const std::byte* from, std::uint32_t bytes) {
  with_word(common_alignment(address_bits(to) | address_bits(from) | bytes), [&](auto word) {
    using Word = decltype(word);
    copy_words(reinterpret_cast<Word*>(to), reinterpret_cast<const Word*>(from),
               bytes / static_cast<std::uint32_t>(sizeof(Word)));
  });
}

}  // namespace anyep::cuda
