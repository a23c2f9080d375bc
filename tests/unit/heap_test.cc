// The heap of rows inside a window.
#include <gtest/gtest.h>

#include <map>
#include <random>

#include "host/memory.h"

namespace anyep::host {
namespace {

TEST(Heap, HandsOutDisjointAlignedRangesAndTakesThemBack) {
  Heap heap(4096, 1 << 20);
  std::map<std::uint64_t, std::uint64_t> used;
  std::mt19937 random(7);
  for (int step = 0; step < 20000; ++step) {
    if (!used.empty() && random() % 2 == 0) {
      auto victim = used.begin();
      std::advance(victim, static_cast<long>(random() % used.size()));
      heap.release(victim->first);
      used.erase(victim);
      continue;
    }
    const std::uint64_t bytes = 1 + random() % 20000;
    const auto offset = heap.allocate(bytes);
    if (!offset) {
      EXPECT_LT(heap.largest_free(), core::round_up(bytes, core::kArrayAlignment));
      continue;
    }
    EXPECT_EQ(*offset % core::kArrayAlignment, 0u);
    EXPECT_GE(*offset, 4096u);
    EXPECT_LE(*offset + bytes, 4096u + (1u << 20));
    const auto after = used.lower_bound(*offset);
    if (after != used.end()) {
      EXPECT_LE(*offset + bytes, after->first);
    }
    if (after != used.begin()) {
      EXPECT_GE(*offset, std::prev(after)->first + std::prev(after)->second);
    }
    used[*offset] = bytes;
  }
  for (const auto& [offset, bytes] : used) heap.release(offset);
  EXPECT_EQ(heap.largest_free(), 1u << 20);
}

TEST(Heap, AnEmptyHeapHasNothingToGive) {
  Heap heap(0, 0);
  EXPECT_FALSE(heap.allocate(1).has_value());
  EXPECT_EQ(heap.largest_free(), 0u);
}

}  // namespace
}  // namespace anyep::host
