// Stands in for CUDA's.
#pragma once

#include "core/bfloat16.h"
#include "cuda_runtime.h"

struct __nv_bfloat162 {
  std::uint16_t x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {anyep::core::bf16_of_float(low), anyep::core::bf16_of_float(high)};
}
inline __nv_bfloat162 __hadd2_rn(__nv_bfloat162 a, __nv_bfloat162 b) {
  using anyep::core::float_of_bf16;
  return __floats2bfloat162_rn(float_of_bf16(a.x) + float_of_bf16(b.x), float_of_bf16(a.y) + float_of_bf16(b.y));
}
