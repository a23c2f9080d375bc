// Random requests, profile texts and documents: refused by name, or a batch with every promised property.
#include <anyep/error.h>
#include <anyep/workload.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "unit/workload_random_load.h"
#include "workload/profile.h"
#include "workload/trace.h"

namespace anyep::workload {
namespace {

using Random = std::mt19937_64;

std::int64_t between(Random& random, std::int64_t least, std::int64_t most) {
  return least + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(most - least + 1));
}

/// Mostly legal; sometimes a number is too small or too large.
Request random_request(Random& random) {
  Request request;
  const std::span<const Form> all = forms();
  const Form& form = all[random() % all.size()];
  request.profile.kind = form.kind;
  request.profile.value = static_cast<double>(random() % 400) / 100;
  if (form.kind == Kind::kDrop || form.kind == Kind::kHotExperts) request.profile.value /= 3.9;
  request.num_experts = static_cast<int>(between(random, 1, 12) * between(random, 1, 30));
  request.top_k = static_cast<int>(between(random, 0, 12));
  request.num_ranks = static_cast<int>(between(random, 1, 12));
  request.tokens_per_rank = between(random, -1, 40);
  request.seed = random();
  request.step = random() % 4 == 0 ? random() : random() % 20;
  request.profile.count = static_cast<int>(between(random, 0, 8));
  if (form.kind == Kind::kEplb) request.profile.count = request.num_experts + static_cast<int>(between(random, -3, 40));
  request.profile.kept = static_cast<int>(between(random, 0, 8));
  return request;
}

void expect_promises(const Request& request, const Batch& batch) {
  ASSERT_EQ(batch.num_ranks(), request.num_ranks);
  ASSERT_EQ(batch.top_k, request.top_k);
  const Statistics statistics = measure(batch, batch.num_experts, request.num_ranks);
  ASSERT_EQ(statistics.tokens, batch.num_tokens());
  if (request.profile.kind == Kind::kRagged) {
    for (const std::int64_t count : batch.tokens_per_rank) ASSERT_LE(count, request.tokens_per_rank);
  } else {
    ASSERT_EQ(statistics.tokens, request.num_ranks * request.tokens_per_rank);
  }
  if (request.profile.kind != Kind::kDuplicates) {
    ASSERT_EQ(statistics.duplicate_pairs, 0);
  }
  if (request.profile.kind != Kind::kDrop) {
    ASSERT_EQ(statistics.unused_share, 0);
  }
  ASSERT_LE(statistics.rows, statistics.pairs);
  ASSERT_GE(statistics.gini, -1e-12);
  ASSERT_LT(statistics.gini, 1);
  for (std::int64_t token = 0; token < batch.num_tokens(); ++token) {
    double sum = 0;
    bool used = false;
    for (std::int64_t slot = token * batch.top_k; slot < (token + 1) * batch.top_k; ++slot) {
      sum += static_cast<double>(batch.weights[static_cast<std::size_t>(slot)]);
      used = used || batch.experts[static_cast<std::size_t>(slot)] >= 0;
    }
    ASSERT_NEAR(sum, used ? 1 : 0, 1e-5);
  }
  ASSERT_EQ(parse_trace("copy", trace_text(batch)), batch);
  ASSERT_EQ(split(split(batch, 5), batch.num_ranks()).experts, batch.experts);
}

TEST(WorkloadProperties, RandomRequestsKeepTheirPromisesOrAreRefused) {
  const RandomLoad load(1500);
  Random random(load.seed);
  int refused = 0;
  for (int round = 0; round < load.rounds; ++round) {
    const Request request = random_request(random);
    SCOPED_TRACE(testing::Message() << "round " << round << ", " << to_text(request.profile) << ", experts "
                                    << request.num_experts << ", top-" << request.top_k << ", ranks "
                                    << request.num_ranks << ", tokens " << request.tokens_per_rank);
    try {
      const Batch batch = generate(request);
      ASSERT_NO_FATAL_FAILURE(expect_promises(request, batch));
      ASSERT_EQ(generate(request), batch);
    } catch (const Error& error) {
      ASSERT_EQ(error.code, ErrorCode::kArgument) << error.what();
      ++refused;
    }
  }
  EXPECT_LT(refused, load.rounds * 7 / 10);
  EXPECT_GT(refused, 0);
}

TEST(WorkloadProperties, RandomProfileTextsAreParsedBackOrRefused) {
  const RandomLoad load(20000);
  Random random(load.seed);
  int parsed = 0;
  for (int round = 0; round < load.rounds; ++round) {
    const std::span<const Form> all = forms();
    std::string text(all[random() % all.size()].name);
    for (std::uint64_t parameters = random() % 3; parameters > 0; --parameters) {
      text += ':';
      for (std::uint64_t letters = random() % 4 + 1; letters > 0; --letters) text += "00112345.:-e "[random() % 13];
    }
    if (random() % 8 == 0) text[random() % text.size()] = static_cast<char>(random());
    try {
      const Profile profile = parse_profile(text);
      ASSERT_EQ(parse_profile(to_text(profile)), profile) << text;
      ++parsed;
    } catch (const Error& error) {
      ASSERT_EQ(error.code, ErrorCode::kArgument) << text;
    }
  }
  EXPECT_GT(parsed, load.rounds / 20);
}

TEST(WorkloadProperties, RandomBytesAreATextOrHaveNoWords) {
  const RandomLoad load(300);
  Random random(load.seed);
  for (int round = 0; round < load.rounds; ++round) {
    std::string bytes(random() % 200, ' ');
    for (char& byte : bytes) byte = random() % 3 == 0 ? ' ' : static_cast<char>(random());
    try {
      const TextWorkload text = TextWorkload::from_text(bytes, {72, {32, 4, 4, 2, 1.0F}, load.seed});
      std::size_t letters = 0;
      for (std::int64_t token = 0; token < text.num_words(); ++token) letters += text.word(token).size();
      const auto is_space = [](char c) { return c == ' ' || (c >= '\t' && c <= '\r') || c == '\0'; };
      ASSERT_EQ(letters, bytes.size() - static_cast<std::size_t>(std::count_if(bytes.begin(), bytes.end(), is_space)));
      const Batch batch = text.route(static_cast<std::int64_t>(random() >> 1), std::vector<std::int64_t>{3, 0, 2});
      ASSERT_EQ(measure(batch, 32, 3).pairs, 20);
    } catch (const Error& error) {
      ASSERT_EQ(error.code, ErrorCode::kArgument) << error.what();
    }
  }
}

}  // namespace
}  // namespace anyep::workload
