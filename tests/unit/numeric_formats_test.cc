#include "core/bfloat16.h"
#include "core/fp8.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace anyep::core {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// The value of a binary format with `mantissa_bits` and `bias`, from the definition of IEEE 754.
double value_of(std::uint32_t magnitude, int mantissa_bits, int bias) {
  const std::uint32_t exponent = magnitude >> mantissa_bits;
  const double fraction = static_cast<double>(magnitude & ((1u << mantissa_bits) - 1u)) / (1u << mantissa_bits);
  if (exponent == 0) return std::ldexp(fraction, 1 - bias);
  return std::ldexp(1.0 + fraction, static_cast<int>(exponent) - bias);
}

// Floats around every boundary of a coarser format: its values, the midpoints between neighbours, and one float beside.
template <class Check>
void for_floats_around(const std::vector<double>& values, Check check) {
  for (std::size_t i = 0; i + 1 < values.size(); ++i) {
    for (const double point : {values[i], (values[i] + values[i + 1]) / 2}) {
      const auto exact = static_cast<float>(point);
      for (const float near : {std::nextafter(exact, -kInf), exact, std::nextafter(exact, kInf)}) {
        check(near);
        check(-near);
      }
    }
  }
}

// The code whose value is nearest; of two, the even one. `values` ascend from 0 and belong to codes 0, 1, ...
std::uint32_t nearest_code(const std::vector<double>& values, double magnitude) {
  std::uint32_t best = 0;
  for (std::uint32_t code = 1; code < values.size(); ++code) {
    const double gain = std::abs(values[best] - magnitude) - std::abs(values[code] - magnitude);
    if (gain > 0 || (gain == 0 && code % 2 == 0)) best = code;
  }
  return best;
}

TEST(NumericFormatsTest, EveryBf16HasItsValueAndComesBack) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const auto code = static_cast<std::uint16_t>(bits);
    const std::uint32_t magnitude = bits & 0x7fffu;
    const float value = float_of_bf16(code);
    if (magnitude > kBf16Infinity) {
      EXPECT_TRUE(std::isnan(value));
      EXPECT_EQ(bf16_of_float(value), kBf16Nan);
      continue;
    }
    const double expected = magnitude == kBf16Infinity ? static_cast<double>(kInf) : value_of(magnitude, 7, 127);
    EXPECT_EQ(std::abs(static_cast<double>(value)), expected);
    EXPECT_EQ(std::signbit(value), bits >> 15 != 0);
    EXPECT_EQ(bf16_of_float(value), code);
  }
}

TEST(NumericFormatsTest, EveryFp16HasItsValueAndComesBack) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const auto code = static_cast<std::uint16_t>(bits);
    const std::uint32_t magnitude = bits & 0x7fffu;
    const float value = float_of_fp16(code);
    if (magnitude > kFp16Infinity) {
      EXPECT_TRUE(std::isnan(value));
      EXPECT_NE(bits_of(value) & 0x400000u, 0u) << "a quiet NaN";
      EXPECT_EQ(fp16_of_float(value), kFp16Nan);
      continue;
    }
    const double expected = magnitude == kFp16Infinity ? static_cast<double>(kInf) : value_of(magnitude, 10, 15);
    EXPECT_EQ(std::abs(static_cast<double>(value)), expected);
    EXPECT_EQ(std::signbit(value), bits >> 15 != 0);
    EXPECT_EQ(fp16_of_float(value), code);
  }
}

// Neighbouring codes a < b: below the midpoint gives a, above it b, at it the even one. This holds for infinity too, as
// the format's next value would be.
TEST(NumericFormatsTest, Bf16RoundsToNearestEven) {
  for (std::uint32_t code = 0; code < kBf16Infinity; ++code) {
    const float middle = float_of_bits((code << 16) + 0x8000u);
    const std::uint32_t even = code % 2 == 0 ? code : code + 1;
    EXPECT_EQ(bf16_of_float(float_of_bits(bits_of(middle) - 1)), code);
    EXPECT_EQ(bf16_of_float(middle), even);
    EXPECT_EQ(bf16_of_float(float_of_bits(bits_of(middle) + 1)), code + 1);
    EXPECT_EQ(bf16_of_float(-middle), even | 0x8000u);
  }
}

