// The numbers underneath: fixed bits, and distributions that are what they are called.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "workload/math.h"
#include "workload/random.h"
#include "workload/sampler.h"

namespace anyep::workload {
namespace {

TEST(WorkloadMath, ExpAndLogAreCloseToTheLibrary) {
  for (double x = -699; x < 699; x += 0.37) {
    EXPECT_NEAR(workload::exp(x) / std::exp(x), 1, 1e-13) << x;
    const double y = std::exp(x);
    EXPECT_NEAR(workload::log(y), std::log(y), 1e-14 * (1 + std::fabs(std::log(y)))) << y;
  }
  for (double x = 0.5; x < 2; x += 0.0007) EXPECT_NEAR(workload::log(x), std::log(x), 1e-15);
  EXPECT_EQ(workload::exp(0.0), 1.0);
  EXPECT_EQ(workload::log(1.0), 0.0);
  EXPECT_NEAR(workload::pow(3, 2.5), std::pow(3, 2.5), 1e-12);
  EXPECT_EQ(workload::sigmoid(0), 0.5);
}

TEST(WorkloadMath, ExpStaysFinite) {
  EXPECT_TRUE(std::isfinite(workload::exp(1e9)));
  EXPECT_GT(workload::exp(-1e9), 0);
  EXPECT_TRUE(std::isfinite(workload::exp(std::numeric_limits<double>::quiet_NaN())));
}

// Known answers of the generator's publication (kat_vectors of Random123).
TEST(WorkloadRandom, PhiloxGivesThePublishedAnswers) {
  using Block = std::array<std::uint32_t, 4>;
  EXPECT_EQ(philox({0, 0, 0, 0}, 0), (Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox({~0U, ~0U, ~0U, ~0U}, ~0ULL), (Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0x299f31d0a4093822ULL),
            (Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(WorkloadRandom, StreamsDiffer) {
  const auto first = [](std::uint64_t key, Purpose purpose, std::uint64_t item) {
    return Stream(key, purpose, item).bits64();
  };
  const std::uint64_t base = first(1, Purpose::kChoices, 0);
  EXPECT_EQ(base, first(1, Purpose::kChoices, 0));
  EXPECT_NE(base, first(2, Purpose::kChoices, 0));
  EXPECT_NE(base, first(1, Purpose::kWeights, 0));
  EXPECT_NE(base, first(1, Purpose::kChoices, 1));
  EXPECT_NE(base, first(1, Purpose::kChoices, std::uint64_t{1} << 32));
}

TEST(WorkloadRandom, UniformAndGaussianHaveTheirMoments) {
  Stream stream(3, Purpose::kChoices, 0);
  constexpr int kDraws = 200000;
  double sum = 0, square = 0, cube = 0, fourth = 0, uniform = 0;
  for (int draw = 0; draw < kDraws; ++draw) {
    const double u = stream.uniform();
    ASSERT_GT(u, 0);
    ASSERT_LT(u, 1);
    uniform += u / kDraws;
    const double x = stream.gaussian();
    sum += x / kDraws;
    square += x * x / kDraws;
    cube += x * x * x / kDraws;
    fourth += x * x * x * x / kDraws;
  }
  EXPECT_NEAR(uniform, 0.5, 0.003);
  EXPECT_NEAR(sum, 0, 0.01);
  EXPECT_NEAR(square, 1, 0.02);
  EXPECT_NEAR(cube, 0, 0.05);
  EXPECT_NEAR(fourth, 3, 0.1);
}

// Weights 1, 2, 3, 4 without replacement: the first two draws by hand.
TEST(WorkloadSampler, DrawsWithoutReplacementInProportionToWhatIsLeft) {
  const Sampler sampler({1, 2, 3, 4});
  constexpr int kDraws = 100000;
  std::vector<double> pairs(16);
  std::vector<std::int64_t> row(2);
  for (std::uint64_t token = 0; token < kDraws; ++token) {
    Stream stream(5, Purpose::kChoices, token);
    sampler.draw_distinct(stream, row);
    pairs[static_cast<std::size_t>(row[0] * 4 + row[1])] += 1.0 / kDraws;
  }
  for (std::size_t first = 0; first < 4; ++first) {
    for (std::size_t second = 0; second < 4; ++second) {
      const double weight = static_cast<double>(first + 1);
      const double expected = first == second ? 0 : weight / 10 * static_cast<double>(second + 1) / (10 - weight);
      EXPECT_NEAR(pairs[first * 4 + second], expected, 0.005) << first << " " << second;
    }
  }
}

// One item holds all but 1e-12 of the weight, so that nearly every draw after the first is a rejection.
TEST(WorkloadSampler, ExtremeSkewStillDrawsTheRestInProportion) {
  const Sampler sampler({1e-12, 1, 3e-12});
  constexpr int kDraws = 20000;
  double thirds = 0;
  std::vector<std::int64_t> row(3);
  for (std::uint64_t token = 0; token < kDraws; ++token) {
    Stream stream(6, Purpose::kChoices, token);
    sampler.draw_distinct(stream, row);
    ASSERT_EQ(row[0], 1);
    ASSERT_EQ(row[0] + row[1] + row[2], 3);
    thirds += row[1] == 2 ? 1.0 / kDraws : 0;
  }
  EXPECT_NEAR(thirds, 0.75, 0.015);
}

TEST(WorkloadSampler, KeepsWhatIsAlreadyChosen) {
  const Sampler sampler(std::vector<double>(8, 1.0));
  std::vector<std::int64_t> row{3, 5, -1, -1, -1, -1, -1, -1};
  Stream stream(7, Purpose::kChoices, 0);
  sampler.draw_distinct(stream, row, 2);
  EXPECT_EQ(row[0], 3);
  EXPECT_EQ(row[1], 5);
  EXPECT_EQ(std::accumulate(row.begin(), row.end(), std::int64_t{0}), 28);
}

}  // namespace
}  // namespace anyep::workload
