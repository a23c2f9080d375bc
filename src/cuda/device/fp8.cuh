// The cast of low-latency dispatch as one warp does it: 16 elements a lane, 8 lanes a block of 128. Bits: core/fp8.h.
#pragma once

#include <cstdint>

#include "core/fp8.h"
#include "cuda/device/ptx.cuh"
#include "cuda/device/warp.cuh"

namespace anyep::cuda {

/// The two BF16 values of a 32-bit word.
__device__ __forceinline__ float low_bf16(std::uint32_t pair) {
  return core::float_of_bits(pair << 16);
}
__device__ __forceinline__ float high_bf16(std::uint32_t pair) {
  return core::float_of_bits(pair & 0xFFFF'0000u);
}

__device__ __forceinline__ std::uint32_t e4m3_of_pair(float low, float high) {
  if constexpr (ptx::kConvertsE4m3) {
    return ptx::e4m3_of_two(low, high);
  } else {
    return core::e4m3_of_float(low) | static_cast<std::uint32_t>(core::e4m3_of_float(high)) << 8;
  }
}

/// 16 BF16 values (two vectors) of each lane to 16 bytes. Lanes beyond the row hold zeros. `stored`: the scale of the
/// lane's block. All lanes.
__device__ __forceinline__ uint4 cast_to_fp8(const uint4& first, const uint4& second, core::ScaleRule rule,
                                             float& stored) {
  const std::uint32_t pairs[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
  float amax = 0.0f;
#pragma unroll
  for (const std::uint32_t pair : pairs) {
    amax = fmaxf(amax, fmaxf(fabsf(low_bf16(pair)), fabsf(high_bf16(pair))));  // fmaxf drops NaN, as bf16_amax does
  }
#pragma unroll
  for (int lanes = 4; lanes > 0; lanes /= 2) amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, lanes));
  const core::Fp8Scale scale = core::fp8_scale(amax, rule);
  stored = scale.stored;
  std::uint32_t quads[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t a = pairs[2 * i], b = pairs[2 * i + 1];
    quads[i] = e4m3_of_pair(low_bf16(a) * scale.multiplier, high_bf16(a) * scale.multiplier) |
               e4m3_of_pair(low_bf16(b) * scale.multiplier, high_bf16(b) * scale.multiplier) << 16;
  }
  return make_uint4(quads[0], quads[1], quads[2], quads[3]);
}

}  // namespace anyep::cuda
