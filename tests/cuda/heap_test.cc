// The heap of a CUDA rank's window: what is handed out when, and what never again.
#include "cuda/memory/heap.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <vector>

namespace anyep::cuda {
namespace {

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

struct Work final : Completion {
  mutable int asked = 0;
  bool over = false;
  bool done() const noexcept override {
    ++asked;
    return over;
  }
};

TEST(CudaHeap, HandsOutDisjointAlignedRangesAndTakesThemBack) {
  Heap heap(4096, 64 * kMiB);
  std::map<std::uint64_t, std::uint64_t> used;
  std::mt19937 random(11);
  for (int step = 0; step < 30000; ++step) {
    if (!used.empty() && random() % 2 == 0) {
      auto victim = used.begin();
      std::advance(victim, static_cast<long>(random() % used.size()));
      heap.release(victim->first, nullptr);
      used.erase(victim);
      continue;
    }
    const std::uint64_t bytes = random() % 3 == 0 ? 1 + random() % (4 * kMiB) : random() % 5000;
    const auto offset = heap.allocate(bytes);
    if (!offset) continue;
    ASSERT_EQ(*offset % Heap::kAlignment, 0u);
    ASSERT_GE(*offset, 4096u);
    ASSERT_LE(*offset + bytes, 4096 + 64 * kMiB);
    const auto after = used.lower_bound(*offset);
    if (after != used.end()) {
      ASSERT_LE(*offset + bytes, after->first);
      ASSERT_NE(*offset, after->first);
    }
    if (after != used.begin()) {
      ASSERT_GE(*offset, std::prev(after)->first + std::prev(after)->second);
    }
    used[*offset] = std::max<std::uint64_t>(bytes, 1);
  }
  for (const auto& [offset, bytes] : used) heap.release(offset, nullptr);
  EXPECT_EQ(heap.largest_free(), 64 * kMiB);  // all pieces have joined again
  EXPECT_EQ(heap.statistics().in_use, 0u);
  EXPECT_EQ(heap.statistics().num_blocks, 0u);
}

TEST(CudaHeap, ReusesABlockOnlyWhenItsWorkIsOver) {
  Heap heap(0, 4 * kMiB);
  const auto work = std::make_shared<Work>();
  const auto first = heap.allocate(3 * kMiB);
  ASSERT_TRUE(first);
  heap.release(*first, work);
  EXPECT_TRUE(heap.has_pending());
  EXPECT_FALSE(heap.allocate(3 * kMiB));  // asks, does not wait
  EXPECT_GE(work->asked, 1);
  EXPECT_EQ(heap.statistics().waiting, 3 * kMiB);
  work->over = true;
  const auto second = heap.allocate(3 * kMiB);
  ASSERT_TRUE(second);
  EXPECT_EQ(*second, *first);
  EXPECT_FALSE(heap.has_pending());
}

TEST(CudaHeap, WaitsForEveryStreamThatUsedABlock) {
  Heap heap(0, kMiB);
  const auto one = std::make_shared<Work>(), other = std::make_shared<Work>();
  const auto block = heap.allocate(kMiB);
  heap.release(*block, std::vector<std::shared_ptr<const Completion>>{one, other});
  one->over = true;
  EXPECT_FALSE(heap.allocate(kMiB));
  other->over = true;
  EXPECT_TRUE(heap.allocate(kMiB));
}

TEST(CudaHeap, WorkThatIsNotOverDoesNotHoldBackWhatIs) {
  Heap heap(0, 8 * kMiB);
  const auto late = std::make_shared<Work>(), early = std::make_shared<Work>();
  const auto first = heap.allocate(4 * kMiB), second = heap.allocate(4 * kMiB);
  heap.release(*first, late);
  heap.release(*second, early);
  early->over = true;
  EXPECT_EQ(heap.allocate(4 * kMiB), second);
}

TEST(CudaHeap, RowsOfAGraphNeverGoToOtherCalls) {
  Heap heap(0, 4 * kMiB);
  const auto rows = heap.allocate(2 * kMiB, Lifetime::kGraph);
  ASSERT_TRUE(rows);
  heap.release(*rows, nullptr);
  for (int call = 0; call < 3; ++call) {
    const auto others = heap.allocate(2 * kMiB);
    ASSERT_TRUE(others);
    EXPECT_NE(*others, *rows);
    EXPECT_FALSE(heap.allocate(2 * kMiB));
    heap.release(*others, nullptr);
  }
  EXPECT_EQ(heap.statistics().graphs, 2 * kMiB);
  EXPECT_EQ(heap.statistics().in_use, 2 * kMiB);
}

TEST(CudaHeap, AsksOnceForBlocksOfOneOp) {
  Heap heap(0, 16 * kMiB);
  const auto op = std::make_shared<Work>();
  for (int block = 0; block < 5; ++block) heap.release(*heap.allocate(kMiB), op);
  op->asked = 0;
  const auto other = heap.allocate(kMiB);
  EXPECT_EQ(op->asked, 1);
  op->over = true;
  heap.release(*other, nullptr);
  EXPECT_TRUE(heap.allocate(16 * kMiB));  // all five are free
}

// A question to the driver costs the host about a microsecond: none as long as there is room and little waits.
TEST(CudaHeap, AsksOnlyWhenMuchWaitsOrNothingFits) {
  Heap heap(0, 16 * kMiB);
  const auto op = std::make_shared<Work>();
  op->over = true;
  heap.release(*heap.allocate(kMiB), op);
  heap.release(*heap.allocate(kMiB), op);
  EXPECT_TRUE(heap.allocate(kMiB));
  EXPECT_EQ(op->asked, 0);  // an eighth waits
  heap.release(*heap.allocate(kMiB), op);
  const auto late = std::make_shared<Work>();
  EXPECT_TRUE(heap.allocate(12 * kMiB));  // more than an eighth waits, and what was over is free
  EXPECT_EQ(heap.statistics().waiting, 0u);
  heap.release(*heap.allocate(kMiB), late);
  EXPECT_TRUE(heap.allocate(kMiB));
  EXPECT_TRUE(heap.allocate(kMiB));
  EXPECT_EQ(late->asked, 0);
  late->over = true;
  EXPECT_TRUE(heap.allocate(kMiB));  // nothing else fits
  EXPECT_EQ(late->asked, 1);
}

// Much that waits is looked at in parts, so that no call pays for all of it.
TEST(CudaHeap, LooksAtFewBlocksAtATime) {
  Heap heap(0, 64 * kMiB);
  std::vector<std::shared_ptr<Work>> ops;
  for (int block = 0; block < 40; ++block) {
    ops.push_back(std::make_shared<Work>());
    ops.back()->over = true;
  }
  std::vector<std::uint64_t> blocks;
  for (int block = 0; block < 40; ++block) blocks.push_back(*heap.allocate(kMiB));
  for (std::size_t block = 0; block < 40; ++block) heap.release(blocks[block], ops[block]);
  EXPECT_TRUE(heap.allocate(kMiB));
  const auto asked = std::count_if(ops.begin(), ops.end(), [](const auto& op) { return op->asked > 0; });
  EXPECT_EQ(asked, static_cast<std::ptrdiff_t>(Heap::kFewLooks));
  EXPECT_TRUE(heap.allocate(60 * kMiB));  // nothing else fits: all are looked at
}

TEST(CudaHeap, WhatLiesBehindTheKeptFrontIsFreeAtOnce) {
  Heap heap(0, 8 * kMiB);
  const auto rows = heap.allocate(8 * kMiB);
  ASSERT_TRUE(rows);
  EXPECT_FALSE(heap.allocate(kMiB));
  heap.keep_front(*rows, 5 * kMiB - 100);  // ends on kAlignment
  EXPECT_EQ(heap.statistics().in_use, 5 * kMiB);
  EXPECT_EQ(heap.largest_free(), 3 * kMiB);
  const auto others = heap.allocate(3 * kMiB);
  ASSERT_TRUE(others);
  EXPECT_EQ(*others, 5 * kMiB);
  heap.release(*rows, nullptr);
  heap.release(*others, nullptr);
  EXPECT_EQ(heap.largest_free(), 8 * kMiB);  // no hole is left
  EXPECT_EQ(heap.statistics().in_use, 0u);
}

TEST(CudaHeap, AKeptFrontIsNeverEmptyOrLarger) {
  Heap heap(0, 8 * kMiB);
  const auto rows = heap.allocate(2 * kMiB);
  heap.keep_front(*rows, 4 * kMiB);
  EXPECT_EQ(heap.statistics().in_use, 2 * kMiB);
  heap.keep_front(*rows, 0);
  EXPECT_EQ(heap.statistics().in_use, Heap::kAlignment);
  heap.keep_front(*rows + 1, 0);  // never handed out
  heap.release(*rows, nullptr);
  EXPECT_EQ(heap.largest_free(), 8 * kMiB);
}

TEST(CudaHeap, ReleasedBlocksAndThoseOfGraphsKeepTheirEnds) {
  Heap heap(0, 8 * kMiB);
  const auto replayed = heap.allocate(2 * kMiB, Lifetime::kGraph);
  heap.keep_front(*replayed, 1);
  EXPECT_EQ(heap.statistics().in_use, 2 * kMiB);
  const auto work = std::make_shared<Work>();
  const auto rows = heap.allocate(2 * kMiB);
  heap.release(*rows, work);
  heap.keep_front(*rows, 1);
  EXPECT_EQ(heap.statistics().waiting, 2 * kMiB);
}

TEST(CudaHeap, SmallBlocksDoNotCutUpTheRoomForRows) {
  Heap heap(0, 64 * kMiB);
  for (int round = 0; round < 100; ++round) {
    const auto rows = heap.allocate(48 * kMiB);
    ASSERT_TRUE(rows) << "round " << round;
    EXPECT_EQ(*rows, 0u);
    const auto kept = heap.allocate(4096);  // stays for ever, as a handle's arrays may
    ASSERT_TRUE(kept);
    EXPECT_GE(*kept, 48 * kMiB);
    heap.release(*rows, nullptr);
  }
}

TEST(CudaHeap, CountsWhatIsHeld) {
  Heap heap(0, 8 * kMiB);
  const auto rows = heap.allocate(2 * kMiB);
  const auto small = heap.allocate(1);
  EXPECT_EQ(heap.statistics().in_use, 2 * kMiB + Heap::kAlignment);
  heap.release(*rows, nullptr);
  heap.release(*rows, nullptr);       // twice is once
  heap.release(*small + 1, nullptr);  // never handed out
  EXPECT_EQ(heap.statistics().in_use, Heap::kAlignment);
  EXPECT_EQ(heap.statistics().high_water, 2 * kMiB + Heap::kAlignment);
  EXPECT_EQ(heap.statistics().bytes, 8 * kMiB);
  EXPECT_EQ(heap.statistics().largest_free, 8 * kMiB - Heap::kAlignment);
}

TEST(CudaHeap, TakesAnotherRangeWhenTheWindowGrows) {
  Heap heap(0, kMiB);
  EXPECT_FALSE(heap.allocate(3 * kMiB));
  heap.add(16 * kMiB, 4 * kMiB);
  const auto apart = heap.allocate(3 * kMiB);
  ASSERT_TRUE(apart);
  EXPECT_EQ(*apart, 16 * kMiB);
  heap.release(*apart, nullptr);
  heap.add(kMiB, 15 * kMiB);  // now they touch
  EXPECT_EQ(heap.largest_free(), 20 * kMiB);
}

TEST(CudaHeap, RefusesWhatCannotBe) {
  Heap heap(0, kMiB);
  EXPECT_FALSE(heap.allocate(kMiB + 1));
  EXPECT_FALSE(heap.allocate(UINT64_MAX));
  Heap empty;
  EXPECT_FALSE(empty.allocate(0));
  EXPECT_EQ(empty.largest_free(), 0u);
}

}  // namespace
}  // namespace anyep::cuda
