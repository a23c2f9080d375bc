// Sums of rows in float32, rounded once: combine's arithmetic (specification 10.2, 10.3).
#pragma once

#include "cpu/simd/arithmetic.h"
#include "cpu/simd/vector.h"

#include <cstddef>
#include <cstdint>

namespace anyep::cpu::simd::ANYEP_SIMD_ISA {

inline constexpr std::int64_t kBlock = 32;            ///< elements summed in registers: 16-bit ones fill a cache line
inline constexpr int kPairs = kBlock / (2 * kLanes);  ///< pairs of vectors that hold a block

/// A block as floats.
struct Block {
  Pair<Floats> at[kPairs];
};

/// Element types: how a block is read from memory and written back, in which order being its own affair.
struct Bf16 {
  static constexpr std::int64_t kBytes = 2;
  static Block read(const std::byte* from);
  template <bool kStream>
  static void write(std::byte* to, const Block& block);
};
struct Fp16 {
  static constexpr std::int64_t kBytes = 2;
  static Block read(const std::byte* from);
  template <bool kStream>
  static void write(std::byte* to, const Block& block);
};
struct Fp32 {
  static constexpr std::int64_t kBytes = 4;
  static Block read(const std::byte* from);
  template <bool kStream>
  static void write(std::byte* to, const Block& block);
};
/// BF16 written from a block that Fp32 has read.
struct Bf16FromFp32 {
  static constexpr std::int64_t kBytes = 2;
  template <bool kStream>
  static void write(std::byte* to, const Block& block);
};

template <bool kStream, class Vector>
ANYEP_INLINE void put(std::byte* to, Vector vector) {
  if constexpr (kStream) {
    store_streaming(to, vector);
  } else {
    store(to, vector);
  }
}

ANYEP_INLINE Block Bf16::read(const std::byte* from) {
  Block block;
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i) block.at[i] = floats_of_bf16(load<Halves>(from + i * kWidth));
  return block;
}

template <bool kStream>
ANYEP_INLINE void Bf16::write(std::byte* to, const Block& block) {
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i) put<kStream>(to + i * kWidth, bf16_of(block.at[i]));
}

template <bool kStream>
ANYEP_INLINE void Bf16FromFp32::write(std::byte* to, const Block& block) {
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i) put<kStream>(to + i * kWidth, in_sequence(bf16_of(block.at[i])));
}

ANYEP_INLINE Block Fp16::read(const std::byte* from) {
  Block block;
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i) block.at[i] = load_fp16(from + i * kWidth);
  return block;
}

template <bool kStream>
ANYEP_INLINE void Fp16::write(std::byte* to, const Block& block) {
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i) put<kStream>(to + i * kWidth, fp16_of(block.at[i]));
}

ANYEP_INLINE Block Fp32::read(const std::byte* from) {
  Block block;
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i) {
    block.at[i] = {load<Floats>(from + 2 * i * kWidth), load<Floats>(from + (2 * i + 1) * kWidth)};
  }
  return block;
}

template <bool kStream>
ANYEP_INLINE void Fp32::write(std::byte* to, const Block& block) {
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i) {
    put<kStream>(to + 2 * i * kWidth, canonical(block.at[i].low));
    put<kStream>(to + (2 * i + 1) * kWidth, canonical(block.at[i].high));
  }
}

/// Where a block's elements come from: memory, or, at the ends of a row, a copy filled up with zeros.
struct Whole {
  template <class Type>
  ANYEP_INLINE Block read(const void* row, std::int64_t element) const {
    return Type::read(static_cast<const std::byte*>(row) + element * Type::kBytes);
  }
};
struct Part {
  std::int64_t count;
  template <class Type>
  ANYEP_INLINE Block read(const void* row, std::int64_t element) const {
    alignas(kLine) std::byte copy[kBlock * Type::kBytes] = {};
    __builtin_memcpy(copy, static_cast<const std::byte*>(row) + element * Type::kBytes,
                     static_cast<std::size_t>(count * Type::kBytes));
    return Type::read(copy);
  }
};

