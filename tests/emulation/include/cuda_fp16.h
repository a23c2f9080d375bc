// Stands in for CUDA's.
#pragma once

#include "core/bfloat16.h"
#include "cuda_runtime.h"

struct __half2 {
  std::uint16_t x, y;
};
inline float2 __half22float2(__half2 pair) {
  return {anyep::core::float_of_fp16(pair.x), anyep::core::float_of_fp16(pair.y)};
}
inline __half2 __floats2half2_rn(float low, float high) {
  return {anyep::core::fp16_of_float(low), anyep::core::fp16_of_float(high)};
}
inline __half2 __hadd2_rn(__half2 a, __half2 b) {
  const float2 one = __half22float2(a), other = __half22float2(b);
  return __floats2half2_rn(one.x + other.x, one.y + other.y);
}
