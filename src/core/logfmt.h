// LogFMT-10: a row as signs and 9-bit logarithms, 1.25 hidden + hidden/32 bytes (specification 10.4).
//
// A group is 128 channels; its codes divide log2 of the magnitudes from the group's smallest to its largest, at most 32
// octaves, into 510 steps. A chunk is 1024 channels if hidden is a multiple of 1024, else 512 (the last may be
// shorter); it is coded if every group of it qualifies, else it travels as BF16, unchanged.
//
// Wire form of a row, hidden a multiple of 128; no alignment is needed, fields are little endian:
//   header   bit c = chunk c is coded; one bit per chunk, zeros up to a multiple of 16 bytes
//   chunks   one after the other, no gaps:
//     coded    per group {amax, amin}, the magnitudes' BF16 bits, 2 x 2 bytes; then per group 160 bytes:
//              [128] low 8 bits of the codes; [16] their bit 8; [16] signs. Bit b of byte j of a plane: channel 16 b +
//              j
//     as BF16  2 bytes per channel
//   zeros    up to a multiple of 16 bytes
// A slot of logfmt_max_bytes(hidden) always suffices. No input makes the decoder read beyond it.
//
// Only additions, products and float divisions in a fixed order: every CPU and GPU gives the same bits, given IEEE
// division and no contraction of a*b+c. Codes are within one of the exact rule (numeric_logfmt_test).
#pragma once

#include "core/bfloat16.h"

#include <cstddef>
#include <cstdint>

