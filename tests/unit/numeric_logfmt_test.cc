#include "core/logfmt.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace anyep::core {
namespace {

using Row = std::vector<std::uint16_t>;

std::uint16_t magnitude_of(std::uint16_t bits) {
  return static_cast<std::uint16_t>(bits & 0x7fffu);
}

// The rule of the specification, in long double.
struct ExactGroup {
  long double log_amax, log_least, step;

  explicit ExactGroup(LogFmtEnds ends) {
    log_amax = std::log2(static_cast<long double>(float_of_bf16(ends.amax)));
    log_least = log_amax - 32;
    if (ends.amin != 0) log_least = std::max(log_least, std::log2(static_cast<long double>(float_of_bf16(ends.amin))));
    step = (log_amax - log_least) / 510;
  }
  std::int64_t code(float magnitude) const {
    if (magnitude == 0) return 0;
    const long double rounding = 2 - std::log2((1 + std::exp2(step)) / 2) / step;
    const long double at = (std::log2(static_cast<long double>(magnitude)) - log_least) / step + rounding;
    return std::max<std::int64_t>(0, static_cast<std::int64_t>(std::floor(at)));
  }
  long double value(std::uint32_t code) const {
    return code == 0 ? 0 : std::exp2((static_cast<long double>(code) - 1) * step + log_least);
  }
};

// A row whose magnitudes spread over `octaves` below `top`.
Row spread_row(std::int64_t hidden, float top, float octaves, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(0, 1);
  Row row(static_cast<std::size_t>(hidden));
  for (auto& bits : row) {
    const float magnitude = top * std::exp2(-octaves * uniform(random));
    bits = bf16_of_float(random() % 2 == 0 ? magnitude : -magnitude);
  }
  return row;
}

std::vector<std::uint8_t> encoded(const Row& row) {
  const auto hidden = static_cast<std::int64_t>(row.size());
  std::vector<std::uint8_t> wire(static_cast<std::size_t>(logfmt_max_bytes(hidden)), 0xee);
  wire.resize(static_cast<std::size_t>(logfmt_encode(row.data(), hidden, wire.data())));
  return wire;
}

std::vector<float> decoded(const std::vector<std::uint8_t>& wire, std::size_t hidden) {
  std::vector<float> row(hidden);
  logfmt_decode(wire.data(), static_cast<std::int64_t>(hidden), row.data());
  return row;
}

struct Spread {
  float top, octaves;
};

class NumericLogFmtTest : public testing::TestWithParam<Spread> {};

TEST_P(NumericLogFmtTest, CodesAreWithinOneOfTheExactRuleAndNearlyAlwaysEqual) {
  int different = 0;
  constexpr int kGroups = 200;
  for (unsigned seed = 0; seed < kGroups; ++seed) {
    const Row row = spread_row(kLogFmtGroup, GetParam().top, GetParam().octaves, seed);
    const LogFmtEnds ends = logfmt_ends(row.data());
    ASSERT_TRUE(logfmt_qualifies(ends));
    const LogFmtGroup group = logfmt_group(ends);
    const ExactGroup exact(ends);
    for (const std::uint16_t bits : row) {
      const auto code = static_cast<std::int64_t>(logfmt_code(group, magnitude_of(bits)));
      const std::int64_t expected = exact.code(float_of_bf16(magnitude_of(bits)));
      ASSERT_LE(std::abs(code - expected), 1) << "seed " << seed << " bits " << bits;
      different += code != expected ? 1 : 0;
    }
    EXPECT_EQ(logfmt_code(group, ends.amax), 511u);
    EXPECT_EQ(logfmt_value(group, 511), float_of_bf16(ends.amax));
    if (float_of_bf16(ends.amin) > float_of_bf16(ends.amax) * 0x1p-32f) {
      EXPECT_EQ(logfmt_code(group, ends.amin), 1u);
      EXPECT_EQ(logfmt_value(group, 1), float_of_bf16(ends.amin));
    }
  }
  EXPECT_LE(different, kGroups * kLogFmtGroup / 1000);
}

TEST_P(NumericLogFmtTest, ValuesAreThoseOfTheExactRuleToAMillionth) {
  const Row row = spread_row(kLogFmtGroup, GetParam().top, GetParam().octaves, 7);
  const LogFmtEnds ends = logfmt_ends(row.data());
  const LogFmtGroup group = logfmt_group(ends);
  const ExactGroup exact(ends);
  EXPECT_EQ(logfmt_value(group, 0), 0.0f);
  for (std::uint32_t code = 1; code <= 511; ++code) {
    const auto expected = exact.value(code);
    const auto denormal_unit = 0x1p-149L;
    EXPECT_LE(std::abs(static_cast<long double>(logfmt_value(group, code)) - expected),
              5e-6L * expected + denormal_unit);
    EXPECT_GE(logfmt_value(group, code), logfmt_value(group, code - 1));
  }
}

TEST_P(NumericLogFmtTest, DecodedRowsAreWithinHalfAStep) {
  const Row row = spread_row(1024, GetParam().top, GetParam().octaves, 8);
  const auto wire = encoded(row);
  EXPECT_EQ(wire.size(), 16u + 1024 * 5 / 4 + 1024 / 32);
  const auto back = decoded(wire, row.size());
  for (std::size_t i = 0; i < row.size(); ++i) {
    const LogFmtEnds ends = logfmt_ends(row.data() + i / 128 * 128);
    const long double half = (std::exp2(ExactGroup(ends).step) - 1) / 2;  // of the value: up to 2.2 % at 32 octaves
    const long double x = float_of_bf16(row[i]);
    if (std::abs(x) < static_cast<long double>(float_of_bf16(ends.amax)) * 0x1p-32L) continue;
    EXPECT_LE(std::abs(static_cast<long double>(back[i]) - x), std::abs(x) * half * 1.001L + 0x1p-149L) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Spreads, NumericLogFmtTest,
                         testing::Values(Spread{0.99f, 0.02f}, Spread{0.5f, 1}, Spread{0.9f, 4}, Spread{0x1p-3f, 8},
                                         Spread{0.3f, 16}, Spread{0.99f, 31.5f}, Spread{0.7f, 32}, Spread{0.7f, 60},
                                         Spread{0x1p-100f, 20}, Spread{0x1p-124f, 9}, Spread{0x1p-128f, 5}));

// Two magnitudes only: whatever lies between, these two come back exactly, signs included.
TEST(NumericLogFmtRowTest, TheEndsOfAGroupAreExact) {
  Row row(512);
  for (std::size_t i = 0; i < row.size(); ++i) {
    row[i] = static_cast<std::uint16_t>(bf16_of_float(i % 3 == 0 ? 0.7f : 0.0003f) | (i % 5 == 0 ? 0x8000u : 0u));
  }
  const auto back = decoded(encoded(row), row.size());
  for (std::size_t i = 0; i < row.size(); ++i) EXPECT_EQ(bits_of(back[i]), bits_of(float_of_bf16(row[i])));
}

TEST(NumericLogFmtRowTest, ZeroStaysZeroWithItsSign) {
  Row row = spread_row(512, 0.5f, 20, 1);
  row[3] = 0;
  row[200] = 0x8000;
  const auto wire = encoded(row);
  EXPECT_EQ(wire[0], 1) << "the chunk is coded";
  const auto back = decoded(wire, row.size());
  EXPECT_EQ(bits_of(back[3]), 0u);
  EXPECT_EQ(bits_of(back[200]), 0x80000000u);
}

// 2560 channels: five chunks of 512. In each of three, one value of one group breaks the rule, so the chunk stays BF16.
TEST(NumericLogFmtRowTest, AChunkWithOneUnfitGroupTravelsUnchanged) {
  Row row = spread_row(2560, 0.5f, 10, 2);
  row[130] = 0x3f80;                                                                       // chunk 0: amax 1 has log2 0
  row[512 + 400] = 0x7f81;                                                                 // chunk 1: NaN
  std::fill(row.begin() + 3 * 512, row.begin() + 3 * 512 + 128, Row::value_type{0xbf00});  // chunk 3: an empty range
  const auto wire = encoded(row);
  EXPECT_EQ(wire[0], 0b10100);
  EXPECT_EQ(wire.size(), 16u + 3 * 1024 + 2 * 4 * 164);
  const auto back = decoded(wire, row.size());
  for (const std::size_t chunk : {0, 1, 3}) {
    for (std::size_t i = chunk * 512; i < (chunk + 1) * 512; ++i)
      EXPECT_EQ(bits_of(back[i]), bits_of(float_of_bf16(row[i])));
  }
}

TEST(NumericLogFmtRowTest, InfinitiesAndAllZeroGroupsTravelUnchanged) {
  for (const std::uint16_t special : {std::uint16_t{0x7f80}, std::uint16_t{0xff80}}) {
    Row row = spread_row(128, 0.5f, 3, 3);
    row[77] = special;
    EXPECT_EQ(encoded(row)[0], 0);
  }
  const Row zeros(128, 0);
  EXPECT_EQ(encoded(zeros)[0], 0);
  EXPECT_EQ(decoded(encoded(zeros), 128), std::vector<float>(128, 0.0f));
}

// One group by hand: channel 17 has amax, channel 40 minus amin; the rest 0.25, halfway in the logarithm.
TEST(NumericLogFmtRowTest, BytesOfOneGroup) {
  Row row(128, bf16_of_float(0.25f));
  row[17] = bf16_of_float(0.5f);
  row[40] = bf16_of_float(-0.125f);
  const auto wire = encoded(row);
  ASSERT_EQ(wire.size(), 16u + 164 + 12);  // to a multiple of 16
  const std::uint8_t* const ends = wire.data() + 16;
  EXPECT_EQ(ends[0] | ends[1] << 8, bf16_of_float(0.5f));
  EXPECT_EQ(ends[2] | ends[3] << 8, bf16_of_float(0.125f));
  const std::uint8_t* const low = ends + 4;
  EXPECT_EQ(low[17], 511 & 255);
  EXPECT_EQ(low[40], 1);
  EXPECT_EQ(low[0], 256 & 255);  // (511 + 1) / 2
  EXPECT_EQ(low[128 + 40 % 16], 0xff & ~(1 << 40 / 16)) << "bit 8 of every code but channel 40's";
  EXPECT_EQ(low[128 + 17 % 16], 0xff);
  EXPECT_EQ(low[144 + 40 % 16], 1 << 40 / 16) << "the only sign";
  EXPECT_EQ(low[144 + 17 % 16], 0);
}

TEST(NumericLogFmtRowTest, EverySizeFitsItsSlotAndComesBackWhole) {
  for (std::int64_t hidden = 128; hidden <= 16384; hidden += 128) {
    Row row = spread_row(hidden, 0.9f, 6, static_cast<unsigned>(hidden));
    row[static_cast<std::size_t>(hidden) / 2] = 0x4000;  // one chunk unfit
    const auto wire = encoded(row);
    ASSERT_LE(static_cast<std::int64_t>(wire.size()), logfmt_max_bytes(hidden));
    ASSERT_EQ(wire.size() % 16, 0u);
    const auto back = decoded(wire, row.size());
    for (std::size_t i = 0; i < row.size(); ++i) {
      const float x = float_of_bf16(row[i]);
      ASSERT_LE(std::abs(back[i] - x), std::abs(x) * 0.0042f) << hidden << " " << i;  // half of 2^(6/510) - 1
    }
  }
  EXPECT_EQ(logfmt_max_bytes(7168), 16 + 14336);
  EXPECT_EQ(logfmt_header_bytes(512 * 129), 32);
}

TEST(NumericLogFmtRowTest, AnyBytesDecodeInsideTheSlot) {
  std::mt19937 random(5);
  for (int round = 0; round < 200; ++round) {
    constexpr std::int64_t kHidden = 512 * 3 + 128;
    std::vector<std::uint8_t> wire(static_cast<std::size_t>(logfmt_max_bytes(kHidden)));
    for (auto& byte : wire) byte = static_cast<std::uint8_t>(random());
    EXPECT_EQ(decoded(wire, kHidden).size(), static_cast<std::size_t>(kHidden));  // the sanitizers watch
  }
}

}  // namespace
}  // namespace anyep::core
