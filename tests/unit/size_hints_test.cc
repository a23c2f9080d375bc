// Every number comes from the contract of the V1 facade, sections 4.1 to 4.5.
#include <anyep/config.h>
#include <gmock/gmock.h>

#include <cstdint>
#include <limits>
#include <tuple>

#include "thrown.h"

namespace anyep::v1 {
namespace {

using test::thrown;
using ::testing::HasSubstr;

constexpr std::int64_t kRowBytes = 7168 * 2;
constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max();

auto fields(const Config& config) {
  return std::tuple(config.num_sms, config.nvl_send, config.nvl_recv, config.rdma_send, config.rdma_recv);
}

TEST(SizeHintsTest, RdmaQueueIsRoundedUpToWholeSends) {
  EXPECT_EQ(make_config(20, 6, 256, 6, 256).rdma_recv, 258);
  EXPECT_EQ(make_config(20, 6, 256, 20, 128).rdma_recv, 140);
  EXPECT_EQ(make_config(20, 6, 256, 12, 128).rdma_recv, 132);
  EXPECT_EQ(make_config(20, 6, 256, 8, 128).rdma_recv, 128);
}

TEST(SizeHintsTest, ConfigChecksAreThoseOfV1) {
  EXPECT_NO_THROW(make_config(0, 1, 2, 1, 2));
  EXPECT_NO_THROW(make_config(21, 6, 256, 6, 256));
  EXPECT_EQ(thrown([] { make_config(-1, 6, 256, 6, 256); }).argument, "num_sms");
  EXPECT_EQ(thrown([] { make_config(20, 0, 256, 6, 256); }).argument, "nvl_send");
  EXPECT_EQ(thrown([] { make_config(20, 6, 6, 6, 256); }).argument, "nvl_recv");
  EXPECT_EQ(thrown([] { make_config(20, 6, 256, 0, 256); }).argument, "rdma_send");
  EXPECT_EQ(thrown([] { make_config(20, 6, 256, 6, 0); }).argument, "rdma_recv");
  EXPECT_EQ(thrown([] { make_config(20, 6, 256, 6, 6); }).argument, "rdma_recv");
  EXPECT_EQ(thrown([] { make_config(20, 6, 256, 6, std::numeric_limits<int>::max()); }).argument, "rdma_recv");
  EXPECT_EQ(thrown([] { make_config(20, 6, 256, 6, 6); }).code, ErrorCode::kArgument);
}

TEST(SizeHintsTest, DefaultTablesGiveTheListedNumbers) {
  EXPECT_EQ(fields(dispatch_config(2)), std::tuple(20, 24, 256, 6, 132));
  EXPECT_EQ(fields(dispatch_config(4, 24)), std::tuple(24, 6, 256, 6, 132));
  EXPECT_EQ(fields(dispatch_config(16)), std::tuple(20, 36, 288, 20, 140));
  EXPECT_EQ(fields(dispatch_config(96)), std::tuple(20, 20, 480, 12, 132));
  EXPECT_EQ(fields(dispatch_config(128)), std::tuple(20, 20, 560, 12, 132));
  EXPECT_EQ(fields(dispatch_config(144)), std::tuple(20, 32, 720, 12, 132));
  EXPECT_EQ(fields(dispatch_config(160)), std::tuple(20, 28, 720, 12, 132));
  EXPECT_EQ(fields(combine_config(2)), std::tuple(20, 10, 256, 6, 132));
  EXPECT_EQ(fields(combine_config(4)), std::tuple(20, 9, 256, 6, 132));
  EXPECT_EQ(fields(combine_config(8)), std::tuple(20, 4, 256, 6, 132));
  EXPECT_EQ(fields(combine_config(16)), std::tuple(20, 4, 288, 12, 132));
  EXPECT_EQ(fields(combine_config(64)), std::tuple(20, 1, 288, 8, 128));
  EXPECT_EQ(fields(combine_config(96)), std::tuple(20, 1, 480, 8, 128));
  EXPECT_EQ(fields(combine_config(128)), std::tuple(20, 1, 560, 8, 128));
  EXPECT_EQ(fields(combine_config(144)), std::tuple(20, 2, 720, 8, 128));
}

TEST(SizeHintsTest, TwentyFourToSixtyFourRanksShareTheirEntries) {
  for (const int num_ranks : {24, 32, 48, 64}) {
    EXPECT_EQ(fields(dispatch_config(num_ranks)), std::tuple(20, 32, 288, 8, 128)) << num_ranks;
    EXPECT_EQ(fields(combine_config(num_ranks)), std::tuple(20, 1, 288, 8, 128)) << num_ranks;
  }
}

TEST(SizeHintsTest, UnlistedRankCountsTakeTheEntryBelow) {
  EXPECT_EQ(fields(dispatch_config(1)), fields(dispatch_config(2)));
  EXPECT_EQ(fields(dispatch_config(7)), fields(dispatch_config(4)));
  EXPECT_EQ(fields(combine_config(95)), fields(combine_config(64)));
  EXPECT_EQ(fields(combine_config(1000)), fields(combine_config(160)));
  EXPECT_EQ(thrown([] { dispatch_config(0); }).argument, "num_ranks");
  EXPECT_EQ(thrown([] { combine_config(-4); }).got, "-4");
}

TEST(SizeHintsTest, NvlHintMatchesTheWorkedNumbers) {
  const std::tuple<int, std::int64_t> expected[] = {{1, 41'963'776},   {2, 83'927'552},   {4, 167'854'976},
                                                    {8, 335'709'824},  {16, 377'673'984}, {32, 377'675'264},
                                                    {64, 377'677'824}, {160, 944'193'024}};
  for (const auto& [num_ranks, bytes] : expected) {
    EXPECT_EQ(nvl_size_hint(dispatch_config(num_ranks), kRowBytes, num_ranks), bytes) << num_ranks;
    EXPECT_EQ(nvl_size_hint(combine_config(num_ranks), kRowBytes, num_ranks), bytes) << num_ranks;
  }
  EXPECT_EQ(nvl_size_hint(dispatch_config(4, 24), 4096 * 2, 4), 125'928'448);
  EXPECT_EQ(nvl_size_hint(dispatch_config(4), 2880 * 2, 4), 80'036'736);
}

TEST(SizeHintsTest, RdmaHintMatchesTheWorkedNumbers) {
  const std::tuple<int, std::int64_t, std::int64_t> expected[] = {{1, 0, 0},
                                                                  {8, 0, 0},
                                                                  {16, 91'887'744, 86'637'184},
                                                                  {32, 168'023'680, 168'023'680},
                                                                  {64, 336'047'360, 336'047'360},
                                                                  {160, 866'371'200, 840'118'400}};
  for (const auto& [num_ranks, dispatch, combine] : expected) {
    EXPECT_EQ(rdma_size_hint(dispatch_config(num_ranks), kRowBytes, num_ranks), dispatch) << num_ranks;
    EXPECT_EQ(rdma_size_hint(combine_config(num_ranks), kRowBytes, num_ranks), combine) << num_ranks;
  }
}

TEST(SizeHintsTest, NarrowIdsTakeHalfTheirSpace) {
  const std::int64_t slots = 10 * 4 * 256;
  const std::int64_t saved = slots * 128 * 4;
  EXPECT_EQ(nvl_size_hint(dispatch_config(4), kRowBytes, 4) - nvl_size_hint(dispatch_config(4), kRowBytes, 4, 4),
            saved);
  EXPECT_EQ(thrown([] { nvl_size_hint(dispatch_config(4), kRowBytes, 4, 2); }).allowed, "4, 8");
}

TEST(SizeHintsTest, AConfigThatWasNotRoundedIsRounded) {
  const Config given{20, 6, 256, 6, 256};
  EXPECT_EQ(rdma_size_hint(given, kRowBytes, 16), rdma_size_hint(make_config(20, 6, 256, 6, 258), kRowBytes, 16));
}

TEST(SizeHintsTest, LowLatencyHintMatchesTheWorkedNumbers) {
  const std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t> expected[] = {
      {128, 7168, 256, 1'908'410'496}, {64, 2048, 128, 136'316'032},    {256, 7168, 384, 5'725'228'160},
      {96, 4096, 160, 511'182'208},    {384, 6144, 320, 6'134'172'288}, {128, 7168, 288, 2'146'961'792},
      {128, 3584, 896, 3'339'721'856}, {128, 2880, 128, 383'517'824},   {2048, 5120, 448, 38'168'170'112}};
  for (const auto& [max_tokens, hidden, num_experts, bytes] : expected) {
    EXPECT_EQ(low_latency_size_hint(max_tokens, hidden, 8, num_experts), bytes) << max_tokens << " " << hidden;
    EXPECT_EQ(low_latency_size_hint(max_tokens, hidden, 1, num_experts), bytes) << "ranks do not enter";
  }
}

TEST(SizeHintsTest, LowLatencyHintAlwaysGrowsByTheLastStep) {
  // No tokens: total = 2 * up128(4 * 32) = 256, a multiple of 128 already.
  EXPECT_EQ(low_latency_size_hint(0, 128, 4, 32), 384);
}

TEST(SizeHintsTest, WhatSixtyFourBitsDoNotHoldIsRefused) {
  const Error error = thrown([] { low_latency_size_hint(std::int64_t{1} << 40, 7168, 8, std::int64_t{1} << 20); });
  EXPECT_EQ(error.code, ErrorCode::kArgument);
  EXPECT_EQ(error.op, "low_latency_size_hint");
  EXPECT_EQ(error.argument, "max_tokens, hidden, num_experts");
  EXPECT_EQ(error.got, "1099511627776, 7168, 1048576");
  EXPECT_THAT(error.what(), HasSubstr("less than 2^63 bytes"));
  EXPECT_EQ(thrown([] { low_latency_size_hint(128, kHuge, 8, 256); }).code, ErrorCode::kArgument);
  EXPECT_EQ(thrown([] { low_latency_size_hint(kHuge, 1, 8, 1); }).code, ErrorCode::kArgument);
  EXPECT_EQ(thrown([] { low_latency_size_hint(0, 128, 8, kHuge); }).code, ErrorCode::kArgument);
  EXPECT_EQ(thrown([] { nvl_size_hint({}, kHuge, 8); }).code, ErrorCode::kArgument);
  EXPECT_EQ(thrown([] { nvl_size_hint({}, kHuge / 1000, 8); }).code, ErrorCode::kArgument);
  EXPECT_EQ(thrown([] { rdma_size_hint({}, kHuge / 1000, 16); }).code, ErrorCode::kArgument);
}

TEST(SizeHintsTest, LargeHintsAreExact) {
  // Both message areas hold 256 * 2^30 messages of 14,560 bytes; the signals take 1,024; all of it twice, then the last
  // step.
  const std::int64_t expected = 4 * (std::int64_t{256} << 30) * 14'560 + 2'048 + 128;
  EXPECT_EQ(low_latency_size_hint(std::int64_t{1} << 30, 7168, 8, 256), expected);
}

TEST(SizeHintsTest, NegativeNumbersAreRefusedByName) {
  EXPECT_EQ(thrown([] { low_latency_size_hint(-1, 7168, 8, 256); }).argument, "max_tokens");
  EXPECT_EQ(thrown([] { low_latency_size_hint(1, 0, 8, 256); }).argument, "hidden");
  EXPECT_EQ(thrown([] { low_latency_size_hint(1, 7168, 0, 256); }).argument, "num_ranks");
  EXPECT_EQ(thrown([] { low_latency_size_hint(1, 7168, 8, 0); }).argument, "num_experts");
  EXPECT_EQ(thrown([] { nvl_size_hint({}, -1, 8); }).argument, "hidden_bytes");
  EXPECT_EQ(thrown([] { rdma_size_hint({}, 16, 0); }).argument, "num_ranks");
}

}  // namespace
}  // namespace anyep::v1
