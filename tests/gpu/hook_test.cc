// Between a call with a receive hook and its hook no SM is held: a kernel that needs all SMs, each for itself, takes as long as
// without. Were one block of ours still there, one of its blocks would have to wait for another to end, and it took twice as long.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include <anyep/plan.h>

#include "company.h"
#include "low_latency_rank.h"
#include "support/mirror.h"

namespace anyep::test {
namespace {

constexpr int kRounds = 21, kDepth = 40'000;
constexpr double kNoise = 1.03;  ///< of medians of kRounds times of some milliseconds

struct Times {
  std::vector<float> ms;
  void print(const char* name) const {
    std::printf("  %-34s %.3f ms (%.3f to %.3f)\n", name, static_cast<double>(median()),
                static_cast<double>(*std::min_element(ms.begin(), ms.end())),
                static_cast<double>(*std::max_element(ms.begin(), ms.end())));
  }
  float median() const {
    std::vector<float> sorted = ms;
    std::sort(sorted.begin(), sorted.end());
    return sorted[sorted.size() / 2];
  }
};

/// A kernel that needs all of this rank's GPU, timed.
class Everywhere {
 public:
  Everywhere() {
    load_company_kernels();
    must(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    for (cudaEvent_t& mark : marks_) must(cudaEventCreate(&mark));
    void* memory = nullptr;
    must(cudaMalloc(&memory, static_cast<std::size_t>(num_sms()) * 1024 * sizeof(float)));
    sums_ = static_cast<float*>(memory);
    (void)time();
  }
  ~Everywhere() {
    (void)cudaFree(sums_);
    for (const cudaEvent_t mark : marks_) (void)cudaEventDestroy(mark);
    (void)cudaStreamDestroy(stream_);
  }
  Everywhere(const Everywhere&) = delete;
  Everywhere& operator=(const Everywhere&) = delete;

  float time() {
    must(cudaEventRecord(marks_[0], stream_));
    compute_everywhere(kDepth, sums_, stream_);
    must(cudaEventRecord(marks_[1], stream_));
    must(cudaStreamSynchronize(stream_));
    float ms = 0;
    must(cudaEventElapsedTime(&ms, marks_[0], marks_[1]));
    return ms;
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaEvent_t marks_[2];
  float* sums_ = nullptr;
};

PairDraw decode_pair(int ranks) {
  PairDraw pair;
  pair.call.num_ranks = ranks;
  pair.call.num_experts = 32;
  pair.call.top_k = 8;
  pair.call.hidden = 7168;
  pair.call.max_tokens = 128;
  pair.call.wire = Wire::kFP8;
  for (int rank = 0; rank < ranks; ++rank) pair.call.tokens[rank] = 128;
  pair.dispatch_hook = pair.combine_hook = true;
  return pair;
}

TEST(GpuHook, HoldsNoSmUntilItIsCalled) {
  constexpr int kRanks = 2;
  if (num_gpus() < kRanks) GTEST_SKIP() << "needs two GPUs, one for each rank";
  const PairDraw pair = decode_pair(kRanks);
  with_threads(kRanks, [&](Bootstrap& bootstrap, int rank, std::barrier<>& all) {
    LowLatencyRank me(bootstrap, num_gpus(), {pair}, low_latency_bytes_for(pair.shape(), kRanks));
    Everywhere everywhere;
    Times alone, unanswered, dispatch, combine;
    const auto meet_ranks = [&] {
      finish(me.stream());  // a send half waits for no call of a peer
      all.arrive_and_wait();
    };
    for (int round = 0; round < kRounds; ++round) {
      alone.ms.push_back(everywhere.time());
      all.arrive_and_wait();
      const bool first = rank == round % kRanks;
      if (first) {  // the other has not called yet
        me.send_dispatch(pair);
        finish(me.stream());
        unanswered.ms.push_back(everywhere.time());
      }
      all.arrive_and_wait();
      if (!first) me.send_dispatch(pair);
      meet_ranks();
      dispatch.ms.push_back(everywhere.time());
      me.receive_dispatch();
      me.send_combine();
      meet_ranks();
      combine.ms.push_back(everywhere.time());
      me.receive_combine();
      const Findings found = me.look();
      EXPECT_EQ(found.wrong, 0u) << text_of(found);
      all.arrive_and_wait();
    }
    if (rank == 0) {
      alone.print("a full kernel alone");
      unanswered.print("beside a dispatch, peer not there");
      dispatch.print("beside a dispatch sent");
      combine.print("beside a combine sent");
    }
    for (const Times* times : {&unanswered, &dispatch, &combine}) {
      EXPECT_LT(times->median(), alone.median() * kNoise) << "rank " << rank;
    }
    all.arrive_and_wait();
    me.engine().close();
    all.arrive_and_wait();
  });
}

// The stream of the sends is held up, that of the hooks is free: were there nothing between them, a receive would run before its
// send, find the turn before, and wait for peers until it gave up.
TEST(GpuHook, WaitsForItsSendOnAnotherStream) {
  constexpr int kRanks = 2;
  constexpr std::uint64_t kHeldNs = 20'000'000;
  if (num_gpus() == 0) GTEST_SKIP() << "no GPU";
  const PairDraw pair = decode_pair(kRanks);
  with_threads(kRanks, [&](Bootstrap& bootstrap, int rank, std::barrier<>& all) {
    LowLatencyRank me(bootstrap, num_gpus(), {pair}, low_latency_bytes_for(pair.shape(), kRanks));
    load_company_kernels();
    cudaStream_t other = nullptr;
    must(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
    const SharedWords held[2];
    linger_small(1, kHeldNs, held[0].get(), me.stream());
    me.send_dispatch(pair);
    me.receive_dispatch(other);
    finish(other);
    EXPECT_NE(held[0].gave_up(), "") << "rank " << rank << ": received before it sent";
    linger_small(1, kHeldNs, held[1].get(), me.stream());
    me.send_combine();
    me.receive_combine(other);
    finish(other);
    EXPECT_NE(held[1].gave_up(), "") << "rank " << rank << ": received before it sent";
    const Findings found = me.look();
    EXPECT_EQ(found.wrong, 0u) << text_of(found);
    all.arrive_and_wait();
    me.engine().close();
    all.arrive_and_wait();
    must(cudaStreamDestroy(other));
  });
}

// The planted fault: something small stays.
TEST(GpuHook, OneBlockThatStaysIsSeen) {
  if (num_gpus() == 0) GTEST_SKIP() << "no GPU";
  must(cudaSetDevice(0));
  cudaStream_t stream = nullptr;
  must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const SharedWords words;
  Everywhere everywhere;
  Times alone, beside;
  for (int round = 0; round < kRounds; ++round) alone.ms.push_back(everywhere.time());
  linger_small(1, 5'000'000'000, words.get(), stream);
  words.await_started({1});
  for (int round = 0; round < kRounds; ++round) beside.ms.push_back(everywhere.time());
  words.stop();
  must(cudaStreamSynchronize(stream));
  EXPECT_EQ(words.gave_up(), "");
  alone.print("a full kernel alone");
  beside.print("beside one small block");
  EXPECT_GT(beside.median(), alone.median() * 1.5f);
  must(cudaStreamDestroy(stream));
}

}  // namespace
}  // namespace anyep::test
