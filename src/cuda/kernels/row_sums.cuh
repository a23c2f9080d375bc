// Sums of rows in float32, rounded once: bias first, then ranks ascending, bit for bit what src/cpu/simd/sums.h computes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/device/warp.cuh"

namespace anyep::cuda {

/// Element types: 16 bytes as floats. set() takes the first summand as it is, so that -0 stays; add() is IEEE addition.
struct Bf16 {
  static constexpr int kElements = 8;

  static __device__ __forceinline__ float2 floats(std::uint32_t pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF'0000u)};
  }
  static __device__ __forceinline__ std::uint32_t rounded(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(pair);
  }
};

struct Fp16 {
  static constexpr int kElements = 8;

  static __device__ __forceinline__ float2 floats(std::uint32_t pair) {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  }
  static __device__ __forceinline__ std::uint32_t rounded(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(pair);
  }
};

struct Fp32 {
  static constexpr int kElements = 4;
};

/// The running sum of 16 bytes of elements.
template <class Type>
struct Sum {
  float at[Type::kElements];

  __device__ __forceinline__ void zero() {
#pragma unroll
    for (float& sum : at) sum = 0.0f;
  }

  __device__ __forceinline__ void set(const uint4& more) {
    for_each(more, [](float& sum, float value) { sum = value; });
  }
  __device__ __forceinline__ void add(const uint4& more) {
    for_each(more, [](float& sum, float value) { sum += value; });
  }
  __device__ __forceinline__ void add_zero() {
#pragma unroll
    for (float& sum : at) sum += 0.0f;  // -0 becomes +0
  }

  __device__ __forceinline__ uint4 rounded() const {
    if constexpr (Type::kElements == 4) {
      return {__float_as_uint(at[0]), __float_as_uint(at[1]), __float_as_uint(at[2]), __float_as_uint(at[3])};
    } else {
      return {Type::rounded(at[0], at[1]), Type::rounded(at[2], at[3]), Type::rounded(at[4], at[5]),
              Type::rounded(at[6], at[7])};
    }
  }

 private:
  template <class With>
  __device__ __forceinline__ void for_each(const uint4& more, With&& with) {
    const std::uint32_t words[4] = {more.x, more.y, more.z, more.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (Type::kElements == 4) {
        with(at[i], __uint_as_float(words[i]));
      } else {
        const float2 pair = Type::floats(words[i]);
        with(at[2 * i], pair.x);
        with(at[2 * i + 1], pair.y);
      }
    }
  }
};

/// 16 bytes at a time, everything aligned.
struct WideAccess {
  static __device__ __forceinline__ uint4 load(const std::byte* from) { return ptx::load_l2(from); }
  static __device__ __forceinline__ void store(std::byte* to, const uint4& value) { ptx::store_streaming(to, value); }
};

/// 16 bytes in words of `width`, which divides every address. Out of line: the path of odd addresses only.
struct NarrowAccess {
  std::uint32_t width;

  __device__ __noinline__ uint4 load(const std::byte* from) const {
    uint4 value;
    with_word(width, [&](auto word) {
      using Word = decltype(word);
#pragma unroll
      for (std::size_t i = 0; i < 16 / sizeof(Word); ++i) {
        reinterpret_cast<Word*>(&value)[i] = reinterpret_cast<const Word*>(from)[i];
      }
    });
    return value;
  }
  __device__ __noinline__ void store(std::byte* to, const uint4& value) const {
    with_word(width, [&](auto word) {
      using Word = decltype(word);
#pragma unroll
      for (std::size_t i = 0; i < 16 / sizeof(Word); ++i) {
        reinterpret_cast<Word*>(to)[i] = reinterpret_cast<const Word*>(&value)[i];
      }
    });
  }
};

/// What a token's row is made of besides ranks' rows.
struct RowFrame {
  std::byte* out;
  const std::byte *first_bias, *second_bias;  ///< null = none
  std::uint32_t vectors;                      ///< 16 bytes each