TEST(NumericFormatsTest, Fp16RoundsToNearestEven) {
  for (std::uint32_t code = 0; code < kFp16Infinity; ++code) {
    const double next = code + 1 == kFp16Infinity ? 65536.0 : value_of(code + 1, 10, 15);
    const auto middle = static_cast<float>((value_of(code, 10, 15) + next) / 2);
    const std::uint32_t even = code % 2 == 0 ? code : code + 1;
    EXPECT_EQ(fp16_of_float(std::nextafter(middle, 0.0f)), code);
    EXPECT_EQ(fp16_of_float(middle), even);
    EXPECT_EQ(fp16_of_float(std::nextafter(middle, kInf)), code + 1);
    EXPECT_EQ(fp16_of_float(-middle), even | 0x8000u);
  }
  EXPECT_EQ(fp16_of_float(kInf), kFp16Infinity);
  EXPECT_EQ(fp16_of_float(std::numeric_limits<float>::denorm_min()), 0);
}

TEST(NumericFormatsTest, EveryE4m3HasItsValueAndComesBack) {
  for (std::uint32_t bits = 0; bits < 256; ++bits) {
    const auto code = static_cast<std::uint8_t>(bits);
    const float value = float_of_e4m3(code);
    if ((bits & 0x7fu) == 0x7fu) {
      EXPECT_TRUE(std::isnan(value));
      EXPECT_EQ(e4m3_of_float(value), kE4m3Nan);
      continue;
    }
    EXPECT_EQ(std::abs(static_cast<double>(value)), value_of(bits & 0x7fu, 3, 7));
    EXPECT_EQ(std::signbit(value), bits >> 7 != 0);
    EXPECT_EQ(e4m3_of_float(value), code);
  }
}

TEST(NumericFormatsTest, E4m3IsTheNearestCodeByExhaustiveSearch) {
  std::vector<double> values;
  for (std::uint32_t code = 0; code < 0x7fu; ++code) values.push_back(value_of(code, 3, 7));
  const auto check = [&](float value) {
    const std::uint32_t sign = std::signbit(value) ? 0x80u : 0u;
    EXPECT_EQ(e4m3_of_float(value), nearest_code(values, std::abs(static_cast<double>(value))) | sign) << value;
  };
  for_floats_around(values, check);
  for (std::uint32_t code = 0; code < kBf16Infinity; ++code) check(float_of_bf16(static_cast<std::uint16_t>(code)));
  std::mt19937 random(20);
  for (int i = 0; i < 20000; ++i) {
    check(float_of_bits(bits_of(0x1p-12f) +
                        static_cast<std::uint32_t>(random() % (bits_of(512.0f) - bits_of(0x1p-12f)))));
  }
  EXPECT_EQ(e4m3_of_float(kInf), 0x7e);
  EXPECT_EQ(e4m3_of_float(-kInf), 0xfe);
  EXPECT_EQ(e4m3_of_float(-std::numeric_limits<float>::quiet_NaN()), kE4m3Nan);
}

// Worked by hand: amax 7 gives the multiplier 448/7 = 64 and the scale 7/448 = 2^-6, by either rule.
TEST(NumericFormatsTest, ScalesOfKnownBlocks) {
  for (const ScaleRule rule : {ScaleRule::kExact, ScaleRule::kPowerOfTwo}) {
    EXPECT_EQ(fp8_scale(7.0f, rule).multiplier, 64.0f);
    EXPECT_EQ(fp8_scale(7.0f, rule).stored, 0x1p-6f);
  }
  EXPECT_EQ(fp8_scale(1.0f, ScaleRule::kExact).multiplier, 448.0f);
  EXPECT_EQ(fp8_scale(1.0f, ScaleRule::kExact).stored, 1.0f / 448.0f);
  EXPECT_EQ(fp8_scale(1.0f, ScaleRule::kPowerOfTwo).stored, 0x1p-8f);  // 1/448 lies between 2^-9 and 2^-8
  EXPECT_EQ(fp8_scale(1.0f, ScaleRule::kPowerOfTwo).multiplier, 0x1p8f);
  EXPECT_EQ(fp8_scale(0.0f, ScaleRule::kExact).multiplier, 448.0f / 1e-4f);
  EXPECT_EQ(fp8_scale(kInf, ScaleRule::kExact).multiplier, 0.0f);
  EXPECT_EQ(fp8_scale(kInf, ScaleRule::kExact).stored, kInf);
  EXPECT_EQ(fp8_scale(kInf, ScaleRule::kPowerOfTwo).multiplier, 0x1p-128f);
  EXPECT_EQ(fp8_scale(kInf, ScaleRule::kPowerOfTwo).stored, kInf);
}

