#include "cpu/simd/kernels.h"
#include "tests/unit/simd_isas.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace anyep::cpu::simd {
namespace {

class SimdCopyTest : public SimdTest {};

constexpr std::size_t kGuard = 128;

void expect_copied(void (*copy)(void*, const void*, std::size_t), std::size_t bytes, std::size_t to, std::size_t from) {
  std::vector<unsigned char> source(from + bytes);
  std::mt19937 random(static_cast<unsigned>(bytes));
  for (auto& byte : source) byte = static_cast<unsigned char>(random());
  std::vector<unsigned char> target(kGuard + to + bytes + kGuard, 0xee);
  std::vector<unsigned char> expected = target;
  if (bytes > 0) std::memcpy(expected.data() + kGuard + to, source.data() + from, bytes);
  copy(target.data() + kGuard + to, source.data() + from, bytes);
  stream_fence();
  ASSERT_EQ(target, expected) << "bytes " << bytes << " offsets " << to << " " << from;
}

TEST_P(SimdCopyTest, MovesEverySizeAtEveryAlignmentAndNothingElse) {
  const Kernels& kernels = variant();
  for (const auto copy : {kernels.copy, kernels.stream}) {
    for (std::size_t bytes = 0; bytes <= 400; ++bytes) expect_copied(copy, bytes, bytes % 67, bytes % 13);
    for (std::size_t offset = 0; offset < 64; ++offset) {
      expect_copied(copy, 64, offset, 0);
      expect_copied(copy, 1008, offset, offset % 7);
      expect_copied(copy, 14336, offset, 63 - offset);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, SimdCopyTest, every_isa(), isa_name);

TEST(SimdKernelsTest, TheBestVariantIsChosenAndTheBaselineIsAlwaysThere) {
  ASSERT_NE(kernels_of(Isa::kBaseline), nullptr);
  EXPECT_STREQ(kernels_of(Isa::kBaseline)->name, "baseline");
  if (std::getenv("ANYEP_CPU_ISA") != nullptr) GTEST_SKIP() << "ANYEP_CPU_ISA is set";
  const Kernels* best = kernels_of(Isa::kBaseline);
  for (const Isa isa : {Isa::kV3, Isa::kV4}) {
    if (kernels_of(isa) != nullptr) best = kernels_of(isa);
  }
  EXPECT_EQ(&kernels(), best);
}

// In processes of their own: the choice is made once.
TEST(SimdKernelsDeathTest, TheEnvironmentForcesAVariant) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  for (const Isa isa : {Isa::kBaseline, Isa::kV3, Isa::kV4}) {
    const Kernels* const wanted = kernels_of(isa);
    if (wanted == nullptr) continue;
    EXPECT_EXIT(
        {
          setenv("ANYEP_CPU_ISA", wanted->name, 1);
          std::_Exit(&kernels() == wanted ? 0 : 1);
        },
        testing::ExitedWithCode(0), "");
  }
}

}  // namespace
}  // namespace anyep::cpu::simd
