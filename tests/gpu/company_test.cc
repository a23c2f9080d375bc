// Operations end while a kernel that stays holds most SMs of every GPU and kernels that wait for their like on other GPUs come
// and go, begun before them on one rank and after them on the next. The kernel that stays leaves when the operations have
// ended, not before: a launch that needed more SMs than are left would never end.
#include <anyep/plan.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "company.h"
#include "low_latency_rank.h"
#include "support/gpu_rank.h"
#include "support/mirror.h"

namespace anyep::test {
namespace {

constexpr int kBlocksOfOp = 16;  ///< of high throughput by default; low latency takes more, unless told otherwise
constexpr int kRingBlocks = 8, kOps = 40;
/// What the company leaves of a GPU: to a rank that has it for itself fewer SMs than an op has blocks, to several what they all
/// take, for then their blocks need room at a time (docs/gpu.md).
int sms_left(int ranks_on_gpu) {
  return ranks_on_gpu == 1 ? kBlocksOfOp - 4 : ranks_on_gpu * (kBlocksOfOp + kRingBlocks);
}
int num_sms_of(int gpu) {
  int count = 0;
  must(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, gpu));
  return count;
}
constexpr std::uint64_t kLimitNs = 15'000'000'000;

class GpuCompany : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (num_gpus() == 0) GTEST_SKIP() << "no GPU";
    const int gpus = std::min(num_gpus(), GetParam());
    ranks_on_gpu_ = (GetParam() + gpus - 1) / gpus;
    for (int gpu = 0; gpu < gpus; ++gpu) {
      held_.push_back(num_sms_of(gpu) - sms_left(ranks_on_gpu_));
      if (held_.back() < 1) GTEST_SKIP() << "GPU " << gpu << " has " << num_sms_of(gpu) << " SMs, none for company";
    }
  }

  int ranks_on_gpu_ = 1;
  std::vector<int> held_;  ///< by GPU: SMs that the company holds

  /// `op()` kOps times on every rank in that company, and wait_for_ops().
  template <class Op, class Wait>
  void in_company(int rank, const SharedWords& words, std::barrier<>& all, const Op& op,
                  const Wait& wait_for_ops) const {
    cudaStream_t stays = nullptr, ring = nullptr;
    must(cudaStreamCreateWithFlags(&stays, cudaStreamNonBlocking));
    must(cudaStreamCreateWithFlags(&ring, cudaStreamNonBlocking));
    load_company_kernels();
    all.arrive_and_wait();
    {
      const struct Leave {  // also where this rank fails: ending it waits for its GPU
        const SharedWords& words;
        ~Leave() { words.stop(); }
      } leave{words};
      const auto gpu = static_cast<std::size_t>(rank);  // rank r's is r mod their number
      if (gpu < held_.size()) occupy(held_[gpu], kLimitNs, words.get(), stays);
      words.await_started(held_);
      for (int i = 0; i < kOps; ++i) {
        const auto round = static_cast<std::uint32_t>(i) + 1;
        const auto pass = [&] { pass_around(rank, GetParam(), kRingBlocks, round, kLimitNs, words.get(), ring); };
        const bool ring_first = (rank + i) % 2 == 0;
        if (ring_first) pass();
        op();
        if (!ring_first) pass();
      }
      wait_for_ops();
      finish(ring);
      all.arrive_and_wait();
      EXPECT_EQ(words.gave_up(), "") << "waited to its limit";
      all.arrive_and_wait();
    }
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
        rank, words, all, [&] { EXPECT_EQ(me.exchange(), ""); }, [] {});
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
    pairs.back().dispatch_sms = pairs.back().combine_sms = ranks_on_gpu_ == 1 ? 0 : kBlocksOfOp;
    bytes = std::max(bytes, low_latency_bytes_for(pairs.back().shape(), ranks));
  }
  const SharedWords words;
  with_threads(ranks, [&](Bootstrap& bootstrap, int rank, std::barrier<>& all) {
    LowLatencyRank me(bootstrap, num_gpus(), pairs, bytes);
    // Once without company: a first launch may have to wait for the GPU, for local memory, say.
    for (const PairDraw& pair : pairs) EXPECT_EQ(me.put(&pair, 1), 1);
    EXPECT_EQ(me.look().wrong, 0u);
    std::size_t next = 0;
    in_company(
        rank, words, all, [&] { EXPECT_EQ(me.put(&pairs[next++], 1), 1); },
        [&] {
          const Findings found = me.look();
          EXPECT_EQ(found.wrong, 0u) << text_of(found);
          EXPECT_EQ(found.pairs, static_cast<unsigned long long>(2 * kOps));
        });
    all.arrive_and_wait();
    me.engine().close();
    all.arrive_and_wait();
  });
}

/// GPU 0 and company for it.
struct FirstGpu {
  FirstGpu() {
    must(cudaSetDevice(0));
    must(cudaStreamCreateWithFlags(&stays, cudaStreamNonBlocking));
    must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    load_company_kernels();
  }
  ~FirstGpu() {
    words.stop();
    (void)cudaStreamSynchronize(stays);
    (void)cudaStreamDestroy(stays);
    (void)cudaStreamDestroy(stream);
  }
  FirstGpu(const FirstGpu&) = delete;
  FirstGpu& operator=(const FirstGpu&) = delete;

  const SharedWords words;
  cudaStream_t stays = nullptr, stream = nullptr;
};

// The planted fault: a launch whose blocks wait for each other does not end in that company.
TEST(GpuCompanyFault, ALaunchThatNeedsAllItsBlocksDoesNotEnd) {
  if (num_gpus() == 0) GTEST_SKIP() << "no GPU";
  const FirstGpu gpu;
  const int held = num_sms() - sms_left(1);
  if (held < 1) GTEST_SKIP() << "GPU 0 has " << num_sms() << " SMs, none for company";
  occupy(held, kLimitNs, gpu.words.get(), gpu.stays);
  gpu.words.await_started({held});
  meet(kBlocksOfOp, 100'000'000, gpu.words.get(), gpu.stream);
  must(cudaStreamSynchronize(gpu.stream));
  EXPECT_EQ(gpu.words.gave_up(), "meet");
}

// Blocks of company share no SM: of one more than there are SMs, one does not start, and that is said.
TEST(GpuCompanyFault, ABlockWithoutAnSmIsMissed) {
  if (num_gpus() == 0) GTEST_SKIP() << "no GPU";
  const FirstGpu gpu;
  const int sms = num_sms();
  occupy(sms + 1, kLimitNs, gpu.words.get(), gpu.stays);
  std::string said;
  try {
    gpu.words.await_started({sms + 1});
  } catch (const std::runtime_error& error) {
    said = error.what();
  }
  EXPECT_EQ(said, "the company has not started: GPU 0: " + std::to_string(sms) + " of " + std::to_string(sms + 1) +
                      " blocks");
}

TEST(CompanyWords, MissingBlocksAreCountedByGpu) {
  const auto words = std::make_unique<CompanyWords>();
  for (int block = 0; block < 5; ++block) words->started[0][block] = 1;
  words->started[1][0] = words->started[1][2] = 1;
  EXPECT_EQ(missing(*words, {5, 3}), " GPU 0: 5 of 5 blocks, GPU 1: 2 of 3 blocks");
  words->started[1][1] = 1;
  EXPECT_EQ(missing(*words, {5, 3}), "");
}

INSTANTIATE_TEST_SUITE_P(Ranks, GpuCompany, testing::Values(2, 4), testing::PrintToStringParamName());

}  // namespace
}  // namespace anyep::test
