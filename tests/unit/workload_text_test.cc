// Text as a workload: words, embeddings, and the gate against loops that follow its definition.
#include <anyep/error.h>
#include <anyep/workload.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "core/bfloat16.h"
#include "unit/workload_digest.h"
#include "workload/gate.h"
#include "workload/random.h"

namespace anyep::workload {
namespace {

using testing::HasSubstr;

std::string readme_like_text() {
  std::string text;
  Stream stream(9, Purpose::kWord, 0);
  for (int word = 0; word < 4000; ++word) {  // a Zipf-like vocabulary
    text += "word" + std::to_string(static_cast<int>(1 / stream.uniform()) % 500) + (word % 12 == 11 ? ".\n" : " ");
  }
  return text;
}

std::vector<std::uint16_t> embedding(const TextWorkload& text, std::int64_t token) {
  std::vector<std::uint16_t> out(static_cast<std::size_t>(text.hidden()));
  text.embed(token, out);
  return out;
}

double mean_square(const std::vector<std::uint16_t>& row) {
  double sum = 0;
  for (const std::uint16_t bits : row) sum += std::pow(static_cast<double>(core::float_of_bf16(bits)), 2);
  return sum / static_cast<double>(row.size());
}

TEST(WorkloadText, CutsWordsAndWrapsAround) {
  const TextWorkload text = TextWorkload::from_text("Hello, w\xc3\xb6rld_1!\n\n x", {});
  const std::vector<std::string> words{"Hello", ",", "w\xc3\xb6rld_1", "!", "x"};
  ASSERT_EQ(text.num_words(), 5);
  for (std::int64_t token = 0; token < 12; ++token)
    EXPECT_EQ(text.word(token), words[static_cast<std::size_t>(token % 5)]);
  EXPECT_EQ(embedding(text, 2), embedding(text, 7));
}

TEST(WorkloadText, EmbeddingsDependOnWordContextAndSeed) {
  const std::string words = "the cat saw the dog and the cat saw the dog again";
  const TextWorkload text = TextWorkload::from_text(words, {512, {}, 1});
  EXPECT_EQ(embedding(text, 2), embedding(text, 8));  // "saw" with the same neighbours on both sides
  EXPECT_NE(embedding(text, 0), embedding(text, 3));  // "the" elsewhere
  EXPECT_NE(embedding(text, 0), embedding(text, 1));
  EXPECT_NE(embedding(text, 0), embedding(TextWorkload::from_text(words, {512, {}, 2}), 0));
}

TEST(WorkloadText, EmbeddingsAreAboutStandardNormal) {
  const TextWorkload text = TextWorkload::from_text(readme_like_text(), {});
  double sum = 0;
  for (std::int64_t token = 0; token < 50; ++token) sum += mean_square(embedding(text, token));
  EXPECT_NEAR(sum / 50, 1, 0.1);
}

TEST(WorkloadText, AnyHiddenSizeIsServed) {
  for (const std::int64_t hidden : {1, 8, 63, 64, 65, 2880, 7168, 16384}) {
    const TextWorkload text = TextWorkload::from_text("a b c", {hidden, {}, 1});
    const std::vector<std::uint16_t> row = embedding(text, 1);
    if (hidden > 64) {
      EXPECT_NEAR(mean_square(row), 1, 0.6);
    }
    std::vector<std::uint16_t> wrong(static_cast<std::size_t>(hidden) + 1);
    EXPECT_THROW(text.embed(1, wrong), Error);
  }
}

TEST(WorkloadText, RoutesTheSameHoweverItIsCut) {
  const TextWorkload text = TextWorkload::from_text(readme_like_text(), {64, {}, 1});
  const Batch whole = text.route(0, std::vector<std::int64_t>{600});
  const Batch cut = text.route(0, std::vector<std::int64_t>{100, 0, 350, 150});
  EXPECT_EQ(whole.experts, cut.experts);
  EXPECT_EQ(whole.weights, cut.weights);
  const Batch later = text.route(100, std::vector<std::int64_t>{5});
  EXPECT_TRUE(std::equal(later.experts.begin(), later.experts.end(), cut.experts_of(2).begin()));
  EXPECT_EQ(text.route(text.num_words(), std::vector<std::int64_t>{600}).experts, whole.experts);
}

TEST(WorkloadText, ReachesFourGroupsAndWeightsSumToTheScaling) {
  const TextWorkload text = TextWorkload::from_text(readme_like_text(), {64, {}, 1});
  const Batch batch = text.route(0, std::vector<std::int64_t>{1024, 1024});
  for (std::size_t token = 0; token < 2048; ++token) {
    std::vector<std::int64_t> groups;
    float sum = 0;
    for (std::size_t slot = token * 8; slot < token * 8 + 8; ++slot) {
      groups.push_back(batch.experts[slot] / 32);
      sum += batch.weights[slot];
    }
    std::sort(groups.begin(), groups.end());
    ASSERT_LE(std::unique(groups.begin(), groups.end()) - groups.begin(), 4);
    ASSERT_NEAR(sum, 2.5, 1e-4);
  }
  const Statistics statistics = measure(batch, 256, 8);
  EXPECT_EQ(statistics.duplicate_pairs, 0);
  EXPECT_LE(statistics.distinct_ranks_per_token, 4);
  EXPECT_GT(statistics.expert_max_over_mean, 1.5);  // frequent words make popular experts
}

TEST(WorkloadText, NumbersStayWhatTheyWere) {
  const TextWorkload text = TextWorkload::from_text("expert parallelism, one token at a time", {96, {}, 5});
  EXPECT_EQ(digest_of(text.route(0, std::vector<std::int64_t>{8})), 0xce91de1e5ba8cac8U);
  std::uint64_t hash = 0;
  for (const std::uint16_t bits : embedding(text, 3)) hash = mix(hash, bits);
  EXPECT_EQ(hash, 0x2413613c78392ff8U);
}

TEST(WorkloadText, MissingAndEmptyFilesAreNamed) {
  const auto message = [](const std::vector<std::string>& paths) -> std::string {
    try {
      TextWorkload::load(paths, {});
    } catch (const Error& error) {
      EXPECT_EQ(error.code, ErrorCode::kArgument);
      return error.what();
    }
    return "nothing was thrown";
  };
  EXPECT_THAT(message({"/no/such/file"}), HasSubstr("/no/such/file"));
  EXPECT_THAT(message({"/dev/null"}), HasSubstr("/dev/null"));
  EXPECT_THAT(message({}), HasSubstr("none"));
  EXPECT_THAT(message({testing::TempDir()}), HasSubstr("a readable file"));
  const std::string page = std::string(ANYEP_SOURCE_DIR) + "/docs/trace_format.md";
  EXPECT_EQ(TextWorkload::load(std::vector<std::string>{page, page}, {}).num_words(),
            2 * TextWorkload::load(std::vector<std::string>{page}, {}).num_words());
}

TEST(WorkloadText, OptionsAreChecked) {
  const auto refuse = [](const TextWorkload::Options& options) {
    EXPECT_THROW(TextWorkload::from_text("a", options), Error);
  };
  refuse({0, {}, 1});
  refuse({64, {256, 0, 8, 4, 1}, 1});
  refuse({64, {256, 8, 7, 4, 1}, 1});
  refuse({64, {256, 8, 8, 9, 1}, 1});
  refuse({64, {64, 9, 8, 1, 1}, 1});  // one group of eight cannot hold nine
  refuse({64, {256, 8, 8, 4, 0}, 1});
  EXPECT_THROW(TextWorkload::from_text(" \n", {}), Error);
  EXPECT_THROW(TextWorkload::from_text("a", {}).word(-1), Error);
  EXPECT_THROW(TextWorkload::from_text("a", {}).route(0, std::vector<std::int64_t>{-1}), Error);
}

/// The definition, by sorting.
std::vector<std::int64_t> choose_by_sorting(const Gate& gate, const std::vector<float>& biased) {
  const std::size_t size = biased.size() / static_cast<std::size_t>(gate.groups);
  const auto order = [](std::vector<float> values) {
    std::vector<std::size_t> ids(values.size());
    std::iota(ids.begin(), ids.end(), std::size_t{0});
    std::stable_sort(ids.begin(), ids.end(), [&](std::size_t a, std::size_t b) { return values[a] > values[b]; });
    return ids;
  };
  std::vector<float> group_scores;
  for (std::size_t group = 0; group < static_cast<std::size_t>(gate.groups); ++group) {
    std::vector<float> members(biased.begin() + static_cast<std::ptrdiff_t>(group * size),
                               biased.begin() + static_cast<std::ptrdiff_t>((group + 1) * size));
    std::sort(members.begin(), members.end(), std::greater<>());
    group_scores.push_back(size == 1 ? members[0] : members[0] + members[1]);
  }
  std::vector<std::size_t> groups = order(group_scores);
  groups.resize(static_cast<std::size_t>(gate.groups_kept));
  std::vector<float> masked = biased;
  for (std::size_t expert = 0; expert < masked.size(); ++expert) {
    if (std::find(groups.begin(), groups.end(), expert / size) == groups.end()) masked[expert] = -1000;
  }
  std::vector<std::int64_t> chosen;
  for (const std::size_t expert : order(masked)) chosen.push_back(static_cast<std::int64_t>(expert));
  chosen.resize(static_cast<std::size_t>(gate.top_k));
  return chosen;
}

TEST(WorkloadGate, ChoosesAsDefined) {
  constexpr std::uint64_t kSeed = 3;
  for (const Gate& gate :
       {Gate{}, Gate{256, 8, 1, 1, 1.0F}, Gate{32, 4, 32, 16, 1.0F}, Gate{48, 6, 4, 2, 2.5F}, Gate{8, 8, 2, 2, 1.0F}}) {
    for (std::uint64_t round = 0; round < 300; ++round) {
      SCOPED_TRACE(testing::Message() << "seed " << kSeed << " round " << round << " experts " << gate.num_experts);
      Stream stream(kSeed, Purpose::kChoices, round);
      const auto size = static_cast<std::size_t>(gate.num_experts);
      std::vector<float> scores(size), bias(size), biased(size);
      for (std::size_t expert = 0; expert < size; ++expert) {
        // A coarse grid, so that equal values are frequent.
        scores[expert] = static_cast<float>(1 + stream.below(20)) / 32;
        bias[expert] = static_cast<float>(stream.below(5)) / 32;
        biased[expert] = scores[expert] + bias[expert];
      }
      std::vector<std::int64_t> ids(static_cast<std::size_t>(gate.top_k));
      std::vector<float> weights(ids.size());
      GateChooser(gate, bias).choose(scores, ids, weights);
      ASSERT_EQ(ids, choose_by_sorting(gate, biased));
      float sum = 0;
      for (const std::int64_t id : ids) sum += scores[static_cast<std::size_t>(id)];
      for (std::size_t choice = 0; choice < ids.size(); ++choice) {
        ASSERT_NEAR(weights[choice], scores[static_cast<std::size_t>(ids[choice])] / sum * gate.scaling, 1e-6);
      }
    }
  }
}

}  // namespace
}  // namespace anyep::workload
