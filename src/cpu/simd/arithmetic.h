// Float formats and the fused multiply-add, vector-wise: the functions of core/bfloat16.h, bit for bit.
#pragma once

#include "core/bfloat16.h"
#include "cpu/simd/vector.h"

namespace anyep::cpu::simd::ANYEP_SIMD_ISA {

/// Rounds to BF16, leaving the bits in the upper half.
ANYEP_INLINE Ints round_to_bf16(Floats x) {
  const Words bits = as<Words>(x);
  const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Words nan = all(std::uint32_t{core::kBf16Nan} << 16);
  return as<Ints>(x != x ? nan : rounded);
}

ANYEP_INLINE Halves bf16_of(Pair<Floats> x) {
  return narrow({round_to_bf16(x.low) >> 16, round_to_bf16(x.high) >> 16});
}

ANYEP_INLINE Pair<Floats> floats_of_bf16(Halves x) {
  const Pair<Words> bits = widen_to_upper(x);
  return {as<Floats>(bits.low), as<Floats>(bits.high)};
}

/// Kept NaNs are quieted by the first sum.
ANYEP_INLINE Floats canonical(Floats x) {
  return as<Floats>(x != x ? all(core::kFloatNan) : as<Words>(x));
}

/// kLanes FP16 values.
ANYEP_INLINE Floats load_fp16(const void* from) {
#if ANYEP_SIMD_WIDTH == 64
  return as<Floats>(_mm512_cvtph_ps(load<__m256i>(from)));
#elif ANYEP_SIMD_WIDTH == 32
  return as<Floats>(_mm256_cvtph_ps(load<__m128i>(from)));
#else
  typedef std::uint16_t Narrow __attribute__((vector_size(kWidth / 2)));
  const Words bits = __builtin_convertvector(load<Narrow>(from), Words);
  const Words magnitude = (bits & 0x7fffu) << 13;
  const Words finite = as<Words>(as<Floats>(magnitude) * 0x1p112f);
  const Words special = magnitude | core::kFloatInfinity;
  return as<Floats>(((bits & 0x8000u) << 16) | (as<Ints>(magnitude) >= (0x7c00 << 13) ? special : finite));
#endif
}

#if ANYEP_SIMD_WIDTH == 16
/// The FP16 bits, in the lower halves.
ANYEP_INLINE Words round_to_fp16(Floats value) {
  const Words bits = as<Words>(value);
  const Words magnitude = bits & core::kFloatMagnitude;
  const Ints order = as<Ints>(magnitude);
  const Words rebased = magnitude - (112u << 23);
  const Words normal = (rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13;
  const Words denormal = as<Words>(as<Floats>(magnitude) + 0.5f) - core::bits_of(0.5f);
  Words code = order < static_cast<std::int32_t>(core::bits_of(0x1p-14f)) ? denormal : normal;
  code = order >= static_cast<std::int32_t>(core::bits_of(65520.0f)) ? all(std::uint32_t{core::kFp16Infinity}) : code;
  return value != value ? all(std::uint32_t{core::kFp16Nan}) : code | ((bits >> 16) & 0x8000u);
}
#endif

/// Two vectors in sequence.
ANYEP_INLINE Halves fp16_of(Pair<Floats> x) {
#if ANYEP_SIMD_WIDTH == 64
  const __m256i low = _mm512_cvtps_ph(as<__m512>(canonical(x.low)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i high = _mm512_cvtps_ph(as<__m512>(canonical(x.high)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return as<Halves>(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
#elif ANYEP_SIMD_WIDTH == 32
  return as<Halves>(_mm256_set_m128i(_mm256_cvtps_ph(as<__m256>(canonical(x.high)), _MM_FROUND_TO_NEAREST_INT),
                                     _mm256_cvtps_ph(as<__m256>(canonical(x.low)), _MM_FROUND_TO_NEAREST_INT)));
#else
  const Pair<Words> upper{round_to_fp16(x.low) << 16, round_to_fp16(x.high) << 16};
  return narrow({as<Ints>(upper.low) >> 16, as<Ints>(upper.high) >> 16});
#endif
}

#if ANYEP_SIMD_WIDTH == 16 && !defined(__FMA__) && !defined(__aarch64__)
typedef float TwoFloats __attribute__((vector_size(8)));
typedef double TwoDoubles __attribute__((vector_size(16)));
typedef std::int64_t TwoLongs __attribute__((vector_size(16)));

/// fma by doubles. The product is exact in double. The sum is rounded to odd (its lowest bit is set when it is
/// inexact): with 53 >= 24 + 2 bits, the second rounding, to float, then sees what the exact sum would show it.
ANYEP_INLINE TwoFloats fused_by_doubles(TwoFloats a, TwoFloats b, TwoFloats c) {
  const TwoDoubles product = __builtin_convertvector(a, TwoDoubles) * __builtin_convertvector(b, TwoDoubles);
  const TwoDoubles addend = __builtin_convertvector(c, TwoDoubles);
  const TwoDoubles sum = product + addend;
  const TwoDoubles part = sum - product;  // the error of the sum, exactly (Knuth's two-sum); NaN beside infinities
  const TwoDoubles error = (product - (sum - part)) + (addend - part);
  const TwoLongs bits = as<TwoLongs>(sum);
  const TwoLongs same_side = (error > 0.0) == (sum > 0.0);  // all ones: the exact sum is further from zero
  const TwoLongs odd_neighbour = bits + (same_side ? TwoLongs{1, 1} : TwoLongs{-1, -1});
  const TwoLongs inexact = (error > 0.0) | (error < 0.0);
  const TwoLongs even = (bits & 1) == 0;
  return __builtin_convertvector(as<TwoDoubles>(inexact & even ? odd_neighbour : bits), TwoFloats);
}
#endif

/// a * b + c, rounded once.
ANYEP_INLINE Floats fused(Floats a, Floats b, Floats c) {
#if ANYEP_SIMD_WIDTH == 64
  return as<Floats>(_mm512_fmadd_ps(as<__m512>(a), as<__m512>(b), as<__m512>(c)));
#elif ANYEP_SIMD_WIDTH == 32
  return as<Floats>(_mm256_fmadd_ps(as<__m256>(a), as<__m256>(b), as<__m256>(c)));
#elif defined(__FMA__)
  return as<Floats>(_mm_fmadd_ps(as<__m128>(a), as<__m128>(b), as<__m128>(c)));
#elif defined(__aarch64__)
  return as<Floats>(vfmaq_f32(as<float32x4_t>(c), as<float32x4_t>(a), as<float32x4_t>(b)));
#else
  const TwoFloats low = fused_by_doubles(__builtin_shufflevector(a, a, 0, 1), __builtin_shufflevector(b, b, 0, 1),
                                         __builtin_shufflevector(c, c, 0, 1));
  const TwoFloats high = fused_by_doubles(__builtin_shufflevector(a, a, 2, 3), __builtin_shufflevector(b, b, 2, 3),
                                          __builtin_shufflevector(c, c, 2, 3));
  return __builtin_shufflevector(low, high, 0, 1, 2, 3);
#endif
}

}  // namespace anyep::cpu::simd::ANYEP_SIMD_ISA
