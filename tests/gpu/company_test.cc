// Operations end while a kernel that stays holds most SMs of every GPU and kernels that wait for their like on other GPUs come
// and go, begun before them on one rank and after them on the next. The kernel that stays leaves when the operations have
// ended, not before: a launch that needed more SMs than are left would never end.
#include <anyep/plan.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "company.h"
#include "low_latency_rank.h"
#include "support/gpu_rank.h"
#include "support/mirror.h"

namespace anyep::test {
namespace {

constexpr int kBlocksOfOp = 16;  ///< of high throughput by default; low latency takes more
constexpr int kRingBlocks = 8, kOps = 40;
/// What the company leaves of a GPU: to a rank that has it for itself fewer SMs than an op has blocks, to several what they all
/// take, for then their blocks need room at a time (docs/gpu.md).
int sms_left(int ranks_on_gpu) {
  return ranks_on_gpu == 1 ? kBlocksOfOp - 4 : ranks_on_gpu * (kBlocksOfOp + kRingBlocks);
}
constexpr std::uint64_t kLimitNs = 15'000'000'000;

class GpuCompany : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (num_gpus() == 0) GTEST_SKIP() << "no GPU";
  }

  /// `op()` kOps times on every rank in that company, and wait_for_ops().
  template <class Op, class Wait>
  static void in_company(int rank, int ranks, const SharedWords& words, std::barrier<>& all, const Op& op,
                         const Wait& wait_for_ops) {
    const int gpus = std::min(num_gpus(), ranks);
    cudaStream_t stays = nullptr, ring = nullptr;
    must(cudaStreamCreateWithFlags(&stays, cudaStreamNonBlocking));
    must(cudaStreamCreateWithFlags(&ring, cudaStreamNonBlocking));
    load_company_kernels();
    const int held = num_sms() - sms_left((ranks + gpus - 1) / gpus);
    all.arrive_and_wait();
    if (rank < gpus) occupy(held, kLimitNs, words.get(), stays);
    words.await_started(static_cast<std::uint32_t>(held * gpus));
    for (int i = 0; i < kOps; ++i) {
      const auto round = static_cast<std::uint32_t>(i) + 1;
      const auto pass = [&] { pass_around(rank, ranks, kRingBlocks, round, kLimitNs, words.get(), ring); };
      const bool ring_first = (rank + i) % 2 == 0;
      if (ring_first) pass();
      op();
      if (!ring_first) pass();
    }
    wait_for_ops();
    finish(ring);
    all.arrive_and_wait();
    EXPECT_EQ(words.gave_up(), 0u) << "something waited to its limit";
    all.arrive_and_wait();
    words.stop();
    must(cudaStreamSynchronize(stays));
    must(cudaStreamDestroy(stays));
    must(cudaStreamDestroy(ring));
  }
};

TEST_P(GpuCompany, HighThroughputEnds) {
  const int ranks = GetParam();
  const SharedWords words;
  with_threads(ranks, [&](Bootstrap& bootstrap, int rank, std::barrier<>& all) {
    GpuRank me(bootstrap, std::chrono::seconds(10), num_gpus());
    EXPECT_EQ(me.exchange(), "");
    in_company(
        rank, ranks, words, all, [&] { EXPECT_EQ(me.exchange(), ""); }, [] {});
    all.arrive_and_wait();
    me.engine().close();
    all.arrive_and_wait();
  });
}

TEST_P(GpuCompany, LowLatencyEnds) {
  const int ranks = GetParam();
  DrawLimits limits;
  limits.num_ranks = ranks;
  std::mt19937_64 random(static_cast<std::uint64_t>(ranks));
  std::vector<PairDraw> pairs;
  std::int64_t bytes = 0;
  for (int i = 0; i < kOps; ++i) {
    pairs.push_back(draw_pair(random, limits));
    pairs.back().dispatch_sms = pairs.back().combine_sms = 0;
    bytes = std::max(bytes, low_latency_bytes_for(pairs.back().shape(), ranks));
  }
  const SharedWords words;
  with_threads(ranks, [&](Bootstrap& bootstrap, int rank, std::barrier<>& all) {
    LowLatencyRank me(bootstrap, num_gpus(), pairs, bytes);
    std::size_t next = 0;
    in_company(
        rank, ranks, words, all, [&] { EXPECT_EQ(me.put(&pairs[next++], 1), 1); },
        [&] {
          const Findings found = me.look();
          EXPECT_EQ(found.wrong, 0u) << text_of(found);
          EXPECT_EQ(found.pairs, static_cast<unsigned long long>(kOps));
        });
    all.arrive_and_wait();
    me.engine().close();
    all.arrive_and_wait();
  });
}

// The planted fault: a launch whose blocks wait for each other does not end in that company.
TEST(GpuCompanyFault, ALaunchThatNeedsAllItsBlocksDoesNotEnd) {
  if (num_gpus() == 0) GTEST_SKIP() << "no GPU";
  must(cudaSetDevice(0));
  const SharedWords words;
  cudaStream_t stays = nullptr, stream = nullptr;
  must(cudaStreamCreateWithFlags(&stays, cudaStreamNonBlocking));
  must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  load_company_kernels();
  const int held = num_sms() - sms_left(1);
  occupy(held, kLimitNs, words.get(), stays);
  words.await_started(static_cast<std::uint32_t>(held));
  meet(kBlocksOfOp, 100'000'000, words.get(), stream);
  must(cudaStreamSynchronize(stream));
  EXPECT_GT(words.gave_up(), 0u);
  words.stop();
  must(cudaStreamSynchronize(stays));
  must(cudaStreamDestroy(stays));
  must(cudaStreamDestroy(stream));
}

INSTANTIATE_TEST_SUITE_P(Ranks, GpuCompany, testing::Values(2, 4), testing::PrintToStringParamName());

}  // namespace
}  // namespace anyep::test
