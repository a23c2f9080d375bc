// A float as its bits. Everything here is forced inline, so that a file compiled for a newer instruction set can use it
// without leaving a copy that the linker might choose for older CPUs.
#pragma once

#include "core/hd.h"

#include <cstdint>

#if defined(__CUDACC__)
#define ANYEP_INLINE __forceinline__
#else
#define ANYEP_INLINE inline __attribute__((always_inline))
#endif

namespace anyep::core {

ANYEP_HD ANYEP_INLINE constexpr std::uint32_t bits_of(float value) {
  return __builtin_bit_cast(std::uint32_t, value);
}
ANYEP_HD ANYEP_INLINE constexpr float float_of_bits(std::uint32_t bits) {
  return __builtin_bit_cast(float, bits);
}

inline constexpr std::uint32_t kFloatMagnitude = 0x7fffffffu;  ///< all bits but the sign
inline constexpr std::uint32_t kFloatInfinity = 0x7f800000u;
inline constexpr std::uint32_t kFloatNan = 0x7fffffffu;  ///< the NaN that GPUs produce; also what our sums produce

/// Any NaN becomes the one NaN; every other value stays. CPUs differ in which NaN an addition returns.
ANYEP_HD ANYEP_INLINE constexpr float canonical(float value) {
  return (bits_of(value) & kFloatMagnitude) > kFloatInfinity ? float_of_bits(kFloatNan) : value;
}

}  // namespace anyep::core
