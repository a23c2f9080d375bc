// Contents of test tensors as functions of (seed, rank, row): any place can be recomputed by whoever looks at it.
#pragma once

#include <anyep/types.h>

#include <cstddef>
#include <cstdint>
#include <span>

namespace anyep::test {

/// 64 well-mixed bits of its arguments.
std::uint64_t mix(std::uint64_t seed, std::uint64_t a, std::uint64_t b = 0, std::uint64_t c = 0);

/// What a row holds: any bit patterns, NaNs of every kind among them; finite values with some zeros, of magnitude 2^-7
/// to 2, or (LogFMT codes such rows) 2^-8 to 1.
enum class Fill : std::uint8_t { kBits, kFinite, kBelowOne };

/// Fills one row. The same arguments give the same bytes; finite values are bfloat16, float16 or float32.
void fill_row(std::span<std::byte> row, Fill fill, DType dtype, std::uint64_t key);

/// A weight in (0, 1].
float weight_of(std::uint64_t key, std::uint64_t slot);

}  // namespace anyep::test
