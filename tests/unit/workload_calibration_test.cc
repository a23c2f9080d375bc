// The generator against the calibration table of published imbalance: 256 experts, top-8, 1500 tokens.
#include <anyep/workload.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <string>

namespace anyep::workload {
namespace {

constexpr int kNumExperts = 256;
constexpr int kTableSeeds = 6;  // the table's numbers are means of six draws
constexpr int kSeeds = 18;
constexpr std::array kRankCounts{2, 4, 8, 16, 32};

struct TableRow {
  const char* profile;
  std::array<double, 5> max_vio;  // of pairs, per entry of kRankCounts
  double gini, top_fifth, expert_max_over_mean;
};

constexpr std::array kTable{
    TableRow{"lognormal:0.2", {0.02, 0.04, 0.08, 0.14, 0.19}, 0.14, 0.27, 1.9},
    TableRow{"lognormal:0.35", {0.03, 0.06, 0.12, 0.22, 0.31}, 0.21, 0.32, 2.6},
    TableRow{"lognormal:0.5", {0.04, 0.09, 0.17, 0.32, 0.47}, 0.29, 0.37, 3.9},
    TableRow{"lognormal:0.75", {0.05, 0.12, 0.25, 0.49, 0.81}, 0.41, 0.47, 6.7},
    TableRow{"lognormal:1.0", {0.07, 0.16, 0.34, 0.72, 1.28}, 0.52, 0.57, 10.6},
    TableRow{"lognormal:1.25", {0.08, 0.21, 0.44, 0.97, 1.86}, 0.62, 0.66, 15.1},
    TableRow{"lognormal:1.5", {0.09, 0.24, 0.51, 1.18, 2.38}, 0.70, 0.73, 19.3},
    TableRow{"lognormal:2.0", {0.10, 0.29, 0.61, 1.46, 3.10}, 0.81, 0.85, 25.0},
    TableRow{"zipf:0.6", {0.06, 0.16, 0.33, 0.59, 1.19}, 0.38, 0.47, 10.6},
    TableRow{"zipf:0.8", {0.10, 0.27, 0.53, 1.04, 2.05}, 0.51, 0.59, 17.8},
    TableRow{"zipf:1.0", {0.14, 0.39, 0.75, 1.51, 2.98}, 0.64, 0.70, 25.2},
    TableRow{"zipf:1.2", {0.18, 0.48, 0.93, 1.81, 3.61}, 0.73, 0.79, 29.9},
};

/// Mean and standard deviation of one number over the seeds.
struct Spread {
  double sum = 0, squares = 0;
  void add(double value) {
    sum += value;
    squares += value * value;
  }
  double mean() const { return sum / kSeeds; }
  double deviation() const { return std::sqrt(std::max(0.0, squares / kSeeds - mean() * mean())); }
  /// Three standard errors of the difference of two independent means, and the table's rounding.
  double tolerance(double rounding) const {
    return 3 * deviation() * std::sqrt(1.0 / kTableSeeds + 1.0 / kSeeds) + rounding;
  }
};

class Calibration : public testing::TestWithParam<TableRow> {};

TEST_P(Calibration, MatchesTheTable) {
  const TableRow& row = GetParam();
  std::array<Spread, kRankCounts.size()> max_vio;
  Spread gini, top_fifth, expert_max;
  for (int seed = 1; seed <= kSeeds; ++seed) {
    Request request{parse_profile(row.profile)};
    request.seed = static_cast<std::uint64_t>(seed);
    request.tokens_per_rank = 1500;
    const Batch batch = generate(request);
    for (std::size_t index = 0; index < kRankCounts.size(); ++index) {
      max_vio[index].add(measure(batch, kNumExperts, kRankCounts[index]).rank_pairs_max_over_mean - 1);
    }
    const Statistics statistics = measure(batch, kNumExperts, 1);
    gini.add(statistics.gini);
    top_fifth.add(statistics.top_fifth_share);
    expert_max.add(statistics.expert_max_over_mean);
  }
  for (std::size_t index = 0; index < kRankCounts.size(); ++index) {
    EXPECT_NEAR(max_vio[index].mean(), row.max_vio[index], max_vio[index].tolerance(0.01))
        << "MaxVio on " << kRankCounts[index] << " ranks";
  }
  EXPECT_NEAR(gini.mean(), row.gini, gini.tolerance(0.01));
  EXPECT_NEAR(top_fifth.mean(), row.top_fifth, top_fifth.tolerance(0.01));
  EXPECT_NEAR(expert_max.mean(), row.expert_max_over_mean, expert_max.tolerance(0.1));
}

std::string name_of_row(const testing::TestParamInfo<TableRow>& info) {
  std::string name = info.param.profile;
  for (char& letter : name) {
    if (std::isalnum(static_cast<unsigned char>(letter)) == 0) letter = '_';
  }
  return name;
}

INSTANTIATE_TEST_SUITE_P(Table, Calibration, testing::ValuesIn(kTable), name_of_row);

}  // namespace
}  // namespace anyep::workload
