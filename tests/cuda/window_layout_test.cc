// Offsets of a CUDA rank's window: nothing overlaps, whatever the budget.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/window.h"

namespace anyep::cuda {
namespace {

struct Array {
  const char* name;
  std::uint64_t offset, bytes, alignment;
};

std::vector<Array> arrays_of(const WindowLayout& at) {
  const auto ranks = static_cast<std::uint64_t>(at.num_ranks);
  const std::uint64_t words = ranks * kWordBytes;
  return {
      {"dispatch_credit", at.dispatch_credit, words, kWordBytes},
      {"dispatch_arrived", at.dispatch_arrived, words, kWordBytes},
      {"combine_offered", at.combine_offered, words, kWordBytes},
      {"combine_read", at.combine_read, words, kWordBytes},
      {"barrier", at.barrier, words, kWordBytes},
      {"low_latency_mark", at.low_latency_mark, words, kWordBytes},
      {"grant", at.grant, words, kWordBytes},
      {"offer", at.offer, kSlotRegions * words, kWordBytes},
      {"counts", at.counts, 2 * ranks * at.count_width * 8, kWordBytes},
      {"chunks", at.chunks, kSlotRegions * ranks * at.chunks_per_region * 8, kWordBytes},
      {"low_latency", at.low_latency, at.low_latency_bytes, kPageBytes},
      {"slots", at.slots, kSlotRegions * ranks * at.slot_region_bytes, kPageBytes},
      {"heap", at.heap, at.heap_bytes, kPageBytes},
      {"handles", at.handles, at.handles_bytes, kPageBytes},
  };
}

std::vector<WindowLayout> layouts() {
  std::vector<WindowLayout> all;
  for (int num_ranks = 1; num_ranks <= kMaxRanks; ++num_ranks) {
    for (const std::int64_t rows_bytes : {0ll, 1ll, 4096ll, 1000003ll, 64ll << 20, 1ll << 30, 100ll << 30}) {
      for (const std::int64_t low_latency_bytes : {0ll, 12345ll, 1ll << 30}) {
        for (const int max_experts : {1, 7, 256, 1024}) {
          Budget budget;
          budget.rows_bytes = rows_bytes;
          budget.low_latency_bytes = low_latency_bytes;
          budget.max_experts = max_experts;
          all.push_back(WindowLayout::make(budget, num_ranks));
        }
      }
    }
  }
  return all;
}

TEST(CudaWindowLayout, ArraysFollowEachOtherAlignedAndDisjoint) {
  for (const WindowLayout& at : layouts()) {
    std::uint64_t end = 0;
    for (const Array& array : arrays_of(at)) {
      ASSERT_GE(array.offset, end) << array.name << " of " << at.num_ranks << " ranks";
      ASSERT_EQ(array.offset % array.alignment, 0u) << array.name;
      end = array.offset + array.bytes;
    }
    ASSERT_LE(end, at.bytes);
    ASSERT_LT(at.bytes - end, kPageBytes);
  }
}

TEST(CudaWindowLayout, EveryIndexStaysInItsArray) {
  for (const WindowLayout& at : layouts()) {
    const int last = at.num_ranks - 1;
    ASSERT_LE(at.word(at.grant, last) + sizeof(Grant), at.offer);
    ASSERT_LE(at.offer_record(last, kSlotRegions - 1) + sizeof(Offer), at.counts);
    ASSERT_EQ(at.offer_record(0, 1), at.offer_record(0, 1 + kSlotRegions));
    ASSERT_LE(at.slot_region(last, kSlotRegions - 1) + at.slot_region_bytes, at.heap);
    if (at.chunks_per_region == 0) continue;
    ASSERT_LE(at.chunk_word(last, kSlotRegions - 1, at.chunks_per_region - 1) + 8, at.low_latency);
    // One word for every row that a region can hold at most.
    ASSERT_GE(at.chunks_per_region * kRowsPerChunk * kLeastSlotBytes, at.slot_region_bytes);
  }
}

TEST(CudaWindowLayout, GrowsWithTheBudgetAndHoldsIt) {
  for (int num_ranks = 1; num_ranks <= kMaxRanks; ++num_ranks) {
    std::uint64_t before = 0;
    for (std::int64_t rows_bytes = 0; rows_bytes <= std::int64_t{1} << 34;
         rows_bytes += (std::int64_t{1} << 30) + 777) {
      Budget budget;
      budget.rows_bytes = rows_bytes;
      const WindowLayout at = WindowLayout::make(budget, num_ranks);
      ASSERT_GE(at.bytes, before);
      before = at.bytes;
      const std::uint64_t slots = kSlotRegions * static_cast<std::uint64_t>(num_ranks) * at.slot_region_bytes;
      ASSERT_GE(slots + at.heap_bytes, static_cast<std::uint64_t>(rows_bytes));
      ASSERT_LT(slots + at.heap_bytes, static_cast<std::uint64_t>(rows_bytes) + kPageBytes);
      ASSERT_LE(slots, static_cast<std::uint64_t>(rows_bytes) / kSlotShare);
    }
  }
}

}  // namespace
}  // namespace anyep::cuda
