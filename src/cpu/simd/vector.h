// Vectors of the width that this file is compiled for, and the few steps that differ between instruction sets.
//
// For kernels_*.cc only. Those for newer CPUs must not leave functions behind that the linker could pick for older
// ones: everything here and in what includes this is forced inline or in the namespace ANYEP_SIMD_ISA, and calls no
// function template or inline function of the standard library.
#pragma once

#include "core/bits.h"
#include "cpu/simd/kernels.h"

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
// GCC 12 takes the "undefined" operands inside these functions for a mistake of ours.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#if !defined(ANYEP_SIMD_ISA)
#define ANYEP_SIMD_ISA baseline
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define ANYEP_SIMD_WIDTH 64
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define ANYEP_SIMD_WIDTH 32
#else
#define ANYEP_SIMD_WIDTH 16
#endif

namespace anyep::cpu::simd::ANYEP_SIMD_ISA {

inline constexpr int kWidth = ANYEP_SIMD_WIDTH;  ///< bytes of a vector
inline constexpr int kLanes = kWidth / 4;        ///< floats of a vector
inline constexpr std::uintptr_t kLine = 64;      ///< bytes of a cache line; non-temporal stores fill whole ones

typedef float Floats __attribute__((vector_size(kWidth)));
typedef std::uint32_t Words __attribute__((vector_size(kWidth)));
typedef std::int32_t Ints __attribute__((vector_size(kWidth)));
typedef std::uint16_t Halves __attribute__((vector_size(kWidth)));
typedef std::uint8_t Bytes __attribute__((vector_size(kWidth)));

template <class To, class From>
ANYEP_INLINE To as(From from) {
  return __builtin_bit_cast(To, from);
}

template <class Vector>
ANYEP_INLINE Vector load(const void* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class Vector>
ANYEP_INLINE void store(void* to, Vector vector) {
  __builtin_memcpy(to, &vector, sizeof vector);
}

/// `to` is a multiple of the width.
template <class Vector>
ANYEP_INLINE void store_streaming(void* to, Vector vector) {
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
#if ANYEP_SIMD_WIDTH == 64
  _mm512_stream_si512(static_cast<__m512i*>(to), as<__m512i>(vector));
#elif ANYEP_SIMD_WIDTH == 32
  _mm256_stream_si256(static_cast<__m256i*>(to), as<__m256i>(vector));
#else
  _mm_stream_si128(static_cast<__m128i*>(to), as<__m128i>(vector));
#endif
#else
  store(to, vector);
#endif
}

ANYEP_INLINE Floats all(float value) {
  return value - Floats{};
}
ANYEP_INLINE Words all(std::uint32_t value) {
  return value - Words{};
}

/// Two vectors of 32-bit elements. "Paired" order is what unpacking 16-bit elements gives: in each 16 bytes of the
/// narrow vector, the first four go to `low` and the other four to `high`.
template <class Vector>
struct Pair {
  Vector low, high;
};

/// 16-bit elements into the upper halves of 32-bit ones, paired order: BF16 to float.
ANYEP_INLINE Pair<Words> widen_to_upper(Halves halves) {
#if ANYEP_SIMD_WIDTH == 64
  const __m512i x = as<__m512i>(halves);
  const __m512i zero = _mm512_setzero_si512();
  return {as<Words>(_mm512_unpacklo_epi16(zero, x)), as<Words>(_mm512_unpackhi_epi16(zero, x))};
#elif ANYEP_SIMD_WIDTH == 32
  const __m256i x = as<__m256i>(halves);
  const __m256i zero = _mm256_setzero_si256();
  return {as<Words>(_mm256_unpacklo_epi16(zero, x)), as<Words>(_mm256_unpackhi_epi16(zero, x))};
#else
  const Halves zero{};
  return {as<Words>(__builtin_shufflevector(zero, halves, 0, 8, 1, 9, 2, 10, 3, 11)),
          as<Words>(__builtin_shufflevector(zero, halves, 4, 12, 5, 13, 6, 14, 7, 15))};
#endif
}

/// 32-bit elements within int16 to 16-bit ones, paired order.
ANYEP_INLINE Halves narrow(Pair<Ints> x) {
#if ANYEP_SIMD_WIDTH == 64
  return as<Halves>(_mm512_packs_epi32(as<__m512i>(x.low), as<__m512i>(x.high)));
#elif ANYEP_SIMD_WIDTH == 32
  return as<Halves>(_mm256_packs_epi32(as<__m256i>(x.low), as<__m256i>(x.high)));
#elif defined(__x86_64__)
  return as<Halves>(_mm_packs_epi32(as<__m128i>(x.low), as<__m128i>(x.high)));
#else
  return __builtin_shufflevector(as<Halves>(x.low), as<Halves>(x.high), 0, 2, 4, 6, 8, 10, 12, 14);
#endif
}

/// The 8-byte pieces of each 16 put in sequence: what packing two vectors leaves interleaved.
template <class Vector>
ANYEP_INLINE Vector in_sequence(Vector packed) {
#if ANYEP_SIMD_WIDTH == 64
  return as<Vector>(_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), as<__m512i>(packed)));
#elif ANYEP_SIMD_WIDTH == 32
  return as<Vector>(_mm256_permute4x64_epi64(as<__m256i>(packed), 0xd8));
#else
  return packed;
#endif
}

