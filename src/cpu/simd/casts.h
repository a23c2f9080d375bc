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
inline constexpr std::int64_t kFp8Batch = 16;                       ///< blocks: 4 KiB of BF16, read twice
inline constexpr std::uint32_t kFp8Least = core::bits_of(0x1p-6f);  ///< E4M3's least normal number

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

/// The largest magnitude of 128 values as bits; at least 0x7f80 if one is not finite.
ANYEP_INLINE std::uint16_t block_amax(const std::uint16_t* x) {
  Halves amax{};
#pragma GCC unroll 16
  for (int i = 0; i < kFp8Vectors; ++i) {
    amax = larger(amax, load<Halves>(x + i * (kWidth / 2)) & std::uint16_t{0x7fff});
  }
  return largest(amax);
}

/// Casts 128 finite values.
ANYEP_INLINE void cast_block(const std::uint16_t* x, float multiplier, std::uint8_t* out) {
  const Floats factor = all(multiplier);
#pragma GCC unroll 8
  for (int i = 0; i < kFp8Vectors; i += 2) {
    const Halves first = load<Halves>(x + i * (kWidth / 2));
    const Halves second = load<Halves>(x + (i + 1) * (kWidth / 2));
    store(out + i * (kWidth / 2), narrow(e4m3_of(first, factor), e4m3_of(second, factor)));
  }
}

/// Whole blocks of a row, or a copy of its last one.
struct Fp8Blocks {
  const std::uint16_t* x;
  std::uint8_t* out;
  std::int64_t first, count;  ///< where their scales go; up to kFp8Batch
};

/// The scales come before the values, so that the delay of the divisions is paid once.
inline void cast_blocks(const core::Fp8Cast& cast, core::ScaleRule rule, const Fp8Blocks& blocks) {
  float multipliers[kFp8Batch];
  bool finite[kFp8Batch];
  for (std::int64_t i = 0; i < blocks.count; ++i) {
    const std::uint16_t* const x = blocks.x + i * core::kFp8Block;
    std::uint16_t amax = block_amax(x);
    finite[i] = amax < core::kBf16Infinity;
    if (!finite[i]) amax = core::bf16_amax(x, core::kFp8Block);
    const core::Fp8Scale scale = core::fp8_scale(core::float_of_bf16(amax), rule);
    multipliers[i] = scale.multiplier;
    core::store_fp8_scale(cast, blocks.first + i, scale.stored);
  }
  for (std::int64_t i = 0; i < blocks.count; ++i) {
    const std::uint16_t* const x = blocks.x + i * core::kFp8Block;
    std::uint8_t* const out = blocks.out + i * core::kFp8Block;
    if (finite[i]) {
      cast_block(x, multipliers[i], out);
    } else {
      core::cast_fp8_values(x, core::kFp8Block, multipliers[i], out);
    }
  }
}

inline void cast_fp8(const core::Fp8Cast& to_do) {
  const core::Fp8Cast cast = to_do;
  const core::ScaleRule rule = cast.form == core::ScaleForm::kUE8M0 ? core::ScaleRule::kPowerOfTwo : cast.rule;
  const std::int64_t whole = cast.hidden / core::kFp8Block;
  for (std::int64_t first = 0; first < whole; first += kFp8Batch) {
    const std::int64_t count = whole - first < kFp8Batch ? whole - first : kFp8Batch;
    cast_blocks(cast, rule, {cast.x + first * core::kFp8Block, cast.out + first * core::kFp8Block, first, count});
  }
  const std::int64_t left = cast.hidden % core::kFp8Block;
  if (left == 0) return;
  std::uint16_t x[core::kFp8Block] = {};  // filled up with zeros: they do not change the scale
  std::uint8_t out[core::kFp8Block];
  __builtin_memcpy(x, cast.x + whole * core::kFp8Block, static_cast<std::size_t>(2 * left));
  cast_blocks(cast, rule, {x, out, whole, 1});
  __builtin_memcpy(cast.out + whole * core::kFp8Block, out, static_cast<std::size_t>(left));
}

inline std::int64_t logfmt_encode(const std::uint16_t* x, std::int64_t hidden, std::uint8_t* out) {
  return core::logfmt_encode(x, hidden, out);
}

inline void logfmt_decode(const std::uint8_t* in, std::int64_t hidden, float* out) {
  core::logfmt_decode(in, hidden, out);
}

}  // namespace anyep::cpu::simd::ANYEP_SIMD_ISA