namespace anyep::core {

inline constexpr std::int64_t kLogFmtGroup = 128;
inline constexpr std::int64_t kLogFmtCodeBytes = 160;  ///< codes and signs of a group
inline constexpr std::int64_t kLogFmtEndsBytes = 4;    ///< amax and amin of a group
inline constexpr std::uint32_t kLogFmtTop = 511;       ///< the code of amax; 1 is that of amin, 0 is zero
inline constexpr float kLogFmtOctaves = 32.0f;         ///< the widest range; smaller magnitudes become 0

ANYEP_HD ANYEP_INLINE constexpr std::int64_t logfmt_chunk(std::int64_t hidden) {
  return hidden % 1024 == 0 ? 1024 : 512;
}
ANYEP_HD ANYEP_INLINE constexpr std::int64_t logfmt_num_chunks(std::int64_t hidden) {
  return (hidden + logfmt_chunk(hidden) - 1) / logfmt_chunk(hidden);
}
ANYEP_HD ANYEP_INLINE constexpr std::int64_t logfmt_header_bytes(std::int64_t hidden) {
  return (logfmt_num_chunks(hidden) + 127) / 128 * 16;
}
/// The most that a row can take, a multiple of 16.
ANYEP_HD ANYEP_INLINE constexpr std::int64_t logfmt_max_bytes(std::int64_t hidden) {
  return logfmt_header_bytes(hidden) + 2 * hidden;
}

/// Smallest and largest magnitude of a group, as BF16 bits.
struct LogFmtEnds {
  std::uint16_t amax = 0, amin = 0;
};

/// What coding and decoding of one group need.
struct LogFmtGroup {
  float amax;      ///< largest magnitude
  float least;     ///< what code 1 decodes to
  float log_amax;  ///< log2 of amax's significand
  std::int32_t exponent;
  float step;           ///< octaves per code
  float codes_per_log;  ///< 1 / step
  float rounding;       ///< added before the floor; puts the threshold at the linear midpoint between two values
};

ANYEP_HD ANYEP_INLINE constexpr LogFmtEnds logfmt_ends(const std::uint16_t* x) {
  std::uint16_t amax = 0;
  std::uint16_t amin = 0x7fff;
  for (std::int64_t i = 0; i < kLogFmtGroup; ++i) {
    const auto magnitude = static_cast<std::uint16_t>(x[i] & 0x7fffu);
    amax = magnitude > amax ? magnitude : amax;
    amin = magnitude < amin ? magnitude : amin;
  }
  return {amax, amin};
}

/// log2 amax < 0 and a range that is not empty; BF16 bits order like magnitudes. False if anything is not finite.
ANYEP_HD ANYEP_INLINE constexpr bool logfmt_qualifies(LogFmtEnds ends) {
  return ends.amax < bits_of(1.0f) >> 16 && ends.amin < ends.amax;
}

/// Bits of a magnitude below 1 times 2^64, which makes every BF16 denormal normal and leaves 0 below every logarithm in
/// use.
ANYEP_HD ANYEP_INLINE constexpr std::uint32_t logfmt_scaled_bits(std::uint16_t magnitude) {
  return bits_of(float_of_bf16(magnitude) * 0x1p64f);
}

/// log2 of the significand in [1, 2). Minimax polynomial without constant term (Remez), 4.7e-8 before rounding.
ANYEP_HD ANYEP_INLINE constexpr float logfmt_log2(std::uint32_t bits) {
  const float f = float_of_bits((bits & 0x7fffffu) | bits_of(1.0f)) - 1.0f;
  float p = -0.00930919727f;
  p = p * f + 0.0520591313f;
  p = p * f + -0.137521553f;
  p = p * f + 0.241864941f;
  p = p * f + -0.347301157f;
  p = p * f + 0.478683716f;
  p = p * f + -0.721165808f;
  p = p * f + 1.44268988f;
  return p * f;
}

/// 2^-f for f in [0, 1). Minimax polynomial with constant term 1 (Remez), 6.0e-8 before rounding.
ANYEP_HD ANYEP_INLINE constexpr float logfmt_exp2_negative(float f) {
  float p = -0.000954034534f;
  p = p * f + 0.00922838044f;
  p = p * f + -0.0553166951f;
  p = p * f + 0.240186712f;
  p = p * f + -0.693144423f;
  return p * f + 1.0f;
}

ANYEP_HD ANYEP_INLINE constexpr LogFmtGroup logfmt_group(LogFmtEnds ends) {
  const std::uint32_t top = logfmt_scaled_bits(ends.amax);
  const std::uint32_t low = logfmt_scaled_bits(ends.amin);
  LogFmtGroup group{};
  group.amax = float_of_bf16(ends.amax);
  group.exponent = static_cast<std::int32_t>(top >> 23);
  group.log_amax = logfmt_log2(top);
  float octaves = kLogFmtOctaves;
  group.least = group.amax * 0x1p-32f;
  if (float_of_bits(low) * 0x1p32f >= float_of_bits(top)) {
    octaves =
        static_cast<float>(group.exponent - static_cast<std::int32_t>(low >> 23)) + (group.log_amax - logfmt_log2(low));
    group.least = float_of_bf16(ends.amin);
  }
  group.step = octaves / 510.0f;
  group.codes_per_log = 510.0f / octaves;
  // 2 - log2((1 + 2^step) / 2) / step, from the code of amax: log2 cosh u = u^2 / (2 ln 2) up to 4e-7 steps, u = step
  // ln2 / 2.
  group.rounding = 511.5f - 0.0866433976f * group.step;
  return group;
}

/// The 9-bit code of a magnitude that is at most amax.
ANYEP_HD ANYEP_INLINE constexpr std::uint32_t logfmt_code(const LogFmtGroup& group, std::uint16_t magnitude) {
  const std::uint32_t bits = logfmt_scaled_bits(magnitude);
  const float below =
      static_cast<float>(group.exponent - static_cast<std::int32_t>(bits >> 23)) + (group.log_amax - logfmt_log2(bits));
  const float code = group.rounding - below * group.codes_per_log;
  return static_cast<std::uint32_t>(static_cast<std::int32_t>(code > 0.0f ? code : 0.0f));
}

ANYEP_HD ANYEP_INLINE constexpr float logfmt_value(const LogFmtGroup& group, std::uint32_t code) {
  const float below = static_cast<float>(static_cast<std::int32_t>(kLogFmtTop - code)) * group.step;
  const auto whole = static_cast<std::int32_t>(below);
  const float power = float_of_bits((127u - static_cast<std::uint32_t>(whole)) << 23);
  const float value = group.amax * (logfmt_exp2_negative(below - static_cast<float>(whole)) * power);
  // By masks: with branches, compilers would have to keep the arithmetic above conditional and could not vectorise it.
  const std::uint32_t lowest = 0u - static_cast<std::uint32_t>(code == 1);
  const std::uint32_t not_zero = 0u - static_cast<std::uint32_t>(code != 0);
  return float_of_bits(((bits_of(value) & ~lowest) | (bits_of(group.least) & lowest)) & not_zero);
}

/// 128 BF16 values to 160 bytes.
ANYEP_HD ANYEP_INLINE void logfmt_encode_group(const LogFmtGroup& group, const std::uint16_t* x, std::uint8_t* out) {
  std::uint16_t codes[kLogFmtGroup];
  for (int i = 0; i < kLogFmtGroup; ++i) {
    codes[i] = static_cast<std::uint16_t>(logfmt_code(group, static_cast<std::uint16_t>(x[i] & 0x7fffu)));
  }
  for (int i = 0; i < kLogFmtGroup; ++i) out[i] = static_cast<std::uint8_t>(codes[i]);
  for (int j = 0; j < 16; ++j) {
    unsigned high = 0;
    unsigned signs = 0;
    for (int b = 0; b < 8; ++b) {
      high |= static_cast<unsigned>(codes[16 * b + j] >> 8) << b;
      signs |= static_cast<unsigned>(x[16 * b + j] >> 15) << b;
    }
    out[128 + j] = static_cast<std::uint8_t>(high);
    out[144 + j] = static_cast<std::uint8_t>(signs);
  }
}

/// 160 bytes to 128 floats.
ANYEP_HD ANYEP_INLINE void logfmt_decode_group(const LogFmtGroup& group, const std::uint8_t* in, float* out) {
  std::uint32_t codes[kLogFmtGroup];  // bit 31: the sign
  for (int b = 0; b < 8; ++b) {
    for (int j = 0; j < 16; ++j) {
      const auto high = static_cast<std::uint32_t>(in[128 + j] >> b) & 1u;
      const auto sign = static_cast<std::uint32_t>(in[144 + j] >> b) & 1u;
      codes[16 * b + j] = in[16 * b + j] | high << 8 | sign << 31;
    }
  }
  for (int i = 0; i < kLogFmtGroup; ++i) {
    const float magnitude = logfmt_value(group, codes[i] & kLogFmtTop);
    out[i] = float_of_bits(bits_of(magnitude) | (codes[i] & 0x80000000u));
  }
}

/// Codes `channels` of one chunk if they qualify. Returns the bytes written, 0 if they do not.
ANYEP_HD ANYEP_INLINE std::int64_t logfmt_encode_chunk(const std::uint16_t* x, std::int64_t channels,
                                                       std::uint8_t* out) {
  const std::int64_t num_groups = channels / kLogFmtGroup;
  for (std::int64_t g = 0; g < num_groups; ++g) {
    const LogFmtEnds ends = logfmt_ends(x + g * kLogFmtGroup);
    if (!logfmt_qualifies(ends)) return 0;
    __builtin_memcpy(out + g * kLogFmtEndsBytes, &ends, kLogFmtEndsBytes);
  }
  for (std::int64_t g = 0; g < num_groups; ++g) {
    LogFmtEnds ends;
    __builtin_memcpy(&ends, out + g * kLogFmtEndsBytes, kLogFmtEndsBytes);
    logfmt_encode_group(logfmt_group(ends), x + g * kLogFmtGroup,
                        out + num_groups * kLogFmtEndsBytes + g * kLogFmtCodeBytes);
  }
  return num_groups * (kLogFmtEndsBytes + kLogFmtCodeBytes);
}

/// Writes a row of `hidden` BF16 values; returns the bytes it takes, a multiple of 16.
ANYEP_HD ANYEP_INLINE std::int64_t logfmt_encode(const std::uint16_t* x, std::int64_t hidden, std::uint8_t* out) {
  const std::int64_t header = logfmt_header_bytes(hidden);
  for (std::int64_t i = 0; i < header; ++i) out[i] = 0;
  std::int64_t at = header;
  for (std::int64_t c = 0; c < logfmt_num_chunks(hidden); ++c) {
    const std::int64_t first = c * logfmt_chunk(hidden);
    const std::int64_t channels = hidden - first < logfmt_chunk(hidden) ? hidden - first : logfmt_chunk(hidden);
    const std::int64_t coded = logfmt_encode_chunk(x + first, channels, out + at);
    if (coded > 0) {
      out[c / 8] = static_cast<std::uint8_t>(out[c / 8] | 1u << (c % 8));
      at += coded;
    } else {
      __builtin_memcpy(out + at, x + first, static_cast<std::size_t>(2 * channels));
      at += 2 * channels;
    }
  }
  for (; at % 16 != 0; ++at) out[at] = 0;
  return at;
}

/// Reads a row; values are floats, since rounding them to BF16 would cost as much as the format itself.
ANYEP_HD ANYEP_INLINE void logfmt_decode(const std::uint8_t* in, std::int64_t hidden, float* out) {
  std::int64_t at = logfmt_header_bytes(hidden);
  for (std::int64_t c = 0; c < logfmt_num_chunks(hidden); ++c) {
    const std::int64_t first = c * logfmt_chunk(hidden);
    const std::int64_t channels = hidden - first < logfmt_chunk(hidden) ? hidden - first : logfmt_chunk(hidden);
    const std::int64_t num_groups = channels / kLogFmtGroup;
    if ((in[c / 8] >> (c % 8) & 1) == 0) {
      for (std::int64_t i = 0; i < channels; ++i) {
        std::uint16_t bits = 0;
        __builtin_memcpy(&bits, in + at + 2 * i, 2);
        out[first + i] = float_of_bf16(bits);
      }
      at += 2 * channels;
      continue;
    }
    for (std::int64_t g = 0; g < num_groups; ++g) {
      LogFmtEnds ends;
      __builtin_memcpy(&ends, in + at + g * kLogFmtEndsBytes, kLogFmtEndsBytes);
      logfmt_decode_group(logfmt_group(ends), in + at + num_groups * kLogFmtEndsBytes + g * kLogFmtCodeBytes,
                          out + first + g * kLogFmtGroup);
    }
    at += num_groups * (kLogFmtEndsBytes + kLogFmtCodeBytes);
  }
}

}  // namespace anyep::core
