#include "core/bfloat16.h"
#include "cpu/simd/arithmetic.h"
#include "cpu/simd/kernels.h"
#include "tests/unit/simd_isas.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

namespace anyep::cpu::simd {
namespace {

using core::float_of_bits;

constexpr std::size_t kGuardBytes = 64;

enum class Values { kNormal, kAnyBits };

// Any bits: NaNs of both kinds, infinities and denormals come by themselves in 16-bit formats, and are forced in
// float32.
std::uint32_t random_bits(DType dtype, Values values, std::mt19937& random) {
  if (values == Values::kAnyBits) {
    const auto bits = static_cast<std::uint32_t>(random());
    if (random() % 4 == 0) return dtype == DType::kF32 ? bits & 0x80000000u : bits & 0x8000u;
    if (dtype == DType::kF32 && random() % 4 == 0) return (bits & 0x807fffffu) | (random() % 2 == 0 ? 0x7f800000u : 0u);
    return bits;
  }
  const float value = std::normal_distribution<float>()(random);
  if (dtype == DType::kBF16) return core::bf16_of_float(value);
  if (dtype == DType::kF16) return core::fp16_of_float(value);
  return core::bits_of(value);
}

float value_at(DType dtype, const void* row, std::size_t index) {
  const auto* const bytes = static_cast<const std::byte*>(row) + index * size_of(dtype);
  if (dtype == DType::kF32) {
    float value;
    std::memcpy(&value, bytes, 4);
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, bytes, 2);
  return dtype == DType::kBF16 ? core::float_of_bf16(bits) : core::float_of_fp16(bits);
}

void put(DType dtype, void* row, std::size_t index, float value) {
  auto* const bytes = static_cast<std::byte*>(row) + index * size_of(dtype);
  if (dtype == DType::kF32) {
    const float one_nan = core::canonical(value);
    std::memcpy(bytes, &one_nan, 4);
    return;
  }
  const std::uint16_t bits = dtype == DType::kBF16 ? core::bf16_of_float(value) : core::fp16_of_float(value);
  std::memcpy(bytes, &bits, 2);
}

// Rows in one buffer, with poison around each: reading it would show in the sums, writing it in the comparison.
struct Buffer {
  std::vector<std::byte> bytes;
  std::size_t row_bytes, pitch;

  Buffer(std::size_t num_rows, std::size_t row_bytes_in, std::size_t misaligned)
      : bytes(kGuardBytes + misaligned + num_rows * (row_bytes_in + kGuardBytes), std::byte{0xff}),
        row_bytes(row_bytes_in),
        pitch(row_bytes_in + kGuardBytes),
        first_(kGuardBytes + misaligned) {}
  void* row(std::size_t index) { return bytes.data() + first_ + index * pitch; }