TEST(NumericFormatsTest, PowerScalesAreTheLeastThatFit) {
  for (std::uint32_t code = 0; code < kBf16Infinity; ++code) {
    const float amax = std::max(float_of_bf16(static_cast<std::uint16_t>(code)), kFp8LeastAmax);
    const Fp8Scale scale = fp8_scale(amax, ScaleRule::kPowerOfTwo);
    const double unit = static_cast<double>(amax * kFp8Unit);
    EXPECT_GE(static_cast<double>(scale.stored), unit);
    EXPECT_LT(static_cast<double>(scale.stored) / 2, unit);
    EXPECT_EQ(static_cast<double>(scale.stored) * static_cast<double>(scale.multiplier), 1.0);
    EXPECT_EQ(float_of_ue8m0(ue8m0_of_scale(scale.stored)), scale.stored);
  }
}

std::vector<std::uint16_t> normal_row(std::int64_t hidden, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<std::uint16_t> row(static_cast<std::size_t>(hidden));
  for (auto& value : row) value = bf16_of_float(normal(random));
  return row;
}

// Block b is scaled by 2^b, so a scale taken from the wrong block would lose it; the last block has 16 channels.
TEST(NumericFormatsTest, EachBlockHasItsOwnScaleAndAPartialOneToo) {
  constexpr std::int64_t kHidden = 5 * 128 + 16;
  auto row = normal_row(kHidden, 1);
  for (std::size_t i = 0; i < row.size(); ++i) {
    row[i] = bf16_of_float(std::ldexp(float_of_bf16(row[i]), static_cast<int>(i / 128)));
  }
  std::vector<std::uint8_t> out(row.size());
  std::vector<float> scales(6);
  cast_fp8_row({row.data(), kHidden, out.data(), scales.data(), ScaleRule::kExact, ScaleForm::kF32});
  for (std::size_t i = 0; i < row.size(); ++i) {
    const double x = static_cast<double>(float_of_bf16(row[i]));
    const double scale = static_cast<double>(scales[i / 128]);
    const double back = static_cast<double>(float_of_e4m3(out[i])) * scale;
    EXPECT_LE(std::abs(back - x), std::max(std::abs(x) / 16, scale / 1024) * 1.0001) << i;  // specification 10.5
  }
}

TEST(NumericFormatsTest, PackedScalesAreTheExponentsOfTheRoundedOnesAndTheRestIsZero) {
  constexpr std::int64_t kHidden = 5 * 128 + 16;
  const auto row = normal_row(kHidden, 2);
  std::vector<std::uint8_t> out(row.size()), packed_out(row.size());
  std::vector<float> scales(6);
  std::vector<std::uint8_t> packed(8, 0xee);
  cast_fp8_row({row.data(), kHidden, out.data(), scales.data(), ScaleRule::kPowerOfTwo, ScaleForm::kF32});
  std::vector<std::uint32_t> words(2, 0xeeeeeeeeu);
  cast_fp8_row({row.data(), kHidden, packed_out.data(), words.data(), ScaleRule::kExact, ScaleForm::kUE8M0});
  std::memcpy(packed.data(), words.data(), packed.size());
  EXPECT_EQ(out, packed_out);
  for (std::size_t block = 0; block < 6; ++block) EXPECT_EQ(float_of_ue8m0(packed[block]), scales[block]);
  EXPECT_EQ(packed[6], 0);
  EXPECT_EQ(packed[7], 0);
}

TEST(NumericFormatsTest, ANanKeepsItsPlaceAndDoesNotTouchTheScale) {
  auto row = normal_row(128, 3);
  auto with_nan = row;
  with_nan[5] = 0xff81;
  row[5] = 0;
  std::vector<std::uint8_t> out(128), out_nan(128);
  float scale = 0, scale_nan = 0;
  cast_fp8_row({row.data(), 128, out.data(), &scale, ScaleRule::kExact, ScaleForm::kF32});
  cast_fp8_row({with_nan.data(), 128, out_nan.data(), &scale_nan, ScaleRule::kExact, ScaleForm::kF32});
  EXPECT_EQ(scale, scale_nan);
  out[5] = kE4m3Nan;
  EXPECT_EQ(out, out_nan);
}

TEST(NumericFormatsTest, AnInfinityMakesItsBlockInfiniteOrNan) {
  auto row = normal_row(256, 4);
  row[7] = kBf16Infinity;
  std::vector<std::uint8_t> out(256);
  float scales[2] = {};
  cast_fp8_row({row.data(), 256, out.data(), scales, ScaleRule::kPowerOfTwo, ScaleForm::kF32});
  for (std::size_t i = 0; i < 128; ++i) EXPECT_FALSE(std::isfinite(float_of_e4m3(out[i]) * scales[0]));
  for (std::size_t i = 128; i < 256; ++i) EXPECT_TRUE(std::isfinite(float_of_e4m3(out[i]) * scales[1]));
}

}  // namespace
}  // namespace anyep::core
