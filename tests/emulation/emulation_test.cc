// What the emulated GPUs promise: that kernels run right on them, that wrong ones can go wrong, that impossible ones are named.
#include <cuda_runtime.h>
#include <gmock/gmock.h>
#include <unistd.h>

#include <vector>

#include "cuda/device/bulk.cuh"
#include "cuda/device/mbarrier.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/runtime/launch.h"
#include "protocol/platform.h"

namespace anyep::test {
namespace {

using cuda::Kernel;
using cuda::LaunchShape;
namespace ptx = cuda::ptx;

class EmulationTest : public testing::Test {
 protected:
  void SetUp() override { (void)cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking); }
  void TearDown() override {
    (void)cudaStreamDestroy(stream_);
    for (void* memory : memories_) (void)cudaFree(memory);
  }

  template <class T>
  T* memory(std::size_t count, int fill = 0) {
    T* pointer = nullptr;
    (void)cudaMalloc(&pointer, count * sizeof(T));
    (void)cudaMemset(pointer, fill, count * sizeof(T));
    memories_.push_back(pointer);
    return pointer;
  }
  void run(const auto& kernel, LaunchShape shape, const auto& params) {
    shape.stream = stream_;
    kernel(shape, params);
    (void)cudaStreamSynchronize(stream_);
  }

  cudaStream_t stream_ = nullptr;