 private:
  std::size_t first_;
};

struct Case {
  DType dtype;
  std::size_t hidden, num_rows, num_bias, misaligned;
  Values values;
  bool stream;
};

void fill(Buffer& buffer, const Case& c, std::mt19937& random) {
  for (std::size_t row = 0; row < c.num_rows + 2; ++row) {
    for (std::size_t i = 0; i < c.hidden; ++i) {
      const std::uint32_t bits = random_bits(c.dtype, c.values, random);
      std::memcpy(static_cast<std::byte*>(buffer.row(row)) + i * size_of(c.dtype), &bits, size_of(c.dtype));
    }
  }
}

class SimdSumTest : public SimdTest {
 protected:
  void check_sum(const Case& c, std::mt19937& random) {
    Buffer in(c.num_rows + 2, c.hidden * size_of(c.dtype), c.misaligned);
    fill(in, c, random);
    SumRows sum{.dtype = c.dtype, .hidden = static_cast<std::int64_t>(c.hidden), .stream_out = c.stream};
    std::vector<const void*> rows;
    for (std::size_t row = 0; row < c.num_rows; ++row) rows.push_back(in.row(row + 2));
    for (std::size_t b = 0; b < c.num_bias; ++b) sum.bias[b] = in.row(b);
    sum.rows = rows.data();
    sum.num_rows = static_cast<int>(c.num_rows);

    Buffer out(1, c.hidden * size_of(c.dtype), c.misaligned);
    Buffer expected = out;
    for (std::size_t i = 0; i < c.hidden; ++i) {
      float total = c.num_bias > 0 ? value_at(c.dtype, in.row(0), i) : 0.0f;
      total += c.num_bias > 1 ? value_at(c.dtype, in.row(1), i) : 0.0f;
      for (std::size_t row = 0; row < c.num_rows; ++row) total += value_at(c.dtype, in.row(row + 2), i);
      put(c.dtype, expected.row(0), i, total);
    }
    sum.out = out.row(0);
    variant().sum_rows(sum);
    stream_fence();
    ASSERT_TRUE(out.bytes == expected.bytes) << name_of(c.dtype) << " hidden " << c.hidden << " rows " << c.num_rows
                                             << " bias " << c.num_bias << " misaligned " << c.misaligned;
  }
  void check_weighted(const Case& c, std::mt19937& random) {
    Buffer in(c.num_rows + 2, c.hidden * size_of(c.dtype), c.misaligned);
    fill(in, c, random);
    std::vector<const void*> rows;
    std::vector<float> weights;
    for (std::size_t row = 0; row < c.num_rows; ++row) {
      rows.push_back(in.row(row));
      weights.push_back(float_of_bits(random_bits(DType::kF32, c.values, random)));
    }
    Buffer out(1, c.hidden * 2, c.misaligned);
    Buffer expected = out;
    for (std::size_t i = 0; i < c.hidden; ++i) {
      float total = 0;
      for (std::size_t row = 0; row < c.num_rows; ++row)
        total = std::fma(weights[row], value_at(c.dtype, rows[row], i), total);
      put(DType::kBF16, expected.row(0), i, total);
    }
    WeightedSum sum{.row_dtype = c.dtype, .out = out.row(0), .rows = rows.data(), .weights = weights.data()};
    sum.num_rows = static_cast<int>(c.num_rows);
    sum.hidden = static_cast<std::int64_t>(c.hidden);
    sum.stream_out = c.stream;
    variant().weighted_sum(sum);
    stream_fence();
    ASSERT_TRUE(out.bytes == expected.bytes) << name_of(c.dtype) << " hidden " << c.hidden << " rows " << c.num_rows;
  }
};

constexpr std::size_t kHiddens[] = {8, 16, 24, 32, 40, 56, 64, 72, 120, 248, 1032, 2880, 7168, 16384};

TEST_P(SimdSumTest, RowsAreAddedInOrderAndRoundedOnce) {
  std::mt19937 random(11);
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
    for (const std::size_t hidden : kHiddens) {
      for (const Values values : {Values::kNormal, Values::kAnyBits}) {
        const std::size_t num_rows = hidden > 2000 ? 2 : random() % 9;
        const std::size_t misaligned = random() % 2 * (random() % 33) * 4;
        check_sum({dtype, hidden, num_rows, random() % 3, misaligned, values, random() % 2 == 0}, random);
      }
    }
  }
}

TEST_P(SimdSumTest, WeightsAreFusedInOrderAndRoundedOnce) {
  std::mt19937 random(12);
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const std::size_t hidden : kHiddens) {
      for (const Values values : {Values::kNormal, Values::kAnyBits}) {
        const std::size_t num_rows = hidden > 2000 ? 2 : random() % 9;
        const std::size_t misaligned = random() % 2 * (random() % 33) * 4;
        check_weighted({dtype, hidden, num_rows, 0, misaligned, values, random() % 2 == 0}, random);
      }
    }
  }
}

// All codes of a 16-bit format as one row: conversion there and back changes nothing but NaNs.
TEST_P(SimdSumTest, EveryCodeOfA16BitFormatComesBack) {
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    std::vector<std::uint16_t> row(65536), out(65536);
    for (std::size_t i = 0; i < row.size(); ++i) row[i] = static_cast<std::uint16_t>(i);
    const void* const rows[] = {row.data()};
    SumRows sum{.dtype = dtype, .out = out.data(), .rows = rows, .num_rows = 1, .hidden = 65536};
    variant().sum_rows(sum);
    const unsigned infinity = dtype == DType::kBF16 ? core::kBf16Infinity : core::kFp16Infinity;
    for (unsigned i = 0; i < row.size(); ++i) {
      const unsigned expected = (i & 0x7fffu) > infinity ? 0x7fffu : i == 0x8000u ? 0u : i;  // 0 + -0 is 0
      ASSERT_EQ(out[i], expected) << name_of(dtype);
    }
  }
}

