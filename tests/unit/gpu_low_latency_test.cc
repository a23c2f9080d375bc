// How the bytes of low latency on GPUs are cut: whatever the call, what it may write lies in its area, aligned as it is accessed, and nothing
// lies on something else.
#include "core/gpu_low_latency.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <string>

namespace anyep::cuda::low_latency {
namespace {

struct Call {
  std::int64_t hidden;
  int local_experts, top_k, max_tokens, ranks;

  std::string text() const {
    return "hidden " + std::to_string(hidden) + ", " + std::to_string(local_experts) + " local experts, top-" +
           std::to_string(top_k) + ", " + std::to_string(max_tokens) + " tokens, " + std::to_string(ranks) + " ranks";
  }
  Layout layout() const {
    return Layout::make(
        kRegions * static_cast<unsigned>(ranks) * region_bytes_for(hidden, local_experts, top_k, max_tokens), ranks);
  }
};

Call draw(std::mt19937_64& random) {
  const auto up_to = [&](int most) { return 1 + static_cast<int>(random() % static_cast<unsigned>(most)); };
  return {8 * up_to(kMaxHidden / 8), up_to(128), up_to(kMaxTopK), up_to(up_to(3) == 1 ? kMaxTokens : 200), up_to(8)};
}

/// Calls check(call, cut, layout) for every cut that a call may have.
template <class Check>
void for_each_cut(const Check& check) {
  std::mt19937_64 random(1);
  for (int i = 0; i < 300; ++i) {
    const Call call = draw(random);
    SCOPED_TRACE(call.text());
    const Layout layout = call.layout();
    for (const bool yes : {false, true}) {
      check(call, dispatch_cut(call.hidden, yes, call.local_experts, call.top_k, call.max_tokens), layout);
      check(call, combine_cut(call.hidden, false, yes, call.local_experts, call.top_k, call.max_tokens), layout);
    }
    if (call.hidden % 128 == 0) {
      check(call, combine_cut(call.hidden, true, true, call.local_experts, call.top_k, call.max_tokens), layout);
    }
  }
}

TEST(GpuLowLatencyLayout, AreasFollowEachOtherAndFillTheRegion) {
  for_each_cut([](const Call&, const Cut&, const Layout& layout) {
    EXPECT_EQ(layout.words, kMaxChunks * kFlagBytes);
    EXPECT_EQ(layout.packets, layout.words + layout.num_words * 8);
    EXPECT_EQ(layout.records, layout.packets + layout.num_packets * 16);
    EXPECT_EQ(layout.region_bytes, layout.records + layout.record_bytes);
    for (const std::uint64_t at : {layout.words, layout.packets, layout.records, layout.region_bytes}) {
      EXPECT_EQ(at % kAlignment, 0u);
    }
  });
}

TEST(GpuLowLatencyLayout, EveryFormOfTheCallsItWasMadeForFits) {
  for_each_cut([](const Call& call, const Cut& cut, const Layout& layout) {
    EXPECT_TRUE(layout.holds(cut));
    for (int tokens = 1; tokens <= call.max_tokens; tokens += 1 + tokens / 8) {
      const auto count = static_cast<std::uint32_t>(tokens);
      switch (layout.form(cut, tokens, false)) {
        case Form::kWords:
          EXPECT_LE(tokens, kMostWordTokens);
          EXPECT_LE(cut.row_word(count, 0), layout.num_words);
          break;
        case Form::kPackets:
          EXPECT_GT(tokens, kMostWordTokens);  // fewer find room as words
          EXPECT_LE(tokens, kMostPacketTokens);
          EXPECT_LE(cut.packet(count, 0), layout.num_packets);
          break;
        case Form::kRecords:
          EXPECT_GT(tokens, kMostPacketTokens);
          break;
      }
      EXPECT_LE(cut.record(count, 0), layout.record_bytes);
      EXPECT_EQ(layout.form(cut, tokens, true), Form::kRecords);
    }
  });
}

TEST(GpuLowLatencyLayout, HeadCountsTableAndRowsDoNotOverlap) {
  for_each_cut([](const Call& call, const Cut& cut, const Layout&) {
    EXPECT_GE(cut.count_word(0), 1u);               // behind the head
    const bool counts = cut.words_per_choice == 1;  // dispatch
    if (counts) {
      EXPECT_GE(static_cast<int>(2 * cut.count_pairs()), call.local_experts);
      EXPECT_LT(static_cast<int>(2 * cut.count_pairs()), call.local_experts + 2);
    } else {
      EXPECT_EQ(cut.count_pairs(), 0u);
    }
    EXPECT_EQ(cut.count_word(2 * cut.count_pairs()), cut.table_word(0, 0));
    const auto last = static_cast<std::uint32_t>(call.max_tokens - 1);
    if (cut.top_k != 0) {
      const auto end = cut.table_word(last, cut.top_k - 1) + static_cast<unsigned>(cut.words_per_choice);
      EXPECT_LE(end, cut.row_words);
    }
  });
}

TEST(GpuLowLatencyLayout, WhatIsAccessedBySixteenBytesIsAligned) {
  for_each_cut([](const Call& call, const Cut& cut, const Layout& layout) {
    const auto is_aligned = [&](std::uint32_t word) { return (layout.words + std::uint64_t{word} * 8) % 16 == 0; };
    EXPECT_TRUE(is_aligned(cut.count_word(0)));
    EXPECT_TRUE(cut.words_per_choice != 2 || is_aligned(cut.table_word(0, 0)));
    EXPECT_TRUE(is_aligned(cut.row_word(static_cast<std::uint32_t>(call.max_tokens - 1), cut.strips - 1)));
    EXPECT_EQ(cut.record_bytes % 16, 0u);
  });
}

TEST(GpuLowLatencyLayout, ChunksAreOneTokenEachUpToTheirNumber) {
  for (int tokens = 1; tokens <= kMaxTokens; ++tokens) {
    EXPECT_LE(num_chunks(tokens), kMaxChunks);
    EXPECT_GE(num_chunks(tokens) * chunk_tokens(tokens), tokens);
    EXPECT_LT((num_chunks(tokens) - 1) * chunk_tokens(tokens), tokens);
    EXPECT_EQ(chunk_tokens(tokens) > 1, are_several_a_chunk(tokens));
  }
}

}  // namespace
}  // namespace anyep::cuda::low_latency
