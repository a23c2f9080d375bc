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

#if ANYEP_SIMD_WIDTH == 16
/// `bits`: FP16 in the upper halves.
ANYEP_INLINE Floats float_of_fp16(Words bits) {
  const Words magnitude = (bits & 0x7fff0000u) >> 3;
  const Words finite = as<Words>(as<Floats>(magnitude) * 0x1p112f);
  const Words special = magnitude | core::kFloatInfinity;
  return as<Floats>((bits & 0x80000000u) | (as<Ints>(magnitude) >= (0x7c00 << 13) ? special : finite));
}
#endif

/// Two vectors in sequence from FP16.
ANYEP_INLINE Pair<Floats> load_fp16(const std::byte* from) {
#if ANYEP_SIMD_WIDTH == 64
  return {as<Floats>(_mm512_cvtph_ps(load<__m256i>(from))), as<Floats>(_mm512_cvtph_ps(load<__m256i>(from + 32)))};
#elif ANYEP_SIMD_WIDTH == 32
  return {as<Floats>(_mm256_cvtph_ps(load<__m128i>(from))), as<Floats>(_mm256_cvtph_ps(load<__m128i>(from + 16)))};
#else
  const Pair<Words> bits = widen_to_upper(load<Halves>(from));
  return {float_of_fp16(bits.low), float_of_fp16(bits.high)};
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

#if defined(__x86_64__) && ANYEP_SIMD_WIDTH == 16
typedef double Doubles __attribute__((vector_size(kWidth)));
typedef std::int64_t Longs __attribute__((vector_size(kWidth)));

/// a * b + c of floats, by doubles, for rounding to float. The product is exact. The sum is rounded to odd (its lowest
/// bit is set when it is inexact): with 53 >= 24 + 2 bits, the rounding to float then sees what the exact sum would
/// show it.
ANYEP_INLINE __m128d fused_to_odd(__m128d a, __m128d b, __m128d c) {
  const Doubles product = as<Doubles>(_mm_mul_pd(a, b));
  const Doubles addend = as<Doubles>(c);
  const Doubles sum = product + addend;
  const Doubles part = sum - product;  // the error of the sum, exactly (Knuth's two-sum); NaN beside infinities
  const Doubles error = (product - (sum - part)) + (addend - part);
  const Longs inexact = (error > 0.0) | (error < 0.0);
  const Longs towards_zero = inexact & ((error > 0.0) ^ (sum > 0.0));  // all ones, that is -1, or 0
  return as<__m128d>((as<Longs>(sum) + towards_zero) | (inexact & 1));
}
#endif

/// a * b + c, rounded once.
ANYEP_INLINE Floats fused(Floats a, Floats b, Floats c) {
#if ANYEP_SIMD_WIDTH == 64
  return as<Floats>(_mm512_fmadd_ps(as<__m512>(a), as<__m512>(b), as<__m512>(c)));
#elif ANYEP_SIMD_WIDTH == 32
  return as<Floats>(_mm256_fmadd_ps(as<__m256>(a), as<__m256>(b), as<__m256>(c)));
#elif defined(__x86_64__)
  const __m128 x = as<__m128>(a);
  const __m128 y = as<__m128>(b);
  const __m128 z = as<__m128>(c);
  const __m128d low = fused_to_odd(_mm_cvtps_pd(x), _mm_cvtps_pd(y), _mm_cvtps_pd(z));
  const __m128d high = fused_to_odd(_mm_cvtps_pd(_mm_movehl_ps(x, x)), _mm_cvtps_pd(_mm_movehl_ps(y, y)),
                                    _mm_cvtps_pd(_mm_movehl_ps(z, z)));
  return as<Floats>(_mm_movelh_ps(_mm_cvtpd_ps(low), _mm_cvtpd_ps(high)));
#else
  Floats sum{};
  for (int i = 0; i < kLanes; ++i) sum[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return sum;
#endif
}

}  // namespace anyep::cpu::simd::ANYEP_SIMD_ISA