/// 16-bit elements within 0..255 to bytes, in sequence.
ANYEP_INLINE Bytes narrow(Halves first, Halves second) {
#if ANYEP_SIMD_WIDTH == 64
  return in_sequence(as<Bytes>(_mm512_packus_epi16(as<__m512i>(first), as<__m512i>(second))));
#elif ANYEP_SIMD_WIDTH == 32
  return in_sequence(as<Bytes>(_mm256_packus_epi16(as<__m256i>(first), as<__m256i>(second))));
#elif defined(__x86_64__)
  return as<Bytes>(_mm_packus_epi16(as<__m128i>(first), as<__m128i>(second)));
#else
  return __builtin_shufflevector(as<Bytes>(first), as<Bytes>(second), 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26,
                                 28, 30);
#endif
}

ANYEP_INLINE Floats larger(Floats a, Floats b) {
  return a > b ? a : b;
}

/// Of elements below 0x8000.
ANYEP_INLINE Halves larger(Halves a, Halves b) {
#if ANYEP_SIMD_WIDTH == 64
  return as<Halves>(_mm512_max_epi16(as<__m512i>(a), as<__m512i>(b)));
#elif ANYEP_SIMD_WIDTH == 32
  return as<Halves>(_mm256_max_epi16(as<__m256i>(a), as<__m256i>(b)));
#elif defined(__x86_64__)
  return as<Halves>(_mm_max_epi16(as<__m128i>(a), as<__m128i>(b)));
#else
  return a > b ? a : b;
#endif
}

/// The largest element, all below 0x8000.
ANYEP_INLINE std::uint16_t largest(Halves x) {
#if defined(__x86_64__)
#if ANYEP_SIMD_WIDTH == 64
  const __m512i whole = as<__m512i>(x);
  const __m256i half = _mm256_max_epi16(_mm512_castsi512_si256(whole), _mm512_extracti64x4_epi64(whole, 1));
  __m128i v = _mm_max_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
#elif ANYEP_SIMD_WIDTH == 32
  const __m256i whole = as<__m256i>(x);
  __m128i v = _mm_max_epi16(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
#else
  __m128i v = as<__m128i>(x);
#endif
  v = _mm_max_epi16(v, _mm_srli_si128(v, 8));
  v = _mm_max_epi16(v, _mm_srli_si128(v, 4));
  v = _mm_max_epi16(v, _mm_srli_si128(v, 2));
  return static_cast<std::uint16_t>(_mm_extract_epi16(v, 0));
#else
  std::uint16_t best = 0;
  for (int i = 0; i < kWidth / 2; ++i) best = x[i] > best ? x[i] : best;
  return best;
#endif
}

}  // namespace anyep::cpu::simd::ANYEP_SIMD_ISA
