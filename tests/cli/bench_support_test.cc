// The arithmetic of measurements: order statistics, rates, payloads that tell rows apart.
#include <gtest/gtest.h>

#include <cstdint>
#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "bench/support/budget.h"
#include "bench/support/content.h"
#include "bench/support/high_throughput_case.h"
#include "bench/support/record.h"
#include "bench/support/samples.h"
#include "core/buffers.h"

namespace anyep::bench {
namespace {

TEST(Samples, MedianIsTheMiddleOrTheMeanOfTwo) {
  EXPECT_EQ(median(std::vector<double>{3, 1, 2}), 2);
  EXPECT_EQ(median(std::vector<double>{4, 1, 3, 2}), 2.5);
  EXPECT_EQ(median(std::vector<double>{}), 0);
}

TEST(Samples, PercentileIsANearestRank) {
  std::vector<double> values;
  for (int i = 1; i <= 200; ++i) values.push_back(i);
  EXPECT_EQ(percentile(values, 99), 198);
  EXPECT_EQ(percentile(values, 100), 200);
  EXPECT_EQ(percentile(values, 0), 1);
  EXPECT_EQ(percentile(std::vector<double>{7}, 99), 7);
}

TEST(Samples, TheSlowestRankDecidesEachIteration) {
  const std::vector<std::vector<double>> ranks = {{1, 5, 2}, {3, 4, 9, 8}};
  EXPECT_EQ(slowest(ranks), (std::vector<double>{3, 5, 9}));
}

TEST(Record, RatesAreBytesOfRowsOverTheMedian) {
  Figure figure;
  figure.us_p50 = 1000;
  figure.wire_rows = 100;
  figure.logical_rows = 200;
  figure.row_bytes = 10000;
  figure.ceiling_gbs = 4;
  EXPECT_DOUBLE_EQ(*figure.wire_gbs(), 1);
  EXPECT_DOUBLE_EQ(*figure.logical_gbs(), 2);
  EXPECT_DOUBLE_EQ(*figure.ratio(), 0.25);
  EXPECT_DOUBLE_EQ(*figure.share(), 0.5);
  const auto line = nlohmann::json::parse(to_json_line(figure, this_machine()));
  EXPECT_EQ(line.at("share"), 0.5);
  figure.logical_rows = 0;
  EXPECT_FALSE(figure.wire_gbs().has_value());
}

TEST(Content, RowsOfDifferentTokensRanksAndReadersDiffer) {
  const RandomContent content(64, 4, 512, 9);
  std::vector<std::uint16_t> scratch(64);
  std::set<std::vector<std::uint16_t>> seen;
  for (int source = 0; source < 4; ++source) {
    for (std::int64_t token = 0; token < 512; ++token) {
      const auto row = content.token(source, token, scratch);
      seen.emplace(row.begin(), row.end());
      const auto answer = content.answer_of_rank(source, token, 3, scratch);
      seen.emplace(answer.begin(), answer.end());
    }
  }
  EXPECT_EQ(seen.size(), 2U * 4 * 512);
}

TEST(HighThroughputData, SeesOneWrongElementOfARow) {
  workload::Request request;
  request.num_experts = 8;
  request.top_k = 2;
  request.num_ranks = 2;
  request.tokens_per_rank = 16;
  const workload::Batch batch = workload::generate(request);
  const RandomContent content(64, 2, 16, 9);
  const HighThroughputData data(batch, 1, 64, RowType::kBF16, content);
  // What a correct dispatch delivers, written down from the batch.
  std::vector<std::uint16_t> x, scratch(64);
  std::vector<std::int64_t> experts;
  std::vector<float> weights;
  for (const Origin& origin : data.origins()) {
    const auto row = content.token(origin.source, origin.token, scratch);
    x.insert(x.end(), row.begin(), row.end());
    for (int choice = 0; choice < 2; ++choice) {
      const auto at = static_cast<std::size_t>((batch.first_token(origin.source) + origin.token) * 2 + choice);
      const bool here = batch.experts[at] >= 4;
      experts.push_back(here ? batch.experts[at] - 4 : -1);
      weights.push_back(here ? batch.weights[at] : 0);
    }
  }
  Rows rows;
  const std::int64_t num_rows = data.num_rows();
  ASSERT_GT(num_rows, 0);
  rows.x = TensorView::dense(x.data(), DType::kBF16, {num_rows, 64});
  rows.experts = TensorView::dense(experts.data(), DType::kI64, {num_rows, 2});
  rows.weights = TensorView::dense(weights.data(), DType::kF32, {num_rows, 2});
  EXPECT_EQ(data.wrong_rows(rows), 0);
  x[70] ^= 1;
  EXPECT_EQ(data.wrong_rows(rows), 1);
  experts.back() = experts.back() == 0 ? 1 : 0;
  EXPECT_EQ(data.wrong_rows(rows), 2);
}

TEST(Budget, LeavesTheHeapThatWasAskedForBesideFullRings) {
  for (const int ranks : {1, 2, 4, 8}) {
    for (const std::int64_t heap : {std::int64_t{0}, std::int64_t{1} << 20, std::int64_t{1} << 33}) {
      Budget budget;
      budget.rows_bytes = rows_bytes_for(heap, ranks);
      const core::WindowLayout layout = core::WindowLayout::make(budget, ranks);
      EXPECT_GE(layout.heap_bytes + core::kPageBytes, static_cast<std::uint64_t>(heap));
      EXPECT_EQ(layout.slot_region_bytes, core::kMaxSlotRegionBytes);
      EXPECT_EQ(layout.staging_region_bytes, core::kMaxStagingRegionBytes);
    }
  }
}

}  // namespace
}  // namespace anyep::bench
