// The hot loops of CPU ranks. One algorithm per loop, compiled for x86-64, x86-64-v3 and x86-64-v4 and chosen at run
// time; every variant gives the same bits. Other processors have the baseline only.
//
// Arrays are aligned to their elements; anything more only makes it quicker. Only the bytes named are read or written:
// rows that are not given, and what follows a row, may hold anything. `out` may be one of the inputs, but not overlap
// one otherwise. A NaN in a result is the one NaN of core/bits.h.
#pragma once

#include "core/fp8.h"

#include <anyep/types.h>

#include <cstddef>
#include <cstdint>

namespace anyep::cpu::simd {

enum class Isa : std::uint8_t { kBaseline, kV3, kV4 };

/// out = bias[0] + bias[1] (0 for a missing one), then + rows[i] for i ascending: float32, rounded once to dtype.
struct SumRows {
  DType dtype = DType::kBF16;  ///< of rows, bias and out: kBF16, kF16 or kF32
  void* out = nullptr;
  const void* const* rows = nullptr;
  int num_rows = 0;  ///< 0 is allowed
  const void* bias[2] = {nullptr, nullptr};
  std::int64_t hidden = 0;
  bool stream_out = false;  ///< non-temporal stores; stream_fence() before a flag
};

/// out = 0, then fma(weights[i], rows[i], out) for i ascending: float32, rounded once to BF16.
struct WeightedSum {
  DType row_dtype = DType::kBF16;  ///< kBF16, or kF32 for decoded LogFMT rows
  void* out = nullptr;             ///< BF16
  const void* const* rows = nullptr;
  const float* weights = nullptr;
  int num_rows = 0;
  std::int64_t hidden = 0;
  bool stream_out = false;
};

struct Kernels {
  const char* name;  ///< as ANYEP_CPU_ISA spells it

  /// Ordinary stores. The ranges do not overlap.
  void (*copy)(void* dst, const void* src, std::size_t bytes);
  /// Non-temporal stores where whole lines allow; stream_fence() before a flag.
  void (*stream)(void* dst, const void* src, std::size_t bytes);
  void (*sum_rows)(const SumRows& sum);
  void (*weighted_sum)(const WeightedSum& sum);
  void (*cast_fp8)(const core::Fp8Cast& cast);
  /// core::logfmt_encode and core::logfmt_decode.
  std::int64_t (*logfmt_encode)(const std::uint16_t* x, std::int64_t hidden, std::uint8_t* out);
  void (*logfmt_decode)(const std::uint8_t* in, std::int64_t hidden, float* out);
};

/// nullptr when the CPU or the build lacks it; kBaseline always exists.
const Kernels* kernels_of(Isa isa) noexcept;

/// The best that the CPU has, or what ANYEP_CPU_ISA names (read once). @throws Error kArgument when that is not to be
/// had.
const Kernels& kernels();

/// Orders earlier non-temporal stores of this thread before its later stores. Under ThreadSanitizer, which does not
/// know such stores, `stream` is `copy` and this is nothing.
inline void stream_fence() {
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
  __builtin_ia32_sfence();
#endif
}

}  // namespace anyep::cpu::simd
