// The FP8 cast of low-latency dispatch, and LogFMT.
#pragma once

#include "core/fp8.h"
#include "core/logfmt.h"
#include "cpu/simd/arithmetic.h"
#include "cpu/simd/vector.h"

#include <cstddef>
#include <cstdint>

namespace anyep::cpu::simd::ANYEP_SIMD_ISA {

inline constexpr int kFp8Vectors = static_cast<int>(core::kFp8Block) * 2 / kWidth;  ///< of BF16 in a block of 128
inline constexpr std::uint32_t kFp8Least = core::bits_of(0x1p-6f);                  ///< E4M3's least normal number

/// core::e4m3_of_float of finite values up to 448 (which those a little above round to), without the sign, plus
/// kFp8Least >> 20; as 32-bit elements.
ANYEP_INLINE Ints e4m3_magnitude(Floats x) {
  const Floats magnitude = as<Floats>(as<Words>(x) & core::kFloatMagnitude);
  const Words power = as<Words>(larger(magnitude, all(0x1p-6f))) & core::kFloatInfinity;
  const Words magic = power + (20u << 23);
  return as<Ints>(as<Words>(magnitude + as<Floats>(magic)) - magic + (power >> 20));
}

/// E4M3 of one vector of BF16 times `multiplier`, as 16-bit elements.
ANYEP_INLINE Halves e4m3_of(Halves x, Floats multiplier) {
  const Pair<Floats> values = floats_of_bf16(x);
  const Halves magnitude = narrow({e4m3_magnitude(values.low * multiplier), e4m3_magnitude(values.high * multiplier)});
  return (magnitude - static_cast<std::uint16_t>(kFp8Least >> 20)) | ((x >> 8) & std::uint16_t{0x80});
}

/// Casts 128 values. False, with nothing written, if one is not finite.
ANYEP_INLINE bool cast_whole_block(const std::uint16_t* x, std::uint8_t* out, core::ScaleRule rule, float& stored) {
  Halves values[kFp8Vectors];
  Halves amax{};
#pragma GCC unroll 16
  for (int i = 0; i < kFp8Vectors; ++i) {
    values[i] = load<Halves>(x + i * (kWidth / 2));
    amax = larger(amax, values[i] & std::uint16_t{0x7fff});
  }
  const std::uint16_t largest_bits = largest(amax);
  if (largest_bits >= core::kBf16Infinity) return false;
  const core::Fp8Scale scale = core::fp8_scale(core::float_of_bf16(largest_bits), rule);
  const Floats multiplier = all(scale.multiplier);
#pragma GCC unroll 8
  for (int i = 0; i < kFp8Vectors; i += 2) {
    store(out + i * (kWidth / 2), narrow(e4m3_of(values[i], multiplier), e4m3_of(values[i + 1], multiplier)));
  }
  stored = scale.stored;
  return true;
}

/// The row's last block, filled up with zeros: they do not change the scale.
ANYEP_INLINE bool cast_partial_block(const std::uint16_t* x, std::int64_t count, std::uint8_t* out,
                                     core::ScaleRule rule, float& stored) {
  std::uint16_t whole[core::kFp8Block] = {};
  std::uint8_t codes[core::kFp8Block];
  __builtin_memcpy(whole, x, static_cast<std::size_t>(2 * count));
  if (!cast_whole_block(whole, codes, rule, stored)) return false;
  __builtin_memcpy(out, codes, static_cast<std::size_t>(count));
  return true;
}

inline void cast_fp8(const core::Fp8Cast& to_do) {
  const core::Fp8Cast cast = to_do;
  const core::ScaleRule rule = cast.form == core::ScaleForm::kUE8M0 ? core::ScaleRule::kPowerOfTwo : cast.rule;
  for (std::int64_t first = 0; first < cast.hidden; first += core::kFp8Block) {
    const std::int64_t left = cast.hidden - first;
    const std::int64_t block = first / core::kFp8Block;
    float stored = 0;
    const bool done = left >= core::kFp8Block
                          ? cast_whole_block(cast.x + first, cast.out + first, rule, stored)
                          : cast_partial_block(cast.x + first, left, cast.out + first, rule, stored);
    if (done) {
      core::store_fp8_scale(cast, block, stored);
    } else {
      core::cast_fp8_block(cast, block);
    }
  }
}

inline std::int64_t logfmt_encode(const std::uint16_t* x, std::int64_t hidden, std::uint8_t* out) {
  return core::logfmt_encode(x, hidden, out);
}

inline void logfmt_decode(const std::uint8_t* in, std::int64_t hidden, float* out) {
  core::logfmt_decode(in, hidden, out);
}

}  // namespace anyep::cpu::simd::ANYEP_SIMD_ISA
