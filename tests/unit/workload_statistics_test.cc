// Statistics by hand, presets, and batches whose numbers were written down.
#include <anyep/error.h>
#include <anyep/workload.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <set>
#include <string>

#include "unit/workload_digest.h"

namespace anyep::workload {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

/// Five experts on two ranks (0, 1, 2 and 3, 4), four tokens.
Batch small_batch() {
  Batch batch;
  batch.top_k = 2;
  batch.num_experts = 5;
  batch.tokens_per_rank = {3, 1};
  batch.experts = {0, 1, 2, 3, -1, -1, 4, 4};
  batch.weights = {0.5F, 0.5F, 0.5F, 0.5F, 0, 0, 0.5F, 0.5F};
  return batch;
}

TEST(WorkloadStatistics, KeepsPairsAndRowsApart) {
  const Statistics statistics = measure(small_batch(), 5, 2);
  EXPECT_EQ(statistics.tokens, 4);
  EXPECT_EQ(statistics.pairs, 6);
  EXPECT_EQ(statistics.rows, 4);
  EXPECT_THAT(statistics.pairs_per_expert, ElementsAre(1, 1, 1, 1, 2));
  EXPECT_THAT(statistics.pairs_per_rank, ElementsAre(3, 3));
  EXPECT_THAT(statistics.rows_per_rank, ElementsAre(2, 2));
  EXPECT_DOUBLE_EQ(statistics.unused_share, 0.25);
  EXPECT_DOUBLE_EQ(statistics.unrouted_share, 0.25);
  EXPECT_DOUBLE_EQ(statistics.distinct_ranks_per_token, 1.0);
  EXPECT_DOUBLE_EQ(statistics.rank_pairs_max_over_mean, 1.0);
  EXPECT_DOUBLE_EQ(statistics.rank_rows_max_over_mean, 1.0);
  EXPECT_DOUBLE_EQ(statistics.expert_max_over_mean, 2 / 1.2);
  EXPECT_EQ(statistics.duplicate_pairs, 1);
  EXPECT_DOUBLE_EQ(statistics.top_fifth_share, 2.0 / 6);
  // Sum over places of (2 place - 6) * load over 5 * 6: (-4 - 2 + 0 + 2 + 8) / 30.
  EXPECT_DOUBLE_EQ(statistics.gini, 4.0 / 30);
  EXPECT_NEAR(statistics.entropy_bits, 4 * std::log2(6.0) / 6 + std::log2(3.0) / 3, 1e-12);
}

TEST(WorkloadStatistics, NothingRoutedGivesZeros) {
  Batch batch = small_batch();
  batch.experts.assign(8, -1);
  batch.weights.assign(8, 0);
  const Statistics statistics = measure(batch, 5, 2);
  EXPECT_EQ(statistics.pairs, 0);
  EXPECT_EQ(statistics.unused_share, 1.0);
  EXPECT_EQ(statistics.rank_rows_max_over_mean, 0);
  EXPECT_EQ(statistics.gini, 0);
  EXPECT_THAT(statistics.to_text(), HasSubstr("pairs 0"));
  Batch empty;
  empty.top_k = 2;
  EXPECT_EQ(measure(empty, 5, 2).unused_share, 0);
}

TEST(WorkloadStatistics, MoreRanksThanExpertsIsLegal) {
  EXPECT_THAT(measure(small_batch(), 5, 7).rows_per_rank, ElementsAre(1, 1, 1, 1, 1, 0, 0));
}

TEST(WorkloadStatistics, IdsOutOfRangeAreNamed) {
  try {
    measure(small_batch(), 4, 2);
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_EQ(error.code, ErrorCode::kArgument);
    EXPECT_THAT(error.what(), HasSubstr("batch.experts[3][0] = 4, allowed: -1..3"));
  }
}

TEST(WorkloadBatch, RanksHaveTheirSlices) {
  const Batch batch = small_batch();
  EXPECT_EQ(batch.num_ranks(), 2);
  EXPECT_EQ(batch.num_tokens(), 4);
  EXPECT_EQ(batch.first_token(1), 3);
  EXPECT_THAT(batch.experts_of(1), ElementsAre(4, 4));
  EXPECT_EQ(batch.weights_of(0).size(), 6U);
  const Batch cut = split(batch, 3);
  EXPECT_THAT(cut.tokens_per_rank, ElementsAre(2, 1, 1));
  EXPECT_EQ(cut.experts, batch.experts);
  EXPECT_THROW(split(batch, 0), Error);
}

// Integer arithmetic and exactly rounded operations only: these hold on every platform and compiler. A new number here
// means that recorded results and traces no longer belong to the profiles that they name.
TEST(WorkloadGenerate, NumbersStayWhatTheyWere) {
  const std::map<std::string, std::uint64_t> expected{
      {"uniform", 0x751821f9771d9330U},    {"balanced", 0xb139b128fc524e8dU},    {"lognormal:1.1", 0xec2a9fe49ba140ddU},
      {"maxvio:0.4", 0xb686f7a91c707f9fU}, {"sorted:1.1", 0xb04e5ec147fa697bU},  {"powerlaw:1.01", 0x091c13ed5b6df916U},
      {"powerlaw:1", 0x252607cb391223fcU}, {"zipf:1.0", 0xf2c3a402c4bbb31eU},    {"hot-rank:4", 0x525b2c52031ddfd0U},
      {"khot:4:0.9", 0x9d3a38772d07a3e4U}, {"grouped:8:4", 0xaf75368ab903363dU}, {"hash", 0x14c0461ed1e8b17aU},
      {"domain:8", 0xbb958630da6480e0U},   {"drop:0.1", 0x4dad66a7bec8cc22U},    {"ragged", 0x3e43655393ef3bbcU},
      {"eplb:288", 0xa99ec71fc4cca545U},   {"rotating:4", 0x06fcb8c461f7cd44U},  {"burst:3", 0x52283e6272874793U},
      {"duplicates", 0x264408d11143f112U},
  };
  for (const auto& [profile, digest] : expected) {
    Request request{parse_profile(profile)};
    request.seed = 12345;
    request.step = 8;
    request.num_ranks = 4;
    request.tokens_per_rank = 300;
    EXPECT_EQ(digest_of(generate(request)), digest) << profile;
  }
}

TEST(WorkloadModels, EveryPresetIsAShapeThatCanBeGenerated) {
  std::set<std::string_view> names;
  for (const ModelPreset& model : models()) {
    SCOPED_TRACE(model.name);
    EXPECT_TRUE(names.insert(model.name).second);
    EXPECT_EQ(&find_model(model.name), &model);
    EXPECT_EQ(model.name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789-."), std::string_view::npos);
    EXPECT_EQ(model.hidden % 8, 0);
    EXPECT_TRUE(model.expert_width > 0 || model.note.find("not known") != model.note.npos);
    Request request;
    request.num_experts = model.num_experts;
    request.top_k = model.top_k;
    request.num_ranks = 4;
    request.tokens_per_rank = 3;
    if (model.groups > 1) request.profile = {Kind::kGrouped, 0, model.groups, model.groups_kept};
    EXPECT_EQ(generate(request).num_tokens(), 12);
    EXPECT_EQ(TextWorkload::from_text("one two", {64, gate_of(model), 1}).route(0, std::vector<std::int64_t>{1}).top_k,
              model.top_k);
  }
  EXPECT_EQ(names.size(), 49U);
}

TEST(WorkloadModels, HaveTheNumbersOfTheTable) {
  const ModelPreset& model = find_model("deepseek-v3");
  EXPECT_EQ(model.hidden, 7168);
  EXPECT_EQ(model.num_experts, 256);
  EXPECT_EQ(model.top_k, 8);
  EXPECT_EQ(model.groups, 8);
  EXPECT_EQ(model.groups_kept, 4);
  EXPECT_EQ(find_model("gpt-oss-120b").hidden, 2880);
  EXPECT_EQ(find_model("nemotron-3-super").top_k, 22);
  EXPECT_THAT(std::string(find_model("deepseek-v2").note), HasSubstr("unverified"));
}

TEST(WorkloadModels, UnknownNamesListTheKnownOnes) {
  try {
    find_model("deepseek");
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_EQ(error.code, ErrorCode::kArgument);
    EXPECT_THAT(error.allowed, HasSubstr("deepseek-v3, "));
    EXPECT_THAT(error.allowed, HasSubstr("dots.llm1"));
  }
}

}  // namespace
}  // namespace anyep::workload
