// Sums of rows in float32, rounded once: bias first, then ranks ascending, bit for bit what src/cpu/simd/sums.h computes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

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
  static __device__ __forceinline__ std::uint32_t added(std::uint32_t one, std::uint32_t other) {
    const __nv_bfloat162 sum =
        __hadd2_rn(reinterpret_cast<const __nv_bfloat162&>(one), reinterpret_cast<const __nv_bfloat162&>(other));
    return reinterpret_cast<const std::uint32_t&>(sum);
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
  static __device__ __forceinline__ std::uint32_t added(std::uint32_t one, std::uint32_t other) {
    const __half2 sum = __hadd2_rn(reinterpret_cast<const __half2&>(one), reinterpret_cast<const __half2&>(other));
    return reinterpret_cast<const std::uint32_t&>(sum);
  }
};

struct Fp32 {
  static constexpr int kElements = 4;

  static __device__ __forceinline__ std::uint32_t added(std::uint32_t one, std::uint32_t other) {
    return __float_as_uint(__uint_as_float(one) + __uint_as_float(other));
  }
};

/// 0 + one + other, what two rows add up to without bias, in the type's own arithmetic: the FP32 sum has at least 2p + 2 bits
/// (p = 8 or 11), so that rounding it once more gives what one rounding of the exact sum gives; below the normal range both
/// are exact. Adding 0 turns -0, the sum of two of them, into what the sum from 0 is.
template <class Type>
__device__ __forceinline__ uint4 sum_of_two(const uint4& one, const uint4& other) {
  const auto word = [](std::uint32_t a, std::uint32_t b) { return Type::added(Type::added(a, b), 0); };
  return {word(one.x, other.x), word(one.y, other.y), word(one.z, other.z), word(one.w, other.w)};
}

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
  static __device__ __forceinline__ uint4 read(const std::byte* from) { return ptx::load_l2(from); }
  static __device__ __forceinline__ void write(std::byte* to, const uint4& value) { ptx::store_streaming(to, value); }
};

/// 16 bytes in words of `width`, which divides every address. Out of line: the path of odd addresses only.
struct NarrowAccess {
  std::uint32_t width;

  __device__ __noinline__ uint4 read(const std::byte* from) const {
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
  __device__ __noinline__ void write(std::byte* to, const uint4& value) const {
    with_word(width, [&](auto word) {
      using Word = decltype(word);
#pragma unroll
      for (std::size_t i = 0; i < 16 / sizeof(Word); ++i) {
        reinterpret_cast<Word*>(to)[i] = reinterpret_cast<const Word*>(&value)[i];
      }
    });
  }
};

/// What a token's row is made of besides ranks' rows; or a part of it.
struct RowFrame {
  std::byte* out;
  const std::byte *first_bias, *second_bias;  ///< null = none
  std::uint32_t vectors;                      ///< 16 bytes each

  __device__ bool has_bias() const { return first_bias != nullptr || second_bias != nullptr; }
  /// Bias of the vector at byte `at`, or zero.
  template <class Type, class Access>
  __device__ __forceinline__ Sum<Type> start(const Access& access, std::uint64_t at) const {
    Sum<Type> sum;
    sum.zero();
    if (first_bias != nullptr) sum.set(access.read(first_bias + at));
    if (second_bias != nullptr) {
      sum.add(access.read(second_bias + at));
    } else if (first_bias != nullptr) {
      sum.add_zero();
    }
    return sum;
  }
};

template <int kCount>
using Unroll = std::integral_constant<int, kCount>;

/// Bytes from a lane's vector to its next.
inline constexpr std::uint32_t kVectorStep = kLanes * 16;

/// A lane's kUnroll vectors: out = first + second, no bias; the common case of two ranks.
template <class Type, int kUnroll, class Access>
__device__ __forceinline__ void sum_two(const Access& access, std::byte* out, const std::byte* first,
                                        const std::byte* second) {
  uint4 one[kUnroll], other[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    one[i] = access.read(first + i * kVectorStep);
    other[i] = access.read(second + i * kVectorStep);
  }
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) access.write(out + i * kVectorStep, sum_of_two<Type>(one[i], other[i]));
}

/// The same for any ranks and any bias, from byte `at` on. Lane r holds rank r's row where bit r of `ranks` is set; a lane
/// with `mine` false only takes part in telling rows.
template <class Type, int kUnroll, class Access>
__device__ __forceinline__ void sum_any(const Access& access, const RowFrame& frame, const std::byte* row,
                                        unsigned ranks, std::uint64_t at, bool mine) {
  Sum<Type> sums[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (mine) sums[i] = frame.start<Type>(access, at + i * kVectorStep);
  }
  for (unsigned rest = ranks; rest != 0; rest &= rest - 1) {
    const std::byte* const from = from_lane(row, __ffs(static_cast<int>(rest)) - 1) + at;
    if (!mine) continue;
    uint4 values[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) values[i] = access.read(from + i * kVectorStep);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) sums[i].add(values[i]);
  }
  if (!mine) return;
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) access.write(frame.out + at + i * kVectorStep, sums[i].rounded());
}

/// One warp, two ranks: long steps, short ones, the end. 28 vectors a lane in a row of 14 KiB.
template <class Type, class Access>
__device__ __forceinline__ void sum_row_of_two(const Access& access, const RowFrame& frame, const std::byte* first,
                                               const std::byte* second) {
  const int begin = lane_index() * 16;
  first += begin;
  second += begin;
  std::byte* out = frame.out + begin;
  int left = static_cast<int>(frame.vectors * 16);  // bytes of the warp
  const auto steps = [&](auto unroll) {
    constexpr int kUnroll = decltype(unroll)::value, kBytes = kUnroll * static_cast<int>(kVectorStep);
    for (; left >= kBytes; left -= kBytes) {
      sum_two<Type, kUnroll>(access, out, first, second);
      out += kBytes;
      first += kBytes;
      second += kBytes;
    }
  };
  steps(Unroll<7>{});
  steps(Unroll<2>{});
  steps(Unroll<1>{});
  if (begin < left) sum_two<Type, 1>(access, out, first, second);
}

/// One warp sums a whole row from memory.
template <class Type, class Access>
__device__ __forceinline__ void sum_row(const Access& access, const RowFrame& frame, const std::byte* row,
                                        unsigned ranks) {
  if (__popc(ranks) == 2 && !frame.has_bias()) {
    sum_row_of_two<Type>(access, frame, from_lane(row, __ffs(static_cast<int>(ranks)) - 1),
                         from_lane(row, 31 - __clz(static_cast<int>(ranks))));
    return;
  }
  constexpr std::uint32_t kUnroll = 4;
  const std::uint32_t bytes = frame.vectors * 16;
  std::uint32_t at = static_cast<std::uint32_t>(lane_index()) * 16, step = 0;
  for (; step + kUnroll * kVectorStep <= bytes; step += kUnroll * kVectorStep) {
    sum_any<Type, kUnroll>(access, frame, row, ranks, step + at, true);
  }
  for (; step < bytes; step += kVectorStep) sum_any<Type, 1>(access, frame, row, ranks, step + at, step + at < bytes);
}

}  // namespace anyep::cuda
