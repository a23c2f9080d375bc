#include "core/fp8.h"
#include "core/logfmt.h"
#include "cpu/simd/kernels.h"
#include "tests/unit/simd_isas.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

namespace anyep::cpu::simd {
namespace {

using core::bf16_of_float;
using core::Fp8Cast;
using core::ScaleForm;
using core::ScaleRule;

class SimdCastTest : public SimdTest {};

// Blocks of very different size, some with a NaN, an infinity or nothing but zeros.
std::vector<std::uint16_t> random_row(std::size_t hidden, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<std::uint16_t> row(hidden);
  int exponent = 0;
  for (std::size_t i = 0; i < hidden; ++i) {
    if (i % 128 == 0) exponent = static_cast<int>(random() % 200) - 100;
    row[i] = bf16_of_float(std::ldexp(normal(random), random() % 8 == 0 ? exponent - 12 : exponent));
  }
  for (std::size_t block = 0; block + 128 <= hidden; block += 128) {
    const auto kind = random() % 12;
    if (kind == 0) row[block + random() % 128] = static_cast<std::uint16_t>(0x7f81u | (random() & 0x8000u));
    if (kind == 1) row[block + random() % 128] = static_cast<std::uint16_t>(0x7f80u | (random() & 0x8000u));
    for (std::size_t i = 0; kind == 2 && i < 128; ++i) row[block + i] = static_cast<std::uint16_t>(random() & 0x8000u);
  }
  return row;
}

struct CastResult {
  std::vector<std::uint8_t> codes;
  std::vector<std::uint32_t> scales;
  friend bool operator==(const CastResult&, const CastResult&) = default;
};

CastResult run(void (*cast)(const Fp8Cast&), const std::vector<std::uint16_t>& row, ScaleRule rule, ScaleForm form) {
  const auto hidden = static_cast<std::int64_t>(row.size());
  const auto words = form == ScaleForm::kF32 ? core::num_fp8_scales(hidden) : core::num_packed_scales(hidden);
  CastResult result{std::vector<std::uint8_t>(row.size() + 64, 0xee),
                    std::vector<std::uint32_t>(static_cast<std::size_t>(words) + 1, 0xeeeeeeee)};
  cast({row.data(), hidden, result.codes.data(), result.scales.data(), rule, form});
  return result;
}

void expect_same(void (*cast)(const Fp8Cast&), const std::vector<std::uint16_t>& row) {
  for (const ScaleRule rule : {ScaleRule::kExact, ScaleRule::kPowerOfTwo}) {
    for (const ScaleForm form : {ScaleForm::kF32, ScaleForm::kUE8M0}) {
      ASSERT_EQ(run(cast, row, rule, form), run(core::cast_fp8_row, row, rule, form)) << "hidden " << row.size();
    }
  }
}

TEST_P(SimdCastTest, RowsOfEverySizeAreCastAsTheDefinitionSays) {
  std::mt19937 random(21);
  for (std::size_t hidden = 8; hidden <= 1200; hidden += 8) expect_same(variant().cast_fp8, random_row(hidden, random));
  for (const std::size_t hidden : {2880, 7168, 16384}) {
    for (int round = 0; round < 5; ++round) expect_same(variant().cast_fp8, random_row(hidden, random));
  }
}

// Every finite BF16 once beside every fourth power of two as the block's largest: all roundings, ties included.
TEST_P(SimdCastTest, EveryBf16RoundsAsTheDefinitionSays) {
  for (std::uint32_t amax = 0x0080; amax < 0x7f80u; amax += 0x0200) {
    std::vector<std::uint16_t> row;
    for (std::uint32_t bits = amax > 0x0c00u ? amax - 0x0c00u : 0; bits < amax; ++bits) {
      if (row.size() % 128 == 0) row.push_back(static_cast<std::uint16_t>(amax));
      row.push_back(static_cast<std::uint16_t>(bits | (bits % 3 == 0 ? 0x8000u : 0u)));
    }
    if (!row.empty()) expect_same(variant().cast_fp8, row);
  }
}

TEST_P(SimdCastTest, LogFmtIsTheCoreFunctionBitForBit) {
  const Kernels& kernels = variant();
  std::mt19937 random(22);
  for (const std::int64_t hidden : {128, 384, 512, 640, 1024, 2048, 2944, 7168, 16384}) {
    std::vector<std::uint16_t> row(static_cast<std::size_t>(hidden));
    for (std::size_t i = 0; i < row.size(); ++i) {
      const float top = std::ldexp(1.0f, -static_cast<int>(i / 128 * 7 % 120));
      row[i] = bf16_of_float((random() % 2 == 0 ? top : -top) *
                             std::exp2(static_cast<float>(random() % 4000) * -0.01f - 0.1f));
    }
    if (hidden > 2000) row[static_cast<std::size_t>(hidden) - 1] = 0x7fc0;
    const auto bytes = static_cast<std::size_t>(core::logfmt_max_bytes(hidden));
    std::vector<std::uint8_t> wire(bytes, 0xee), expected_wire(bytes, 0xee);
    const std::int64_t used = kernels.logfmt_encode(row.data(), hidden, wire.data());
    ASSERT_EQ(used, core::logfmt_encode(row.data(), hidden, expected_wire.data()));
    wire.resize(static_cast<std::size_t>(used));  // what follows is scratch
    expected_wire.resize(wire.size());
    ASSERT_EQ(wire, expected_wire) << "hidden " << hidden;
    std::vector<std::uint32_t> values(row.size()), expected(row.size());
    kernels.logfmt_decode(wire.data(), hidden, reinterpret_cast<float*>(values.data()));
    core::logfmt_decode(wire.data(), hidden, reinterpret_cast<float*>(expected.data()));
    ASSERT_EQ(values, expected) << "hidden " << hidden;
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, SimdCastTest, every_isa(), isa_name);

}  // namespace
}  // namespace anyep::cpu::simd