/// The sum of SumRows for one block.
template <class Type>
struct PlainSum {
  SumRows sum;

  template <class Source>
  ANYEP_INLINE Block operator()(std::int64_t element, Source source) const {
    Block total{};
    if (sum.bias[0] != nullptr) total = source.template read<Type>(sum.bias[0], element);
    // Also adds a missing second bias, 0: it turns a first one of -0 into +0.
    Block second{};
    if (sum.bias[1] != nullptr) second = source.template read<Type>(sum.bias[1], element);
    add(total, second);
    for (int row = 0; row < sum.num_rows; ++row) add(total, source.template read<Type>(sum.rows[row], element));
    return total;
  }
  static ANYEP_INLINE void add(Block& total, const Block& more) {
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) {
      total.at[i].low = total.at[i].low + more.at[i].low;
      total.at[i].high = total.at[i].high + more.at[i].high;
    }
  }
};

/// The sum of WeightedSum for one block.
template <class Type>
struct FusedSum {
  WeightedSum sum;

  template <class Source>
  ANYEP_INLINE Block operator()(std::int64_t element, Source source) const {
    Block total{};
    for (int row = 0; row < sum.num_rows; ++row) {
      const Floats weight = all(sum.weights[row]);
      const Block x = source.template read<Type>(sum.rows[row], element);
#pragma GCC unroll 4
      for (int i = 0; i < kPairs; ++i) {
        total.at[i] = {fused(weight, x.at[i].low, total.at[i].low), fused(weight, x.at[i].high, total.at[i].high)};
      }
    }
    return total;
  }
};

template <class Out, class Sum>
void write_part(const Sum& sum, std::byte* out, std::int64_t element, std::int64_t count) {
  alignas(kLine) std::byte copy[kBlock * Out::kBytes];
  Out::template write<false>(copy, sum(element, Part{count}));
  __builtin_memcpy(out + element * Out::kBytes, copy, static_cast<std::size_t>(count * Out::kBytes));
}

/// Writes a row block by block; with kStream, whole cache lines bypass the cache.
template <class Out, bool kStream, class Sum>
void write_row(const Sum& sum, void* to, std::int64_t hidden) {
  auto* const out = static_cast<std::byte*>(to);
  std::int64_t element = 0;
  if constexpr (kStream) {
    const auto beside = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(out) % kLine);
    if (beside != 0) {
      const std::int64_t head = (static_cast<std::int64_t>(kLine) - beside) / Out::kBytes;
      element = head < hidden ? head : hidden;
      write_part<Out>(sum, out, 0, element);
    }
  }
  for (; element + kBlock <= hidden; element += kBlock) {
    Out::template write<kStream>(out + element * Out::kBytes, sum(element, Whole{}));
  }
  if (element < hidden) write_part<Out>(sum, out, element, hidden - element);
}

template <class Out, class Sum>
void write_row(const Sum& sum, void* to, std::int64_t hidden, bool stream) {
  if (stream) {
    write_row<Out, true>(sum, to, hidden);
  } else {
    write_row<Out, false>(sum, to, hidden);
  }
}

inline void sum_rows(const SumRows& sum) {
  if (sum.dtype == DType::kBF16) {
    write_row<Bf16>(PlainSum<Bf16>{sum}, sum.out, sum.hidden, sum.stream_out);
  } else if (sum.dtype == DType::kF16) {
    write_row<Fp16>(PlainSum<Fp16>{sum}, sum.out, sum.hidden, sum.stream_out);
  } else {
    write_row<Fp32>(PlainSum<Fp32>{sum}, sum.out, sum.hidden, sum.stream_out);
  }
}

inline void weighted_sum(const WeightedSum& sum) {
  if (sum.row_dtype == DType::kBF16) {
    write_row<Bf16>(FusedSum<Bf16>{sum}, sum.out, sum.hidden, sum.stream_out);
  } else {
    write_row<Bf16FromFp32>(FusedSum<Fp32>{sum}, sum.out, sum.hidden, sum.stream_out);
  }
}

}  // namespace anyep::cpu::simd::ANYEP_SIMD_ISA
