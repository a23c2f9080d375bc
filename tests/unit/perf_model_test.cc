// The numbers of the tables in the notes on limits and goals, sections 1 and 4: hidden 7168, top-8 of 256 experts.
#include "core/perf_model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "core/routing.h"
#include "thrown.h"

namespace anyep::core {
namespace {

using test::thrown;

constexpr std::int64_t kHidden = 7168;
constexpr double kLinkGbs = 343;
constexpr double kFlagUs = 1.24;

const std::int64_t kBf16Row = counted_row_bytes(kHidden, 2);
const std::int64_t kFp8Row = counted_row_bytes(kHidden, 1, kHidden / 128);

TEST(PerfModelTest, RowBytesAreThoseOfTheTables) {
  EXPECT_EQ(kBf16Row, 14336);
  EXPECT_EQ(kFp8Row, 7392);
}

TEST(PerfModelTest, UniformTrafficMatchesTheTable) {
  const struct {
    int num_ranks;
    double distinct, wire, own, per_expert;
  } table[] = {{2, 1.993, 0.9965, 0.9965, 4}, {4, 3.614, 2.711, 0.904, 6}, {8, 5.295, 4.633, 0.662, 7}};
  for (const auto& row : table) {
    const Traffic traffic = uniform_traffic(row.num_ranks, 256, 8);
    EXPECT_NEAR(traffic.distinct_ranks, row.distinct, 0.0005) << row.num_ranks;
    EXPECT_NEAR(traffic.wire, row.wire, 0.0005) << row.num_ranks;
    EXPECT_NEAR(traffic.own, row.own, 0.0005) << row.num_ranks;
    EXPECT_NEAR(traffic.copied, row.distinct, 0.0005) << row.num_ranks;
    EXPECT_DOUBLE_EQ(traffic.per_expert, row.per_expert);
  }
}

TEST(PerfModelTest, ThroughputFloorsMatchTheTable) {
  const struct {
    int num_ranks, tokens;
    double wire_rows, bf16_mb, bf16_us, fp8_mb, fp8_us;
  } table[] = {{2, 4096, 4082, 58.5, 170.6, 30.2, 88.0},     {2, 8192, 8163, 117.0, 341.2, 60.3, 175.9},
               {4, 4096, 11103, 159.2, 464.1, 82.1, 239.3},  {4, 8192, 22206, 318.3, 928.1, 164.1, 478.6},
               {8, 4096, 18976, 272.0, 793.1, 140.3, 409.0}, {8, 8192, 37952, 544.1, 1586.2, 280.5, 817.9}};
  for (const auto& row : table) {
    const double rows = row.tokens * uniform_traffic(row.num_ranks, 256, 8).wire;
    EXPECT_NEAR(rows, row.wire_rows, 0.6);
    EXPECT_NEAR(rows * static_cast<double>(kBf16Row) / 1e6, row.bf16_mb, 0.06);
    EXPECT_NEAR(floor_us(rows, kBf16Row, kLinkGbs), row.bf16_us, 0.06);
    EXPECT_NEAR(rows * static_cast<double>(kFp8Row) / 1e6, row.fp8_mb, 0.06);
    EXPECT_NEAR(floor_us(rows, kFp8Row, kLinkGbs), row.fp8_us, 0.06);
  }
}

TEST(PerfModelTest, DecodeFloorsMatchTheTable) {
  const struct {
    int num_ranks, tokens;
    double fp8_us, bf16_us, combine_us, pair_fp8_us, pair_bf16_us;
  } table[] = {{2, 1, 0.02, 0.04, 0.04, 2.5, 2.6},     {2, 128, 2.75, 5.33, 5.33, 10.6, 13.1},
               {2, 256, 5.50, 10.7, 10.7, 18.6, 23.8}, {4, 8, 0.47, 0.91, 0.91, 3.9, 4.3},
               {4, 32, 1.87, 3.63, 3.63, 8.0, 9.7},    {4, 128, 7.48, 14.5, 14.5, 24.5, 31.5},
               {8, 128, 12.8, 24.8, 24.8, 40.0, 52.1}, {8, 256, 25.6, 49.6, 49.6, 77.6, 101.6}};
  for (const auto& row : table) {
    PairShape shape{row.tokens * uniform_traffic(row.num_ranks, 256, 8).wire, kFp8Row, kBf16Row, kLinkGbs, kFlagUs};
    EXPECT_NEAR(pair_floor(shape).dispatch_us, row.fp8_us, 0.051);
    EXPECT_NEAR(pair_floor(shape).combine_us, row.combine_us, 0.051);
    EXPECT_NEAR(pair_floor(shape).pair_us, row.pair_fp8_us, 0.051);
    shape.dispatch_row_bytes = kBf16Row;
    EXPECT_NEAR(pair_floor(shape).dispatch_us, row.bf16_us, 0.051);
    EXPECT_NEAR(pair_floor(shape).pair_us, row.pair_bf16_us, 0.051);
  }
}

TEST(PerfModelTest, SendingPerExpertMatchesTheTable) {
  EXPECT_NEAR(floor_us(128 * uniform_traffic(4, 256, 8).per_expert, kBf16Row, kLinkGbs), 32.1, 0.051);
  EXPECT_NEAR(floor_us(256 * uniform_traffic(8, 256, 8).per_expert, kBf16Row, kLinkGbs), 74.9, 0.051);
}

TEST(PerfModelTest, OneRankAndAllExpertsAreExact) {
  const Traffic alone = uniform_traffic(1, 256, 8);
  EXPECT_DOUBLE_EQ(alone.distinct_ranks, 1);
  EXPECT_DOUBLE_EQ(alone.wire, 0);
  EXPECT_DOUBLE_EQ(alone.own, 1);
  const Traffic everywhere = uniform_traffic(4, 8, 8);
  EXPECT_DOUBLE_EQ(everywhere.distinct_ranks, 4);
  EXPECT_DOUBLE_EQ(everywhere.wire, 3);
}

TEST(PerfModelTest, UnevenExpertsCountEachRankByItsOwn) {
  // 3 experts on 2 ranks, one choice: rank 0 hosts two of them and receives 2/3 of rank 1's tokens, the busiest
  // direction.
  const Traffic uneven = uniform_traffic(2, 3, 1);
  EXPECT_DOUBLE_EQ(uneven.distinct_ranks, 1);
  EXPECT_NEAR(uneven.wire, 2.0 / 3, 1e-12);
  EXPECT_NEAR(uneven.copied, 4.0 / 3, 1e-12);
  // More ranks than experts: two of five host one each.
  const Traffic sparse = uniform_traffic(5, 2, 1);
  EXPECT_DOUBLE_EQ(sparse.distinct_ranks, 1);
  EXPECT_DOUBLE_EQ(sparse.wire, 2) << "four peers send half of their tokens to rank 0";
}

TEST(PerfModelTest, TheModelAgreesWithACountOfDrawnTokens) {
  constexpr int kRanks = 3;
  constexpr int kExperts = 10;
  constexpr int kTopK = 4;
  constexpr int kTokens = 20'000;
  constexpr unsigned kSeed = 7;
  SCOPED_TRACE(kSeed);
  std::mt19937 random(kSeed);
  std::vector<std::int64_t> rows(kRanks * kRanks);
  std::vector<int> experts(kExperts);
  std::iota(experts.begin(), experts.end(), 0);
  for (std::size_t source = 0; source < kRanks; ++source) {
    for (int token = 0; token < kTokens; ++token) {
      std::shuffle(experts.begin(), experts.end(), random);
      std::vector<bool> goes(kRanks);
      for (std::size_t choice = 0; choice < kTopK; ++choice) {
        goes[static_cast<std::size_t>(rank_of_expert(kExperts, kRanks, experts[choice]))] = true;
      }
      for (std::size_t rank = 0; rank < kRanks; ++rank) rows[source * kRanks + rank] += goes[rank] ? 1 : 0;
    }
  }
  const WireRows counted = count_wire_rows(rows, kRanks);
  const Traffic expected = uniform_traffic(kRanks, kExperts, kTopK);
  EXPECT_NEAR(static_cast<double>(counted.busiest) / kTokens, expected.wire, 0.02);
  EXPECT_NEAR(static_cast<double>(counted.own) / kTokens / kRanks, expected.own, 0.02);
  EXPECT_NEAR(static_cast<double>(counted.most_received) / kTokens, expected.copied, 0.02);
}

TEST(PerfModelTest, CountingFindsTheBusiestRankAndDirection) {
  // Rank 2 receives 5 + 4 rows, rank 0 sends 2 + 5; the diagonal stays.
  const std::vector<std::int64_t> rows = {100, 2, 5, 1, 50, 4, 3, 0, 7};
  const WireRows counted = count_wire_rows(rows, 3);
  EXPECT_EQ(counted.busiest, 9);
  EXPECT_EQ(counted.busiest_rank, 2);
  EXPECT_TRUE(counted.busiest_is_inbound);
  EXPECT_EQ(counted.total, 15);
  EXPECT_EQ(counted.own, 157);
  EXPECT_EQ(counted.most_received, 104);
}

TEST(PerfModelTest, NoTokensMoveNothing) {
  const WireRows counted = count_wire_rows(std::vector<std::int64_t>(16), 4);
  EXPECT_EQ(counted.busiest, 0);
  EXPECT_EQ(counted.total, 0);
}

TEST(PerfModelTest, WithoutARateThereIsNoTime) {
  EXPECT_EQ(floor_us(100, 7168, 0), 0);
}

TEST(PerfModelTest, ImpossibleRequestsAreRefusedByName) {
  EXPECT_EQ(thrown([] { uniform_traffic(0, 8, 2); }).argument, "num_ranks");
  EXPECT_EQ(thrown([] { uniform_traffic(4, 0, 1); }).argument, "num_experts");
  EXPECT_EQ(thrown([] { uniform_traffic(4, 8, 9); }).argument, "top_k");
  EXPECT_EQ(thrown([] { uniform_traffic(4, 8, 0); }).argument, "top_k");
  EXPECT_EQ(thrown([] { count_wire_rows(std::vector<std::int64_t>(5), 2); }).argument, "rows.size()");
  EXPECT_EQ(thrown([] { count_wire_rows(std::vector<std::int64_t>{1, -1, 0, 0}, 2); }).argument, "rows");
}

}  // namespace
}  // namespace anyep::core
