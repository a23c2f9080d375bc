// Traces: what is written is read back to the bit, and nothing else is taken for a trace.
#include <anyep/error.h>
#include <anyep/workload.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <random>
#include <string>

#include "unit/workload_random_load.h"
#include "workload/trace.h"

namespace anyep::workload {
namespace {

using testing::HasSubstr;

class WorkloadTrace : public testing::Test {
 protected:
  void SetUp() override {
    const auto* info = testing::UnitTest::GetInstance()->current_test_info();
    path_ = testing::TempDir() + "anyep_trace_" + std::to_string(getpid()) + "_" + info->name();
  }
  void TearDown() override { std::filesystem::remove(path_); }

  void put(const std::string& text) const { std::ofstream(path_, std::ios::binary) << text; }
  /// The error of reading `text`, which names the file.
  std::string refusal(const std::string& text) const {
    try {
      parse_trace(path_, text);
    } catch (const Error& error) {
      EXPECT_EQ(error.code, ErrorCode::kArgument);
      EXPECT_THAT(error.argument, HasSubstr(path_));
      return error.what();
    }
    return "nothing was thrown";
  }

  std::string path_;
};

constexpr const char* kGood =
    "anyep-trace 1\n# by hand\nexperts 8\ntop_k 2\ntokens 2 0 1\nrows\n3:0.75 5:0.25\n0:0.5 -1:0\n7:1e-05 7:0.375\nend "
    "3\n";

std::string changed(const std::string& from, const std::string& to) {
  std::string text = kGood;
  const std::size_t place = text.find(from);
  EXPECT_NE(place, std::string::npos) << from;
  return text.replace(place, from.size(), to);
}

TEST_F(WorkloadTrace, IsReadBackToTheBit) {
  for (const char* profile : {"uniform", "drop:0.5", "ragged", "duplicates", "eplb:300"}) {
    Request request{parse_profile(profile)};
    request.num_ranks = 3;
    request.tokens_per_rank = 50;
    const Batch batch = generate(request);
    write_trace(path_, batch);
    EXPECT_EQ(read_trace(path_), batch) << profile;
  }
}

TEST_F(WorkloadTrace, IsReadAsDocumented) {
  put(kGood);
  const Batch batch = read_trace(path_);
  EXPECT_EQ(batch.num_experts, 8);
  EXPECT_EQ(batch.tokens_per_rank, (std::vector<std::int64_t>{2, 0, 1}));
  EXPECT_EQ(batch.experts, (std::vector<std::int64_t>{3, 5, 0, -1, 7, 7}));
  EXPECT_EQ(batch.weights, (std::vector<float>{0.75F, 0.25F, 0.5F, 0, 1e-5F, 0.375F}));
  EXPECT_EQ(batch.experts_of(2)[0], 7);
}

TEST_F(WorkloadTrace, TheDocumentedExampleIsValid) {
  std::ifstream file(std::string(ANYEP_SOURCE_DIR) + "/docs/trace_format.md");
  const std::string page{std::istreambuf_iterator<char>(file), {}};
  const std::size_t begin = page.find("```\n") + 4;
  put(page.substr(begin, page.find("```", begin) - begin));
  EXPECT_EQ(read_trace(path_).num_tokens(), 3);
}

TEST_F(WorkloadTrace, RefusesWhatIsWrongAndSaysWhere) {
  EXPECT_THAT(refusal(""), HasSubstr("line 1"));
  EXPECT_THAT(refusal("hello\n"), HasSubstr("line 1 = \"hello\""));
  EXPECT_THAT(refusal(changed("trace 1", "trace 2")), HasSubstr("line 1"));
  EXPECT_THAT(refusal(changed("experts 8\n", "")), HasSubstr("key experts"));
  EXPECT_THAT(refusal(changed("top_k 2\n", "")), HasSubstr("key top_k"));
  EXPECT_THAT(refusal(changed("tokens 2 0 1\n", "")), HasSubstr("key tokens"));
  EXPECT_THAT(refusal(changed("top_k 2", "top_k 2\ntop_k 2")), HasSubstr("line 5, key top_k"));
  EXPECT_THAT(refusal(changed("top_k 2", "topk 2")), HasSubstr("line 4 = \"topk 2\""));
  EXPECT_THAT(refusal(changed("experts 8", "experts -8")), HasSubstr("key experts = \"-8\""));
  EXPECT_THAT(refusal(changed("experts 8", "experts 0")), HasSubstr("allowed: 1..1048576"));
  EXPECT_THAT(refusal(changed("top_k 2", "top_k")), HasSubstr("key top_k = \"\""));
  EXPECT_THAT(refusal(changed("top_k 2", "top_k 33")), HasSubstr("allowed: 1..32"));
  EXPECT_THAT(refusal(changed("2 0 1", "2 -1 1")), HasSubstr("key tokens = \"-1\""));
  EXPECT_THAT(refusal(changed("2 0 1", "2  1")), HasSubstr("key tokens = \"\""));
  EXPECT_THAT(refusal(changed("2 0 1", "1099511627776 1099511627776")), HasSubstr("tokens (sum)"));
  EXPECT_THAT(refusal(changed("2 0 1", "2 0 1000000000")), HasSubstr("line 10"));
  EXPECT_THAT(refusal(changed("2 0 1", "2 0")), HasSubstr("\"end 2\""));
  EXPECT_THAT(refusal(changed("3:0.75", "8:0.75")), HasSubstr("line 7, id = \"8\", allowed: -1..7"));
  EXPECT_THAT(refusal(changed("3:0.75", "-2:0.75")), HasSubstr("line 7, id"));
  EXPECT_THAT(refusal(changed("3:0.75", "3:-0.75")), HasSubstr("line 7, weight"));
  EXPECT_THAT(refusal(changed("3:0.75", "3:nan")), HasSubstr("line 7, weight"));
  EXPECT_THAT(refusal(changed("3:0.75", "3:1e99")), HasSubstr("line 7, weight"));
  EXPECT_THAT(refusal(changed("3:0.75", "3:")), HasSubstr("line 7, weight"));
  EXPECT_THAT(refusal(changed("3:0.75", "3")), HasSubstr("line 7"));
  EXPECT_THAT(refusal(changed("-1:0", "-1:0.5")), HasSubstr("0 where the id is -1"));
  EXPECT_THAT(refusal(changed("3:0.75 5:0.25", "3:0.75")), HasSubstr("2 choices"));
  EXPECT_THAT(refusal(changed("3:0.75 5:0.25", "3:0.75 5:0.25 6:1")), HasSubstr("2 choices"));
  EXPECT_THAT(refusal(changed("3:0.75 5:0.25", "3:0.75  5:0.25")), HasSubstr("2 choices"));
  EXPECT_THAT(refusal(changed("end 3", "end 4")), HasSubstr("\"end 3\""));
  EXPECT_THAT(refusal(std::string(kGood) + "\n"), HasSubstr("nothing after"));
  EXPECT_THAT(refusal(changed("end 3\n", "end 3")), HasSubstr("cut"));
}

TEST_F(WorkloadTrace, EveryTruncationIsNoticed) {
  const std::string good = kGood;
  for (std::size_t length = 0; length < good.size(); ++length) {
    EXPECT_THAT(refusal(good.substr(0, length)), HasSubstr("read_trace")) << length;
  }
}

/// Random damage never crashes; what is still accepted is a batch that holds together.
TEST_F(WorkloadTrace, DamageIsRefusedOrHarmless) {
  const RandomLoad load(4000);
  std::mt19937_64 random(load.seed);
  Request request{parse_profile("drop:0.3")};
  request.num_ranks = 2;
  request.tokens_per_rank = 6;
  const std::string good = trace_text(generate(request));
  int refused = 0;
  for (int round = 0; round < load.rounds; ++round) {
    std::string text = good;
    for (std::uint64_t change = random() % 4 + 1; change > 0 && !text.empty(); --change) {
      const std::size_t place = random() % text.size();
      switch (random() % 5) {
        case 0:
          text[place] = static_cast<char>(random());
          break;
        case 1:
          text[place] = "0123456789 :.-e\n"[random() % 16];
          break;
        case 2:
          text.erase(place, random() % 8 + 1);
          break;
        case 3:
          text.insert(place, text.substr(random() % text.size(), random() % 20));
          break;
        default:
          text.resize(place + 1);
          break;
      }
    }
    try {
      const Batch batch = parse_trace("damaged", text);
      measure(batch, batch.num_experts, batch.num_ranks());
      ASSERT_EQ(parse_trace("damaged", trace_text(batch)), batch);
    } catch (const Error& error) {
      ASSERT_EQ(error.code, ErrorCode::kArgument) << error.what();
      ++refused;
    }
  }
  EXPECT_GT(refused, load.rounds / 2);
}

TEST_F(WorkloadTrace, FilesThatCannotBeOpenedAreNamed) {
  for (const std::string& path : {path_, testing::TempDir()}) {
    try {
      read_trace(path);
      ADD_FAILURE() << path;
    } catch (const Error& error) {
      EXPECT_EQ(error.code, ErrorCode::kArgument);
      EXPECT_THAT(error.what(), HasSubstr(path));
    }
  }
  try {
    write_trace(path_ + "/no/such/folder", generate({}));
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_EQ(error.code, ErrorCode::kResource);
    EXPECT_THAT(error.what(), HasSubstr("no/such/folder"));
  }
}

TEST_F(WorkloadTrace, MalformedBatchesAreNotWritten) {
  Request request;
  request.tokens_per_rank = 4;
  const Batch good = generate(request);
  const auto refuse = [&](auto change) {
    Batch batch = good;
    change(batch);
    EXPECT_THROW(write_trace(path_, batch), Error);
    EXPECT_FALSE(std::filesystem::exists(path_));
  };
  refuse([](Batch& batch) { batch.tokens_per_rank[0] = 5; });
  refuse([](Batch& batch) { batch.tokens_per_rank.clear(); });
  refuse([](Batch& batch) { batch.weights.pop_back(); });
  refuse([](Batch& batch) { batch.experts[3] = 256; });
  refuse([](Batch& batch) { batch.experts[3] = -1; });
  refuse([](Batch& batch) { batch.weights[3] = -1; });
  refuse([](Batch& batch) { batch.top_k = 0; });
  refuse([](Batch& batch) { batch.num_experts = -1; });
}

}  // namespace
}  // namespace anyep::workload