// Halves of FP16's unit at every size: a + b lies at, just below or just above the midpoint between two results.
TEST_P(SimdSumTest, Fp16SumsRoundLikeTheScalarConversion) {
  std::mt19937 random(13);
  for (int round = 0; round < 8; ++round) {
    std::vector<std::uint16_t> a(16384), b(16384), out(16384);
    for (std::size_t i = 0; i < a.size(); ++i) {
      a[i] = static_cast<std::uint16_t>(random());
      const unsigned exponent = (a[i] >> 10) & 31u;
      const unsigned smaller =
          exponent > 11 ? exponent - 11 + static_cast<unsigned>(random() % 3) : static_cast<unsigned>(random() % 12);
      b[i] = static_cast<std::uint16_t>((random() & 0x8003u) | smaller << 10);
    }
    const void* const rows[] = {a.data(), b.data()};
    SumRows sum{.dtype = DType::kF16, .out = out.data(), .rows = rows, .num_rows = 2, .hidden = 16384};
    variant().sum_rows(sum);
    for (std::size_t i = 0; i < a.size(); ++i) {
      ASSERT_EQ(out[i], core::fp16_of_float(core::float_of_fp16(a[i]) + core::float_of_fp16(b[i])));
    }
  }
}

TEST_P(SimdSumTest, TheOutputMayBeOneOfTheInputs) {
  constexpr std::size_t kHidden = 1000;
  for (const bool stream : {false, true}) {
    std::vector<float> a(kHidden + 3), b(kHidden), expected(kHidden);
    for (std::size_t i = 0; i < kHidden; ++i) {
      a[i + 3] = static_cast<float>(i) * 0.5f;
      b[i] = static_cast<float>(i * i);
      expected[i] = a[i + 3] + b[i];
    }
    const void* const rows[] = {a.data() + 3, b.data()};
    SumRows sum{.dtype = DType::kF32,
                .out = a.data() + 3,
                .rows = rows,
                .num_rows = 2,
                .hidden = kHidden,
                .stream_out = stream};
    variant().sum_rows(sum);
    stream_fence();
    EXPECT_EQ(std::vector<float>(a.begin() + 3, a.end()), expected);
  }
}

TEST_P(SimdSumTest, ASumOfNothingIsZero) {
  std::vector<std::uint16_t> out(48, 0xffff);
  variant().sum_rows({.dtype = DType::kBF16, .out = out.data(), .hidden = 48});
  EXPECT_EQ(out, std::vector<std::uint16_t>(48, 0));
  out.assign(48, 0xffff);
  variant().weighted_sum({.out = out.data(), .hidden = 48});
  EXPECT_EQ(out, std::vector<std::uint16_t>(48, 0));
}

INSTANTIATE_TEST_SUITE_P(Isas, SimdSumTest, every_isa(), isa_name);

void expect_fused(float a, float b, float c) {
  const float got = baseline::fused(baseline::all(a), baseline::all(b), baseline::all(c))[0];
  const float expected = std::fma(a, b, c);
  if (std::isnan(expected)) {
    ASSERT_TRUE(std::isnan(got));
  } else {
    ASSERT_EQ(core::bits_of(got), core::bits_of(expected)) << a << " * " << b << " + " << c;
  }
}

// (1 + e)(1 - e) falls short of 1 by e^2: beside c, half a unit of c less too little for double to see. Rounding the
// sum to double and then to float would take it for a tie.
TEST(SimdFusedTest, SumsNextToATieRoundAsOneRounding) {
  std::mt19937 random(14);
  for (int i = 0; i < 100000; ++i) {
    const int exponent = static_cast<int>(random() % 200) - 100;
    const float c = std::ldexp(1.0f + static_cast<float>(random() % (1u << 23)) * 0x1p-23f, exponent);
    const float e = std::ldexp(1.0f, -static_cast<int>(random() % 24));
    const float half_unit = std::ldexp(1.0f, exponent - 24);
    expect_fused(half_unit * (1 + e), 1 - e, c);
    expect_fused(-half_unit * (1 + e), 1 - e, c);
    expect_fused(half_unit * (1 + e), 1 + e, -c);
  }
}

TEST(SimdFusedTest, AnyBitsGiveWhatTheStandardLibraryGives) {
  std::mt19937 random(15);
  for (int i = 0; i < 300000; ++i) {
    const float a = float_of_bits(static_cast<std::uint32_t>(random()));
    const float b = float_of_bits(static_cast<std::uint32_t>(random()));
    expect_fused(a, b, float_of_bits(static_cast<std::uint32_t>(random())));
    // Cancellation, denormal results among them.
    const float product = a * b;
    expect_fused(a, b, -product);
    expect_fused(a * 0x1p-100f, b * 0x1p-20f, product * -0x1p-120f);
  }
}

}  // namespace
}  // namespace anyep::cpu::simd
