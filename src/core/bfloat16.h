// BF16 and FP16 as bit patterns: exact to float, to nearest even from float, denormals kept.
// A NaN becomes 0x7fff in either format, whatever its sign and payload: the GPU's conversion instructions do the same.
#pragma once

#include "core/bits.h"

#include <cstdint>

namespace anyep::core {

inline constexpr std::uint16_t kBf16Nan = 0x7fff;
inline constexpr std::uint16_t kBf16Infinity = 0x7f80;
inline constexpr std::uint16_t kFp16Nan = 0x7fff;
inline constexpr std::uint16_t kFp16Infinity = 0x7c00;

ANYEP_HD ANYEP_INLINE constexpr float float_of_bf16(std::uint16_t bits) {
  return float_of_bits(static_cast<std::uint32_t>(bits) << 16);
}

ANYEP_HD ANYEP_INLINE constexpr std::uint16_t bf16_of_float(float value) {
  const std::uint32_t bits = bits_of(value);
  if ((bits & kFloatMagnitude) > kFloatInfinity) return kBf16Nan;
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/// A signalling NaN comes out quiet, its payload kept, as conversion instructions do.
ANYEP_HD ANYEP_INLINE constexpr float float_of_fp16(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000u) << 16;
  const std::uint32_t magnitude = bits & 0x7fffu;
  if (magnitude > kFp16Infinity) return float_of_bits(sign | 0x7fc00000u | (magnitude << 13));
  if (magnitude == kFp16Infinity) return float_of_bits(sign | kFloatInfinity);
  // FP16 bits moved to float's places mean 2^-112 of the value, denormals included, so one exact product repairs both.
  return float_of_bits(sign | bits_of(float_of_bits(magnitude << 13) * 0x1p112f));
}

ANYEP_HD ANYEP_INLINE constexpr std::uint16_t fp16_of_float(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t magnitude = bits & kFloatMagnitude;
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  if (magnitude > kFloatInfinity) return kFp16Nan;
  if (magnitude >= bits_of(65520.0f)) return static_cast<std::uint16_t>(sign | kFp16Infinity);
  if (magnitude < bits_of(0x1p-14f)) {  // 0.5 has a unit of 2^-24, FP16's denormal unit: the addition rounds
    return static_cast<std::uint16_t>(sign | (bits_of(float_of_bits(magnitude) + 0.5f) - bits_of(0.5f)));
  }
  const std::uint32_t rebased = magnitude - (112u << 23);  // exponent bias 127 to 15
  return static_cast<std::uint16_t>(sign | ((rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13));
}

}  // namespace anyep::core