  __device__ bool has_bias() const { return first_bias != nullptr || second_bias != nullptr; }
  template <class Type, class Access>
  __device__ __forceinline__ Sum<Type> start(const Access& access, std::uint32_t vector) const {
    Sum<Type> sum;
    sum.zero();
    if (first_bias != nullptr) sum.set(access.load(first_bias + vector * 16u));
    if (second_bias != nullptr) {
      sum.add(access.load(second_bias + vector * 16u));
    } else if (first_bias != nullptr) {
      sum.add_zero();
    }
    return sum;
  }
};

/// One warp: out = first + second, no bias; the common case of two ranks. kGuarded: the row ends inside.
template <class Type, int kUnroll, bool kGuarded, class Access>
__device__ __forceinline__ void sum_two(const Access& access, const RowFrame& frame, const std::byte* first,
                                        const std::byte* second, std::uint32_t vector) {
  uint4 left[kUnroll], right[kUnroll];
#pragma unroll
  for (std::uint32_t i = 0; i < kUnroll; ++i) {
    const std::uint32_t at = vector + i * kLanes;
    if (kGuarded && at >= frame.vectors) break;
    left[i] = access.load(first + at * 16u);
    right[i] = access.load(second + at * 16u);
  }
#pragma unroll
  for (std::uint32_t i = 0; i < kUnroll; ++i) {
    const std::uint32_t at = vector + i * kLanes;
    if (kGuarded && at >= frame.vectors) break;
    Sum<Type> sum;
    sum.zero();
    sum.add(left[i]);
    sum.add(right[i]);
    access.store(frame.out + at * 16u, sum.rounded());
  }
}

/// One warp: any ranks, any bias. Lane r holds rank r's row where bit r of `ranks` is set.
template <class Type, int kUnroll, bool kGuarded, class Access>
__device__ __forceinline__ void sum_any(const Access& access, const RowFrame& frame, const std::byte* row,
                                        unsigned ranks, std::uint32_t vector) {
  Sum<Type> sums[kUnroll];
#pragma unroll
  for (std::uint32_t i = 0; i < kUnroll; ++i) {
    const std::uint32_t at = vector + i * kLanes;
    if (!kGuarded || at < frame.vectors) sums[i] = frame.start<Type>(access, at);
  }
  for (unsigned rest = ranks; rest != 0; rest &= rest - 1) {
    const std::byte* const from = from_lane(row, __ffs(static_cast<int>(rest)) - 1);
    uint4 values[kUnroll];
#pragma unroll
    for (std::uint32_t i = 0; i < kUnroll; ++i) {
      const std::uint32_t at = vector + i * kLanes;
      if (!kGuarded || at < frame.vectors) values[i] = access.load(from + at * 16u);
    }
#pragma unroll
    for (std::uint32_t i = 0; i < kUnroll; ++i) {
      if (!kGuarded || vector + i * kLanes < frame.vectors) sums[i].add(values[i]);
    }
  }
#pragma unroll
  for (std::uint32_t i = 0; i < kUnroll; ++i) {
    const std::uint32_t at = vector + i * kLanes;
    if (!kGuarded || at < frame.vectors) access.store(frame.out + at * 16u, sums[i].rounded());
  }
}

/// One warp sums a whole row from memory.
template <class Type, class Access>
__device__ __forceinline__ void sum_row(const Access& access, const RowFrame& frame, const std::byte* row,
                                        unsigned ranks) {
  const auto lane = static_cast<std::uint32_t>(lane_index());
  std::uint32_t vector = 0;
  if (__popc(ranks) == 2 && !frame.has_bias()) {
    constexpr std::uint32_t kUnroll = 7, kStep = kUnroll * kLanes;  // 28 vectors a lane in a row of 14 KiB
    const std::byte* const first = from_lane(row, __ffs(static_cast<int>(ranks)) - 1);
    const std::byte* const second = from_lane(row, 31 - __clz(static_cast<int>(ranks)));
    for (; vector + kStep <= frame.vectors; vector += kStep) {
      sum_two<Type, kUnroll, false>(access, frame, first, second, vector + lane);
    }
    if (vector < frame.vectors) sum_two<Type, kUnroll, true>(access, frame, first, second, vector + lane);
    return;
  }
  constexpr std::uint32_t kUnroll = 4, kStep = kUnroll * kLanes;
  for (; vector + kStep <= frame.vectors; vector += kStep) {
    sum_any<Type, kUnroll, false>(access, frame, row, ranks, vector + lane);
  }
  if (vector < frame.vectors) sum_any<Type, kUnroll, true>(access, frame, row, ranks, vector + lane);
}

}  // namespace anyep::cuda
