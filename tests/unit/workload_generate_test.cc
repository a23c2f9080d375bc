// What every profile promises, and what each one is for.
#include <anyep/error.h>
#include <anyep/workload.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <string>
#include <vector>

namespace anyep::workload {
namespace {

using testing::HasSubstr;

const std::vector<std::string> kProfiles{"uniform",       "balanced", "lognormal:1.1", "maxvio:0.4", "sorted:1.1",
                                         "powerlaw:1.01", "zipf:1.0", "hot-rank:2",    "khot:4:0.9", "grouped:8:4",
                                         "hash",          "domain:8", "drop:0.1",      "ragged",     "eplb:288",
                                         "rotating:4",    "burst:3",  "duplicates"};

Request request_for(const std::string& profile, int num_ranks = 8, std::int64_t tokens_per_rank = 512) {
  Request request{parse_profile(profile)};
  request.num_ranks = num_ranks;
  request.tokens_per_rank = tokens_per_rank;
  return request;
}

Statistics realised(const Request& request) {
  const Batch batch = generate(request);
  return measure(batch, batch.num_experts, request.num_ranks);
}

std::string message_of(const Request& request) {
  try {
    generate(request);
  } catch (const Error& error) {
    EXPECT_EQ(error.code, ErrorCode::kArgument);
    return error.what();
  }
  return "nothing was thrown";
}

/// Those that look at num_ranks or cut tokens unevenly promise less.
std::vector<std::string> profiles_without_ranks() {
  std::vector<std::string> profiles = kProfiles;
  std::erase_if(profiles, [](const std::string& profile) {
    const Kind kind = parse_profile(profile).kind;
    return kind == Kind::kMaxVio || kind == Kind::kHotRank || kind == Kind::kEplb || kind == Kind::kRagged;
  });
  return profiles;
}

class EveryProfile : public testing::TestWithParam<std::string> {};
class ProfileWithoutRanks : public testing::TestWithParam<std::string> {};

TEST_P(EveryProfile, IsRepeatableAndDiffersBySeedAndStep) {
  const Request request = request_for(GetParam());
  const Batch batch = generate(request);
  EXPECT_EQ(batch, generate(request));
  Request other = request;
  other.seed = request.seed + 8;  // the same hot rank: other numbers must differ too
  EXPECT_NE(batch.weights, generate(other).weights);
  other = request;
  other.step = 1;
  EXPECT_NE(batch.weights, generate(other).weights);
}

TEST_P(EveryProfile, RowsAreDistinctInRangeAndWeighted) {
  for (const int top_k : {1, 3, 8, 22, 32}) {
    Request request = request_for(GetParam(), 8, 96);
    request.top_k = top_k;
    if (GetParam() == "hot-rank:2" && top_k == 32) request.profile.value = 1;  // 32 of 256 reach every rank
    if (GetParam() == "maxvio:0.4") request.profile.value = 0.1;
    const Batch batch = generate(request);
    ASSERT_EQ(batch.top_k, top_k);
    ASSERT_EQ(batch.experts.size(), static_cast<std::size_t>(batch.num_tokens() * top_k));
    ASSERT_EQ(batch.weights.size(), batch.experts.size());
    for (std::int64_t token = 0; token < batch.num_tokens(); ++token) {
      std::set<std::int64_t> seen;
      double sum = 0;
      bool used = false;
      for (std::int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
        const std::int64_t id = batch.experts[static_cast<std::size_t>(slot)];
        const float weight = batch.weights[static_cast<std::size_t>(slot)];
        sum += static_cast<double>(weight);
        ASSERT_EQ(weight > 0, id >= 0);
        if (id < 0) continue;
        used = true;
        ASSERT_LT(id, batch.num_experts);
        if (request.profile.kind != Kind::kDuplicates) {
          ASSERT_TRUE(seen.insert(id).second) << "expert " << id << " twice in token " << token;
        }
      }
      ASSERT_NEAR(sum, used ? 1.0 : 0.0, 1e-5);
    }
  }
}

TEST_P(ProfileWithoutRanks, TokensAreTheSameHoweverManyRanks) {
  const Batch one = generate(request_for(GetParam(), 1, 1536));
  for (const int num_ranks : {2, 3, 8}) {
    const Batch cut = generate(request_for(GetParam(), num_ranks, 1536 / num_ranks));
    EXPECT_EQ(one.experts, cut.experts) << num_ranks << " ranks";
    EXPECT_EQ(one.weights, cut.weights) << num_ranks << " ranks";
    EXPECT_EQ(split(one, num_ranks), cut);
  }
  const Batch shorter = generate(request_for(GetParam(), 1, 700));
  EXPECT_TRUE(std::equal(shorter.experts.begin(), shorter.experts.end(), one.experts.begin()));
  EXPECT_TRUE(std::equal(shorter.weights.begin(), shorter.weights.end(), one.weights.begin()));
}

TEST_P(EveryProfile, ServesAwkwardShapes) {
  struct Awkward {
    int num_experts, top_k, num_ranks;
    std::int64_t tokens;
  };
  for (const Awkward& shape : {Awkward{48, 3, 5, 7}, {60, 6, 7, 1}, {288, 8, 3, 0}, {896, 16, 6, 33}, {256, 1, 1, 5}}) {
    Request request = request_for(GetParam(), shape.num_ranks, shape.tokens);
    request.num_experts = shape.num_experts;
    request.top_k = shape.top_k;
    if (request.profile.kind == Kind::kGrouped) request.profile = {Kind::kGrouped, 0, 4, 2};
    if (request.profile.kind == Kind::kEplb) request.profile.count = shape.num_experts + 11;
    if (request.profile.kind == Kind::kMaxVio) request.profile.value = 0;
    if (request.profile.kind == Kind::kHotRank && shape.num_ranks == 1) continue;
    SCOPED_TRACE(testing::Message() << shape.num_experts << " experts on " << shape.num_ranks);
    const Statistics statistics = realised(request);
    if (request.profile.kind != Kind::kRagged) {
      EXPECT_EQ(statistics.tokens, shape.tokens * shape.num_ranks);
    }
    EXPECT_THAT(statistics.to_text(), HasSubstr("Gini"));
  }
}

TEST_P(EveryProfile, TextIsParsedBack) {
  const Profile profile = parse_profile(GetParam());
  EXPECT_EQ(parse_profile(to_text(profile)), profile);
}

std::string letters_of(const testing::TestParamInfo<std::string>& info) {
  std::string name = info.param;
  std::replace_if(
      name.begin(), name.end(), [](unsigned char c) { return std::isalnum(c) == 0; }, '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(All, EveryProfile, testing::ValuesIn(kProfiles), letters_of);
INSTANTIATE_TEST_SUITE_P(All, ProfileWithoutRanks, testing::ValuesIn(profiles_without_ranks()), letters_of);

TEST(WorkloadProfiles, UniformIsEvenAndReachesAsManyRanksAsPublished) {
  struct Target {
    int num_ranks;
    double distinct_ranks;
  };
  for (const Target& target : {Target{2, 1.99}, {4, 3.61}, {8, 5.3}}) {
    const Statistics statistics = realised(request_for("uniform", target.num_ranks, 8192 / target.num_ranks));
    EXPECT_NEAR(statistics.distinct_ranks_per_token, target.distinct_ranks, 0.05);
    EXPECT_LT(statistics.rank_rows_max_over_mean, 1.02);
    EXPECT_LT(statistics.rank_pairs_max_over_mean, 1.02);
    EXPECT_GT(statistics.entropy_bits, 7.98);
  }
}

TEST(WorkloadProfiles, BalancedIsExactlyEven) {
  for (const int num_ranks : {1, 2, 4, 8, 16}) {
    const Statistics statistics = realised(request_for("balanced", num_ranks, 256));
    EXPECT_EQ(statistics.rank_rows_max_over_mean, 1.0);
    EXPECT_EQ(statistics.rank_pairs_max_over_mean, 1.0);
    EXPECT_EQ(statistics.expert_max_over_mean, 1.0);
    EXPECT_NEAR(statistics.gini, 0, 1e-12);
    EXPECT_NEAR(statistics.entropy_bits, 8, 1e-9);
    EXPECT_EQ(statistics.distinct_ranks_per_token, std::min(8, num_ranks));
  }
}

TEST(WorkloadProfiles, MaxVioIsMet) {
  for (const double target : {0.1, 0.5, 1.56, 2.46}) {
    Request request = request_for("maxvio:0.1", 32, 2048);
    request.profile.value = target;
    for (request.seed = 1; request.seed <= 3; ++request.seed) {
      EXPECT_NEAR(realised(request).rank_pairs_max_over_mean - 1, target, 0.03 + 0.03 * target);
    }
  }
}

TEST(WorkloadProfiles, MaxVioOutOfReachIsRefused) {
  Request request = request_for("maxvio:3", 2);
  EXPECT_THAT(message_of(request), HasSubstr("maxvio:0 to"));
  request.num_ranks = 1;
  EXPECT_THAT(message_of(request), HasSubstr("on 1 rank"));
}

TEST(WorkloadProfiles, SortedPopularityIsWorseThanShuffled) {
  EXPECT_GT(realised(request_for("sorted:1.1")).rank_pairs_max_over_mean,
            2 * realised(request_for("lognormal:1.1")).rank_pairs_max_over_mean);
}

TEST(WorkloadProfiles, HotRankReceivesTheRatioOfRows) {
  for (const int num_ranks : {2, 3, 8}) {
    for (const double target : {1.0, 1.5, 2.0, 4.0, 7.0}) {
      Request request = request_for("hot-rank:1", num_ranks, 16384 / num_ranks);
      request.profile.value = target;
      request.seed = 4;
      const Statistics statistics = realised(request);
      const auto hot = static_cast<std::size_t>(request.seed % static_cast<std::uint64_t>(num_ranks));
      const auto hot_rows = static_cast<double>(statistics.rows_per_rank[hot]);
      const double others = (static_cast<double>(statistics.rows) - hot_rows) / (num_ranks - 1);
      EXPECT_NEAR(hot_rows / others, target, 0.05 * target) << num_ranks << " ranks";
    }
  }
}

TEST(WorkloadProfiles, HotRankOutOfReachIsRefused) {
  Request request = request_for("hot-rank:7", 64);
  request.top_k = 32;  // the hot rank has four experts, so the other 28 choices go elsewhere
  EXPECT_THAT(message_of(request), HasSubstr("hot-rank:1 to"));
  EXPECT_THAT(message_of(request_for("hot-rank:2", 1)), HasSubstr("2 ranks or more"));
}

TEST(WorkloadProfiles, HotExpertsTakeTheirShare) {
  Request request = request_for("khot:4:0.9");
  request.top_k = 4;
  const Statistics statistics = realised(request);
  std::vector<std::int64_t> load = statistics.pairs_per_expert;
  std::sort(load.rbegin(), load.rend());
  const double share =
      static_cast<double>(load[0] + load[1] + load[2] + load[3]) / static_cast<double>(statistics.pairs);
  EXPECT_NEAR(share, 0.9, 0.02);
  EXPECT_GT(statistics.rank_pairs_max_over_mean, 0.9 * 8 * 0.95);  // the four are neighbours: one rank
  request.top_k = 8;  // four hot experts can take half of eight distinct choices
  EXPECT_NEAR(realised(request).rank_pairs_max_over_mean, 0.5 * 8, 0.5);
}

TEST(WorkloadProfiles, GroupedReachesFourRanksOfEight) {
  const Batch batch = generate(request_for("grouped:8:4"));
  for (std::int64_t token = 0; token < batch.num_tokens(); ++token) {
    std::set<std::int64_t> groups;
    for (std::size_t slot = 0; slot < 8; ++slot)
      groups.insert(batch.experts[static_cast<std::size_t>(token) * 8 + slot] / 32);
    ASSERT_LE(groups.size(), 4U);
  }
}

TEST(WorkloadProfiles, HashSpikes) {
  const Statistics statistics = realised(request_for("hash"));
  EXPECT_GT(statistics.expert_max_over_mean, 2.0);
}

TEST(WorkloadProfiles, DomainsLoadSourcesDifferentlyAndChoicesStay) {
  const Batch batch = generate(request_for("domain:8"));
  double stayed = 0;
  for (std::size_t token = 1; token < 256; ++token) {
    for (std::size_t slot = 0; slot < 8; ++slot) {
      const auto before = batch.experts.begin() + static_cast<std::ptrdiff_t>((token - 1) * 8);
      stayed += std::find(before, before + 8, batch.experts[token * 8 + slot]) != before + 8 ? 1 : 0;
    }
  }
  EXPECT_GT(stayed / (255 * 8), 0.3);
  // Two ranks with 512 tokens each, two requests each: their popularities differ more than two samples of one would.
  const auto load_of = [&](int rank) {
    std::vector<double> load(256);
    for (const std::int64_t id : batch.experts_of(rank)) load[static_cast<std::size_t>(id)] += 1;
    return load;
  };
  const std::vector<double> first = load_of(0);
  const std::vector<double> second = load_of(5);
  double difference = 0;
  for (std::size_t expert = 0; expert < 256; ++expert) difference += std::fabs(first[expert] - second[expert]);
  EXPECT_GT(difference / (512 * 8), 0.6);
}

TEST(WorkloadProfiles, DropMeetsItsShareWithWholeTokens) {
  for (const double share : {0.0, 0.1, 0.5, 1.0}) {
    Request request = request_for("drop:0.1");
    request.profile.value = share;
    const Statistics statistics = realised(request);
    EXPECT_NEAR(statistics.unused_share, share, 0.015);
    EXPECT_GE(statistics.unrouted_share, 0.2 * share - 0.01);
  }
}

TEST(WorkloadProfiles, RaggedHasIdleRanksAndNeverTooMany) {
  std::set<std::int64_t> sizes;
  for (std::uint64_t step = 0; step < 50; ++step) {
    for (const int num_ranks : {1, 2, 7}) {
      Request request = request_for("ragged", num_ranks, 128);
      request.step = step;
      const Batch batch = generate(request);
      ASSERT_EQ(batch.num_ranks(), num_ranks);
      const auto [least, most] = std::minmax_element(batch.tokens_per_rank.begin(), batch.tokens_per_rank.end());
      ASSERT_LE(*most, 128);
      ASSERT_GT(*most, 0);
      if (num_ranks > 1) {
        ASSERT_EQ(*least, 0);
      }
      sizes.insert(*most);
    }
  }
  EXPECT_GT(sizes.size(), 20U);
}

TEST(WorkloadProfiles, EplbFlattensASkewedLoad) {
  Request request = request_for("eplb:288", 36, 512);
  const Statistics replicated = realised(request);
  EXPECT_LT(replicated.rank_pairs_max_over_mean - 1, 0.15);  // published after balancing: 0.115
  EXPECT_EQ(replicated.pairs_per_expert.size(), 288U);
  request.profile = parse_profile("lognormal:1.1");
  EXPECT_GT(realised(request).rank_pairs_max_over_mean - 1, 0.8);
  request.profile = parse_profile("eplb:200");
  EXPECT_THAT(message_of(request), HasSubstr("SLOTS at least 256"));
}

TEST(WorkloadProfiles, RotatingMovesAndBurstBursts) {
  Request request = request_for("rotating:4");
  const auto load_at = [&](std::uint64_t step) {
    request.step = step;
    return realised(request).pairs_per_expert;
  };
  const auto hottest = [](const std::vector<std::int64_t>& load) {
    return std::max_element(load.begin(), load.end()) - load.begin();
  };
  EXPECT_EQ(hottest(load_at(0)), hottest(load_at(3)));
  EXPECT_NE(hottest(load_at(3)), hottest(load_at(4)));
  request = request_for("burst:3");
  request.step = 1;
  const double calm = realised(request).expert_max_over_mean;
  request.step = 2;
  EXPECT_GT(realised(request).expert_max_over_mean, 2 * calm);
}

TEST(WorkloadProfiles, DuplicatesHappen) {
  Request request = request_for("duplicates");
  request.num_experts = 16;
  EXPECT_GT(realised(request).duplicate_pairs, 1000);
}

TEST(WorkloadRequest, NumbersOutOfRangeAreNamed) {
  const auto message_with = [](auto change) {
    Request request = request_for("uniform");
    change(request);
    return message_of(request);
  };
  EXPECT_THAT(message_with([](Request& r) { r.num_experts = 0; }), HasSubstr("num_experts = 0"));
  EXPECT_THAT(message_with([](Request& r) { r.top_k = 33; }), HasSubstr("top_k = 33, allowed: 1..32"));
  EXPECT_THAT(message_with([](Request& r) { r.num_experts = 4; }), HasSubstr("top_k = 8, allowed: 1..4"));
  EXPECT_THAT(message_with([](Request& r) { r.num_ranks = 0; }), HasSubstr("num_ranks = 0"));
  EXPECT_THAT(message_with([](Request& r) { r.tokens_per_rank = -1; }), HasSubstr("tokens_per_rank = -1"));
  EXPECT_THAT(message_with([](Request& r) { r.profile = {Kind::kDrop, 1.5}; }), HasSubstr("drop:P with 1.5"));
  EXPECT_THAT(message_with([](Request& r) { r.profile = {Kind::kZipf, std::nan("")}; }), HasSubstr("zipf:S"));
  EXPECT_THAT(message_with([](Request& r) { r.profile = parse_profile("grouped:7:2"); }), HasSubstr("divisors of 256"));
  EXPECT_THAT(message_with([](Request& r) { r.profile = parse_profile("khot:999:0.5"); }), HasSubstr("at most 256"));
}

TEST(WorkloadProfileText, GarbageIsRefusedWithTheForms) {
  for (const char* text : {"",
                           ":",
                           "unifrom",
                           "uniform:",
                           "uniform:1",
                           "lognormal",
                           "lognormal:",
                           "lognormal:x",
                           "lognormal:-1",
                           "lognormal:1e1",
                           "lognormal:1.1:2",
                           "lognormal: 1",
                           "lognormal:1.",
                           "lognormal:.5",
                           "lognormal:9",
                           "lognormal:nan",
                           "lognormal:inf",
                           "khot:4",
                           "khot:0:0.5",
                           "khot:4:1.1",
                           "khot:4.0:0.5",
                           "grouped:8:9",
                           "grouped:8",
                           "drop:2",
                           "eplb:0",
                           "rotating:0",
                           "rotating:",
                           "burst:1:2",
                           "hot-rank:0.5",
                           "Uniform",
                           " uniform",
                           "domain:99999999999999999999"}) {
    try {
      parse_profile(text);
      ADD_FAILURE() << "accepted: " << text;
    } catch (const Error& error) {
      EXPECT_EQ(error.code, ErrorCode::kArgument);
      EXPECT_EQ(error.got, "\"" + std::string(text) + "\"");
      EXPECT_THAT(error.allowed, HasSubstr("khot:N:F"));
    }
  }
}

TEST(WorkloadProfileText, HelpHasALinePerForm) {
  const std::string help = profile_help();
  EXPECT_EQ(std::count(help.begin(), help.end(), '\n'), static_cast<std::ptrdiff_t>(kProfiles.size()));
}

}  // namespace
}  // namespace anyep::workload