 private:
  std::vector<void*> memories_;
};
using EmulationDeathTest = EmulationTest;

struct Words {
  std::uint32_t* at;
};

void collectives(Words p) {
  const unsigned lane = threadIdx.x % 32, all = 0xFFFF'FFFFu;
  std::uint32_t* const at = p.at + threadIdx.x * 10;
  at[0] = __shfl_sync(all, threadIdx.x, 5);
  at[1] = __shfl_xor_sync(all, threadIdx.x, 16);
  at[2] = __shfl_up_sync(all, threadIdx.x, 3);
  at[3] = __ballot_sync(all, lane % 3 == 0);
  at[4] = static_cast<std::uint32_t>(__any_sync(all, lane == 7)) +
          2 * static_cast<std::uint32_t>(__all_sync(all, lane < 31));
  at[5] = __match_any_sync(all, lane / 4);
  at[6] = __reduce_add_sync(all, lane);
  at[7] = __reduce_max_sync(all, threadIdx.x);
  // Half a warp on its own.
  if (lane < 16) at[8] = __shfl_down_sync(0xFFFFu, lane, 1);
  __syncwarp();
  at[9] = static_cast<std::uint32_t>(__syncthreads_or(threadIdx.x == 40)) +
          2 * static_cast<std::uint32_t>(__syncthreads_and(threadIdx.x != 40));
}

TEST_F(EmulationTest, LanesAndThreadsFindTheSameTogether) {
  auto* const words = memory<std::uint32_t>(64 * 10);
  run(Kernel<Words>(collectives, "collectives"), {.blocks = 1, .threads = 64}, Words{words});
  for (std::uint32_t thread = 0; thread < 64; ++thread) {
    const std::uint32_t lane = thread % 32, warp = thread - lane, *const at = words + thread * 10;
    EXPECT_EQ(at[0], warp + 5);
    EXPECT_EQ(at[1], thread ^ 16u);
    EXPECT_EQ(at[2], lane < 3 ? thread : thread - 3);
    EXPECT_EQ(at[3], 0x49249249u);
    EXPECT_EQ(at[4], 1u);
    EXPECT_EQ(at[5], 0xFu << lane / 4 * 4);
    EXPECT_EQ(at[6], 496u);
    EXPECT_EQ(at[7], warp + 31);
    if (lane < 15) EXPECT_EQ(at[8], lane + 1);
    EXPECT_EQ(at[9], 1u);
  }
}

// Warp 0 writes and arrives, warp 1 waits and reads; then the other way, by another barrier.
void hand_over(Words p) {
  __shared__ std::uint32_t shared[32];
  const unsigned lane = threadIdx.x % 32;
  for (std::uint32_t round = 0; round < 20; ++round) {
    if (threadIdx.x < 32) {
      shared[lane] = round * 100 + lane;
      ptx::barrier_arrive(1, 64);
      ptx::barrier_sync(2, 64);
    } else {
      ptx::barrier_sync(1, 64);
      p.at[round * 32 + lane] = shared[31 - lane];
      ptx::barrier_arrive(2, 64);
    }
  }
}

TEST_F(EmulationTest, NamedBarriersOrderWhatComesBefore) {
  auto* const words = memory<std::uint32_t>(20 * 32);
  run(Kernel<Words>(hand_over, "hand_over"), {.blocks = 1, .threads = 64}, Words{words});
  for (std::uint32_t i = 0; i < 20 * 32; ++i) EXPECT_EQ(words[i], i / 32 * 100 + 31 - i % 32);
}

struct Copies {
  const std::byte* from;
  std::byte* to;
  bool waits;
};
constexpr std::uint32_t kPieceBytes = 1024, kPieces = 8;

// Through one slot: without the wait, a piece can overwrite the one before that is not yet stored.
void through_one_slot(Copies p) {
  std::byte* const slot = ptx::dynamic_shared<128>();
  __shared__ std::uint64_t loaded;
  if (threadIdx.x != 0) return;
  cuda::mbarrier::init(&loaded, 1);
  for (std::uint32_t piece = 0; piece < kPieces; ++piece) {
    if (p.waits) cuda::bulk::wait_source_reusable<0>();
    cuda::mbarrier::expect(loaded, kPieceBytes);
    cuda::bulk::load(slot, p.from + piece * kPieceBytes, kPieceBytes, loaded);
    cuda::mbarrier::wait(loaded, piece & 1);
    cuda::bulk::store(p.to + piece * kPieceBytes, slot, kPieceBytes);
    cuda::bulk::commit();
  }
  cuda::bulk::wait_delivered<0>();
}

TEST_F(EmulationTest, BulkCopiesNeedTheirWaits) {
  auto* const from = memory<std::byte>(kPieces * kPieceBytes);
  auto* const to = memory<std::byte>(kPieces * kPieceBytes);
  for (std::uint32_t i = 0; i < kPieces * kPieceBytes; ++i) from[i] = static_cast<std::byte>(i / kPieceBytes + 1);
  const Kernel<Copies> kernel(through_one_slot, "through_one_slot");
  const LaunchShape shape{.blocks = 1, .threads = 32, .shared_bytes = kPieceBytes};
  int wrong = 0;
  for (int round = 0; round < 50; ++round) {
    run(kernel, shape, Copies{from, to, true});
    ASSERT_EQ(std::memcmp(from, to, kPieces * kPieceBytes), 0);
    run(kernel, shape, Copies{from, to, false});
    wrong += std::memcmp(from, to, kPieces * kPieceBytes) != 0 ? 1 : 0;
  }
  EXPECT_GT(wrong, 0) << "nothing went wrong without the wait";
}

void count_badly(Words p) {
  for (int i = 0; i < 100; ++i) {
    const std::uint32_t seen = *static_cast<volatile std::uint32_t*>(p.at);
    if (seen == 0xFFFF'FFFFu) return;  // a place where threads may take turns
    *static_cast<volatile std::uint32_t*>(p.at) = seen + 1;
  }
}
void count_well(Words p) {
  for (int i = 0; i < 100; ++i) atomicAdd(p.at, 1u);
}

TEST_F(EmulationTest, ThreadsTakeTurnsWhereverTheyLike) {
  auto* const word = memory<std::uint32_t>(1);
  run(Kernel<Words>(count_well, "count_well"), {.blocks = 4, .threads = 64}, Words{word});
  EXPECT_EQ(*word, 4u * 64 * 100);
  *word = 0;
  run(Kernel<Words>(count_badly, "count_badly"), {.blocks = 4, .threads = 64}, Words{word});
  EXPECT_LT(*word, 4u * 64 * 100) << "no update was lost";
}

// The first launch ends only when the second has begun: only an early one can help it.
void waits_for_next(Words p) {
  ptx::grid_dependents_launch();
  while (protocol::Shared(p.at[0]).load(protocol::kAcquire) == 0 && p.at[2] == 0) {
    if (protocol::now_ns() > 60'000'000'000u) p.at[2] = 1;
  }
  p.at[1] = 1;
}
void comes_early(Words p) {
  if (threadIdx.x == 0) protocol::Shared(p.at[0]).store(1, protocol::kRelease);
  ptx::grid_dependency_wait();
  if (threadIdx.x == 0) p.at[3] = p.at[1];
}

TEST_F(EmulationTest, AnEarlyLaunchOverlapsAndWaitsWhereItSaysSo) {
  auto* const words = memory<std::uint32_t>(4);
  const Kernel<Words> first(waits_for_next, "waits_for_next"), second(comes_early, "comes_early");
  first({.blocks = 2, .threads = 32, .stream = stream_}, {words});
  second({.blocks = 2, .threads = 32, .stream = stream_, .early = true}, {words});
  (void)cudaStreamSynchronize(stream_);
  EXPECT_EQ(words[2], 0u) << "the second launch did not start";
  EXPECT_EQ(words[3], 1u) << "it did not wait for the end of the first one";
}

void sum_of_cluster(Words p) {
  __shared__ std::int32_t own;
  std::byte* const dynamic = ptx::dynamic_shared<16>();
  if (threadIdx.x == 0) {
    own = static_cast<std::int32_t>(blockIdx.x) + 1;
    *reinterpret_cast<std::int32_t*>(dynamic) = 10 * own;
  }
  ptx::cluster_sync();
  if (threadIdx.x == 0) {
    std::int32_t sum = 0;
    for (std::uint32_t block = 0; block < 4; ++block) {
      sum += ptx::load_shared_of(block, &own) + ptx::load_shared_of(block, reinterpret_cast<std::int32_t*>(dynamic));
    }
    p.at[blockIdx.x] = static_cast<std::uint32_t>(sum);
  }
  ptx::cluster_sync();
}

TEST_F(EmulationTest, BlocksOfAClusterReadEachOthersSharedMemory) {
  auto* const words = memory<std::uint32_t>(8);
  run(Kernel<Words>(sum_of_cluster, "sum_of_cluster"), {.blocks = 8, .threads = 32, .shared_bytes = 16, .cluster = 4},
      Words{words});
  for (int block = 0; block < 8; ++block) EXPECT_EQ(words[block], block < 4 ? 110u : 286u);
}

struct Meet {
  std::uint32_t* at;
  std::uint32_t blocks;
};
// Blocks that wait for each other, for a while.
void meet(Meet p) {
  if (threadIdx.x != 0) return;
  atomicAdd(p.at, 1u);
  for (int i = 0; i < 1'000'000 && protocol::Shared(p.at[0]).load(protocol::kAcquire) < p.blocks; ++i) {
  }
  if (protocol::Shared(p.at[0]).load(protocol::kAcquire) < p.blocks) p.at[1] = 1;
}

TEST_F(EmulationTest, BlocksThatFindNoRoomStartLater) {
  auto* const words = memory<std::uint32_t>(2);
  const auto fit = static_cast<unsigned>(2 * cuda::device_traits().num_sms);
  const Kernel<Meet> kernel(meet, "meet");
  run(kernel, {.blocks = fit, .threads = 1024}, Meet{words, fit});
  EXPECT_EQ(words[1], 0u);
  words[0] = 0;
  run(kernel, {.blocks = fit + 1, .threads = 1024}, Meet{words, fit + 1});
  EXPECT_EQ(words[1], 1u) << "the last block ran beside the others";
}

void add_one(Words p) {
  if (threadIdx.x == 0) p.at[0] = p.at[0] * 2 + 1;
}

TEST_F(EmulationTest, GraphsReplayInOrder) {
  auto* const words = memory<std::uint32_t>(1);
  const Kernel<Words> kernel(add_one, "add_one");
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  (void)cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal);
  (void)cudaMemsetAsync(words, 0, 4, stream_);
  for (int i = 0; i < 3; ++i) kernel({.blocks = 1, .threads = 32, .stream = stream_}, {words});
  (void)cudaStreamEndCapture(stream_, &graph);
  (void)cudaGraphInstantiate(&exec, graph, 0);
  EXPECT_EQ(*words, 0u);
  for (int replay = 0; replay < 3; ++replay) (void)cudaGraphLaunch(exec, stream_);
  (void)cudaStreamSynchronize(stream_);
  EXPECT_EQ(*words, 7u);
  (void)cudaGraphExecDestroy(exec);
  (void)cudaGraphDestroy(graph);
}

// ---- what no GPU would accept --------------------------------------------------------------------------------------

void parted(Words p) {
  if (threadIdx.x < 16) {
    p.at[0] = __ballot_sync(0xFFFF'FFFFu, 1);
  } else {
    __syncwarp();
  }
}
void alone(Words) {
  if (threadIdx.x == 0) __syncwarp();
}
void half_warp(Words) {
  ptx::barrier_sync(3, 16);
}
void misaligned(Words p) {
  if (threadIdx.x == 0) cuda::bulk::store(p.at + 1, ptx::dynamic_shared<16>(), 16);
}
void beyond(Words p) {
  p.at[1024 + threadIdx.x] = 1;
}

TEST_F(EmulationDeathTest, WhatIsImpossibleIsNamed) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  auto* const words = memory<std::uint32_t>(1024);
  const auto named = [&](void (*kernel)(Words), const char* name) {
    run(Kernel<Words>(kernel, name), {.blocks = 1, .threads = 32, .shared_bytes = 16}, Words{words});
  };
  const auto code = testing::ExitedWithCode(5);
  EXPECT_EXIT(named(parted, "parted"), code, "parted, block 0 of 1.*meets");
  EXPECT_EXIT(named(alone, "alone"), code, "alone, block 0 of 1: everybody waits for somebody\n.*lane 0: __syncwarp");
  EXPECT_EXIT(named(half_warp, "half_warp"), code, "barrier.sync: 16 threads");
  EXPECT_EXIT(named(misaligned, "misaligned"), code, "multiple of 16");
  EXPECT_EXIT(named(beyond, "beyond"), testing::KilledBySignal(SIGSEGV), "");
}

}  // namespace
}  // namespace anyep::test
