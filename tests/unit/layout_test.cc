// Properties of every layout, checked for many shapes: arrays are aligned, disjoint and inside.
#include "core/layout.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "core/buffers.h"
#include "core/low_latency.h"

namespace anyep::core {
namespace {

struct Range {
  std::uint64_t begin, bytes;
};

void expect_disjoint(std::vector<Range> ranges, std::uint64_t all_bytes) {
  std::erase_if(ranges, [](const Range& range) { return range.bytes == 0; });
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  std::uint64_t end = 0;
  for (const Range& range : ranges) {
    EXPECT_GE(range.begin, end);
    end = range.begin + range.bytes;
  }
  EXPECT_LE(end, all_bytes);
}

TEST(Layout, CursorAlignsEachArrayAndCountsAllBytes) {
  Cursor at(128);
  EXPECT_EQ(at.take(1), 0u);
  EXPECT_EQ(at.take(200), 128u);
  EXPECT_EQ(at.take(0), 384u);
  EXPECT_EQ(at.bytes(), 384u);
}

TEST(Layout, TurnsHoldTheRowsThatFitAndNotOneMoreThanTheRegionHas) {
  for (const std::uint32_t x : {16u, 1024u, 14336u, 65536u}) {
    for (const std::uint32_t scales : {0u, 4u, 224u}) {
      RowFields fields;
      fields.bytes[kFieldX] = x;
      fields.bytes[kFieldScales] = scales;
      fields.bytes[kFieldExperts] = 32;
      for (const std::uint64_t region : {std::uint64_t{4096}, std::uint64_t{1} << 20}) {
        const std::uint64_t rows = TurnLayout::rows_that_fit(fields, 0xF, region);
        if (rows == 0) continue;
        const TurnLayout turn = TurnLayout::make(fields, 0xF, rows);
        EXPECT_LE(turn.bytes, region);
        std::vector<Range> ranges;
        for (int field = 0; field < kMaxFields; ++field) {
          if (turn.stride[field] == 0) continue;
          EXPECT_EQ(turn.offset[field] % kArrayAlignment, 0u);
          ranges.push_back({turn.offset[field], rows * turn.stride[field]});
        }
        expect_disjoint(ranges, region);
      }
    }
  }
}

TEST(Layout, FieldsThatAreNotPresentTakeNoRoom) {
  RowFields fields;
  fields.bytes[kFieldX] = 4096;
  fields.bytes[kFieldExperts] = 32;
  const TurnLayout turn = TurnLayout::make(fields, 1u << kFieldExperts, 10);
  EXPECT_EQ(turn.stride[kFieldX], 0u);
  EXPECT_LT(turn.bytes, 4096u);
}

TEST(Layout, WindowRegionsAreDisjointForManyBudgets) {
  for (const int ranks : {1, 2, 3, 8, 64}) {
    for (const std::int64_t rows :
         {std::int64_t{0}, std::int64_t{1}, std::int64_t{100'001}, std::int64_t{1} << 20, std::int64_t{1} << 30}) {
      for (const std::int64_t low : {std::int64_t{0}, std::int64_t{4097}, std::int64_t{100} << 20}) {
        Budget budget;
        budget.rows_bytes = rows;
        budget.low_latency_bytes = low;
        const WindowLayout at = WindowLayout::make(budget, ranks);
        const auto n = static_cast<std::uint64_t>(ranks);
        const std::uint64_t records = n * WindowLayout::kRecordStride;
        std::vector<Range> ranges = {{at.header, sizeof(WindowHeader)},
                                     {at.doorbell, 2 * kWordBytes},
                                     {at.announced, n * kWordBytes},
                                     {at.described, kDescriptionWords * 8},
                                     {at.grant, records},
                                     {at.barrier, n * kWordBytes},
                                     {at.low_latency_arrived, n * kWordBytes},
                                     {at.low_latency_asked, n * kWordBytes},
                                     {at.counts, 2 * n * at.count_width * 8},
                                     {at.mailboxes, n * kRegions * kMailboxBytes},
                                     {at.low_latency, kLowLatencyRegions * n * at.low_latency_region_bytes},
                                     {at.slots, n * kRegions * at.slot_region_bytes},
                                     {at.heap, at.heap_bytes}};
        for (int stream = 0; stream < kNumStreams; ++stream) {
          ranges.push_back({at.arrived[stream], n * kWordBytes});
          ranges.push_back({at.credit[stream], n * kWordBytes});
          ranges.push_back({at.offer[stream], kRegions * records});
        }
        expect_disjoint(ranges, at.bytes);
        EXPECT_EQ(at.low_latency % kPageBytes, 0u);
        EXPECT_EQ(at.heap % kPageBytes, 0u);
        const std::uint64_t rings = n * kRegions * at.slot_region_bytes + at.staging_bytes();
        EXPECT_LE(rings + at.heap_bytes, static_cast<std::uint64_t>(rows));
        EXPECT_LE(kLowLatencyRegions * n * at.low_latency_region_bytes, static_cast<std::uint64_t>(low));
        // What memory() shows: as many bytes as the budget has, with nothing but payload among them.
        EXPECT_EQ(at.low_latency_bytes, static_cast<std::uint64_t>(low));
        EXPECT_EQ(at.rows_bytes, static_cast<std::uint64_t>(rows));
        expect_disjoint({{at.mailboxes, n * kRegions * kMailboxBytes},
                         {at.low_latency, at.low_latency_bytes},
                         {at.slots, at.rows_bytes}},
                        at.bytes);
      }
    }
  }
}

TEST(Layout, RegionsOfDifferentSourcesAndTurnsDoNotMeet) {
  Budget budget;
  budget.rows_bytes = 64 << 20;
  budget.low_latency_bytes = 64 << 20;
  const WindowLayout at = WindowLayout::make(budget, 3);
  std::vector<Range> low, slots, boxes;
  for (int source = 0; source < 3; ++source) {
    for (std::uint32_t turn = 0; turn < kLowLatencyRegions; ++turn) {
      low.push_back({at.low_latency_region(source, turn), at.low_latency_region_bytes});
    }
    for (std::uint32_t turn = 0; turn < kRegions; ++turn) {
      slots.push_back({at.slot_region(source, turn), at.slot_region_bytes});
      boxes.push_back({at.mailbox(source, turn), kMailboxBytes});
    }
  }
  expect_disjoint(low, at.slots);
  expect_disjoint(slots, at.heap);
  expect_disjoint(boxes, at.low_latency);
}

TEST(Layout, LowLatencyRegionsHoldTheirRecordsAndRows) {
  for (const std::int64_t hidden : {8, 2880, 7168, 16384}) {
    for (const int top_k : {1, 8, 32}) {
      Shape shape;
      shape.num_experts = 67;
      shape.top_k = top_k;
      shape.hidden = hidden;
      shape.max_tokens = 9;
      const DispatchRegionLayout dispatch = dispatch_region(shape, 4, Wire::kBF16);
      expect_disjoint({{0, sizeof(LowLatencyHead)}, {dispatch.counts, 17 * 4}, {dispatch.records, 9 * dispatch.stride}},
                      dispatch.bytes);
      const auto choices = static_cast<std::uint64_t>(most_choices_per_rank(shape, 4));
      expect_disjoint({{0, 8},
                       {dispatch.choices, choices * sizeof(LowLatencyChoice)},
                       {dispatch.payload, static_cast<std::uint64_t>(2 * hidden)}},
                      dispatch.stride);
      EXPECT_EQ(dispatch.stride % kRowAlignment, 0u);
      const CombineRegionLayout combine = combine_region(shape, 4, true, Wire::kBF16);
      expect_disjoint({{0, sizeof(LowLatencyHead)},
                       {combine.weights, 9 * static_cast<std::uint64_t>(top_k) * sizeof(LowLatencyWeight)},
                       {combine.answer, sizeof(LowLatencyHead)},
                       {combine.rows, 9 * combine.row_stride}},
                      combine.bytes);
    }
  }
}

}  // namespace
}  // namespace anyep::core
