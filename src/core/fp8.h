// FP8 E4M3 and the cast of low-latency dispatch: 128 channels share a scale (specification 10.1).
// Same bits on CPU and GPU; needs IEEE division and no contraction of a*b+c.
#pragma once

#include "core/bfloat16.h"

#include <cstdint>

namespace anyep::core {

inline constexpr std::uint8_t kE4m3Nan = 0x7f;
inline constexpr float kE4m3Max = 448.0f;
inline constexpr std::int64_t kFp8Block = 128;      ///< channels that share a scale
inline constexpr float kFp8LeastAmax = 1e-4f;       ///< keeps the scale of an all-zero block finite
inline constexpr float kFp8Unit = 1.0f / kE4m3Max;  ///< rounded to float32

enum class ScaleRule : std::uint8_t { kExact, kPowerOfTwo };
enum class ScaleForm : std::uint8_t { kF32, kUE8M0 };  ///< kUE8M0 implies ScaleRule::kPowerOfTwo

/// One row to cast.
struct Fp8Cast {
  const std::uint16_t* x = nullptr;  ///< BF16 bits
  std::int64_t hidden = 0;           ///< any number > 0; the last block of 128 may be partial
  std::uint8_t* out = nullptr;       ///< [hidden] E4M3
  void* scales = nullptr;            ///< kF32: float[num_fp8_scales]; kUE8M0: int32[num_packed_scales]; 4-byte aligned
  ScaleRule rule = ScaleRule::kExact;
  ScaleForm form = ScaleForm::kF32;
};

struct Fp8Scale {
  float multiplier;  ///< applied to x before the conversion
  float stored;      ///< multiplies the converted value back
};

/// Blocks of 128, hence scales, in a row.
ANYEP_HD ANYEP_INLINE constexpr std::int64_t num_fp8_scales(std::int64_t hidden) {
  return (hidden + kFp8Block - 1) / kFp8Block;
}
/// 32-bit words that hold the row's UE8M0 bytes.
ANYEP_HD ANYEP_INLINE constexpr std::int64_t num_packed_scales(std::int64_t hidden) {
  return (num_fp8_scales(hidden) + 3) / 4;
}

/// To nearest even; beyond 448, infinities included, to 448; NaN to 0x7f.
ANYEP_HD ANYEP_INLINE constexpr std::uint8_t e4m3_of_float(float value) {
  const std::uint32_t bits = bits_of(value);
  std::uint32_t magnitude = bits & kFloatMagnitude;
  if (magnitude > kFloatInfinity) return kE4m3Nan;
  if (magnitude > bits_of(kE4m3Max)) magnitude = bits_of(kE4m3Max);
  // Adding 2^20 times the value's power of two (2^-6 at least: denormals) leaves a float whose unit is E4M3's unit.
  const std::uint32_t least = bits_of(0x1p-6f);
  const std::uint32_t power = (magnitude > least ? magnitude : least) & kFloatInfinity;
  const std::uint32_t magic = power + (20u << 23);
  const std::uint32_t units = bits_of(float_of_bits(magnitude) + float_of_bits(magic)) - magic;
  return static_cast<std::uint8_t>(((bits >> 24) & 0x80u) | (units + ((power - least) >> 20)));
}

ANYEP_HD ANYEP_INLINE constexpr float float_of_e4m3(std::uint8_t code) {
  const std::uint32_t sign = (code & 0x80u) << 24;
  const std::uint32_t magnitude = code & 0x7fu;
  if (magnitude == kE4m3Nan) return float_of_bits(sign | 0x7fc00000u);
  return float_of_bits(sign | bits_of(float_of_bits(magnitude << 20) * 0x1p120f));
}

/// `amax`: the largest magnitude of the block that is not NaN; 0 for none.
ANYEP_HD ANYEP_INLINE constexpr Fp8Scale fp8_scale(float amax, ScaleRule rule) {
  const float bounded = amax > kFp8LeastAmax ? amax : kFp8LeastAmax;
  const float unit = bounded * kFp8Unit;
  if (rule == ScaleRule::kExact) return {kE4m3Max / bounded, unit};
  const std::uint32_t bits = bits_of(unit);
  const std::uint32_t exponent =
      (bits >> 23) + ((bits & 0x7fffffu) != 0 ? 1u : 0u);  // biased; 255 for an infinite amax
  // 2^-e as bits; an infinite amax has e = 128, and 2^-128 is a denormal.
  const float multiplier =
      exponent < 254 ? float_of_bits((254u - exponent) << 23) : float_of_bits(0x400000u >> (exponent - 254u));
  return {multiplier, float_of_bits(exponent << 23)};
}

ANYEP_HD ANYEP_INLINE constexpr std::uint8_t ue8m0_of_scale(float stored) {
  return static_cast<std::uint8_t>(bits_of(stored) >> 23);
}
ANYEP_HD ANYEP_INLINE constexpr float float_of_ue8m0(std::uint8_t byte) {
  return float_of_bits(static_cast<std::uint32_t>(byte) << 23);
}

/// The largest magnitude of `count` BF16 values that is not NaN, as bits.
ANYEP_HD ANYEP_INLINE constexpr std::uint16_t bf16_amax(const std::uint16_t* x, std::int64_t count) {
  std::uint16_t amax = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto magnitude = static_cast<std::uint16_t>(x[i] & 0x7fffu);
    if (magnitude > amax && magnitude <= kBf16Infinity) amax = magnitude;
  }
  return amax;
}

/// Stores the scale of block `block`. Blocks come in ascending order: the first of a packed word clears the other
/// bytes.
ANYEP_HD ANYEP_INLINE void store_fp8_scale(const Fp8Cast& cast, std::int64_t block, float stored) {
  if (cast.form == ScaleForm::kF32) {
    static_cast<float*>(cast.scales)[block] = stored;
    return;
  }
  auto* const word = static_cast<std::uint32_t*>(cast.scales) + block / 4;
  const std::uint32_t earlier = block % 4 == 0 ? 0u : *word;
  *word = earlier | (static_cast<std::uint32_t>(ue8m0_of_scale(stored)) << (8 * (block % 4)));
}

ANYEP_HD ANYEP_INLINE constexpr void cast_fp8_values(const std::uint16_t* x, std::int64_t count, float multiplier,
                                                     std::uint8_t* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = e4m3_of_float(float_of_bf16(x[i]) * multiplier);
}

/// Casts one block; the row's other blocks stay untouched.
ANYEP_HD ANYEP_INLINE void cast_fp8_block(const Fp8Cast& cast, std::int64_t block) {
  const std::int64_t first = block * kFp8Block;
  const std::int64_t count = cast.hidden - first < kFp8Block ? cast.hidden - first : kFp8Block;
  const std::uint16_t* const x = cast.x + first;
  const ScaleRule rule = cast.form == ScaleForm::kUE8M0 ? ScaleRule::kPowerOfTwo : cast.rule;
  const Fp8Scale scale = fp8_scale(float_of_bf16(bf16_amax(x, count)), rule);
  cast_fp8_values(x, count, scale.multiplier, cast.out + first);
  store_fp8_scale(cast, block, scale.stored);
}

/// Casts a row: the definition that vectorised kernels are compared with. Not for files compiled for a newer CPU.
ANYEP_HD inline void cast_fp8_row(const Fp8Cast& cast) {
  for (std::int64_t block = 0; block < num_fp8_scales(cast.hidden); ++block) cast_fp8_block(cast, block);
}

}  // namespace anyep::core
