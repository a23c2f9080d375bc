// docs/layouts.md shows what running code gives: each of its blocks is made here and must stand there, letter by
// letter.
#include <anyep/engine.h>
#include <gtest/gtest.h>

#include <array>
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "core/buffers.h"
#include "core/low_latency.h"
#include "protocol/counts.h"
#include "protocol/word.h"

namespace anyep {
namespace {

constexpr int kRanks = 2, kTokens = 2, kHidden = 16;

Budget small_budget() {
  Budget budget;
  budget.rows_bytes = 1 << 20;
  budget.low_latency_bytes = 64 << 10;
  budget.max_experts = 4;
  return budget;
}
Shape small_shape() {
  Shape shape;
  shape.num_experts = 4;
  shape.top_k = 2;
  shape.hidden = kHidden;
  shape.max_tokens = kTokens;
  return shape;
}

template <class... Values>
std::string line_of(const char* format, Values... values) {
  char text[160];
  std::snprintf(text, sizeof text, format, values...);
  return std::string(text) + "\n";
}

/// Sixteen bytes a line, in groups of four, as they lie in memory.
std::string dump(const std::byte* data, std::uint64_t offset, std::uint64_t bytes) {
  std::string text;
  for (std::uint64_t at = 0; at < bytes; at += 16) {
    std::string line = line_of("%04llx ", static_cast<unsigned long long>(offset + at));
    line.pop_back();
    for (std::uint64_t byte = 0; byte < 16 && at + byte < bytes; ++byte) {
      char hex[8];
      std::snprintf(hex, sizeof hex, "%s%02x", byte % 4 == 0 ? " " : "",
                    static_cast<unsigned>(data[offset + at + byte]));
      line += hex;
    }
    text += line + "\n";
  }
  return text;
}

/// Two ranks with two experts each. Rank 1 sends its token 0 to experts 0 and 1, its token 1 to experts 3 and 1, both
/// with weights 0.5 and 0.25; rank 0 sends nothing. Rows are all 1.0 and all 2.0. What rank 1 wrote to rank 0 in both
/// ops.
struct LowLatencyBytes {
  std::vector<std::byte> dispatch, combine;
};

void play_rank(int rank, Engine& engine, LowLatencyBytes& kept) {
  const Shape shape = small_shape();
  const std::int64_t tokens = rank == 1 ? kTokens : 0, slab_rows = kRanks * kTokens;
  const std::array<std::int32_t, 4> experts = {0, 1, 3, 1};
  const std::array<float, 4> weights = {0.5f, 0.25f, 0.5f, 0.25f};
  std::vector<std::uint16_t> x(kTokens * kHidden, 0x3F80), out(x.size());
  std::fill(x.begin() + kHidden, x.end(), std::uint16_t{0x4000});
  Routing routing;
  routing.experts = TensorView::dense(experts.data(), DType::kI32, {tokens, 2});
  routing.weights = TensorView::dense(weights.data(), DType::kF32, {tokens, 2});

  std::vector<std::uint16_t> slab(static_cast<std::size_t>(2 * slab_rows * kHidden));
  std::vector<std::int32_t> counts(2), source(static_cast<std::size_t>(2 * slab_rows));
  std::vector<std::int64_t> range(2 * kRanks);
  ExpertSlabs slabs;
  slabs.x = TensorView::dense(slab.data(), DType::kBF16, {2, slab_rows, kHidden});
  slabs.counts = TensorView::dense(counts.data(), DType::kI32, {2});
  slabs.source = TensorView::dense(source.data(), DType::kI32, {2, slab_rows});
  slabs.range = TensorView::dense(range.data(), DType::kI64, {2, kRanks});
  LowLatencyOptions options;
  options.wait = true;
  engine.low_latency_dispatch(shape, TensorView::dense(x.data(), DType::kBF16, {tokens, kHidden}), routing, slabs, {},
                              options);
  engine.low_latency_combine(shape, slabs, routing, TensorView::dense(out.data(), DType::kBF16, {tokens, kHidden}), {},
                             options);

  if (rank != 0) return;
  const core::WindowLayout at = core::WindowLayout::make(small_budget(), kRanks);
  const auto read = [&](std::uint32_t turn) {
    const TensorView region =
        engine.memory(Mode::kLowLatency, at.low_latency_region(1, turn) - at.low_latency, at.low_latency_region_bytes);
    return std::vector<std::byte>(region.as<std::byte>(), region.as<std::byte>() + at.low_latency_region_bytes);
  };
  const std::uint32_t first = protocol::next_epoch(protocol::kFirstEpoch);
  kept = {read(first), read(protocol::next_epoch(first))};
}

LowLatencyBytes play() {
  LowLatencyBytes kept;
  LocalGroup group(kRanks);
  LocalGroup::run_threads(kRanks, [&](int rank) {
    const auto bootstrap = group.member(rank);
    Engine engine = Engine::create(small_budget(), Topology::discover(*bootstrap), Tuning{}, *bootstrap);
    play_rank(rank, engine, kept);
    engine.close();
  });
  return kept;
}

void expect_in_document(const std::string& block) {
  std::ifstream file(ANYEP_SOURCE_DIR "/docs/layouts.md");
  const std::string document{std::istreambuf_iterator<char>(file), {}};
  EXPECT_NE(document.find("```\n" + block + "```\n"), std::string::npos) << "docs/layouts.md lacks this block:\n"
                                                                         << block;
}

TEST(LayoutDocument, ShowsTheWindow) {
  const core::WindowLayout at = core::WindowLayout::make(small_budget(), kRanks);
  std::string block;
  const auto add = [&](const char* name, std::uint64_t offset) {
    block += line_of("%06llx  %s", static_cast<unsigned long long>(offset), name);
  };
  add("header", at.header);
  add("doorbell", at.doorbell);
  add("announced [2]", at.announced);
  add("described [8]", at.described);
  const char* const streams[] = {"lists", "dispatch", "combine"};
  for (int stream = 0; stream < core::kNumStreams; ++stream) {
    add((std::string("arrived [2], ") + streams[stream]).c_str(), at.arrived[stream]);
    add((std::string("credit [2], ") + streams[stream]).c_str(), at.credit[stream]);
    add((std::string("offer [2][2], ") + streams[stream]).c_str(), at.offer[stream]);
  }
  add("grant [2]", at.grant);
  add("barrier [2]", at.barrier);
  add("low_latency_arrived [2]", at.low_latency_arrived);
  add("low_latency_asked [2]", at.low_latency_asked);
  add("counts [2][2][5]", at.counts);
  add("mailboxes [2][2][8192]", at.mailboxes);
  add(("low-latency regions [4][2][" + std::to_string(at.low_latency_region_bytes) + "]").c_str(), at.low_latency);
  add(("slots [2][2][" + std::to_string(at.slot_region_bytes) + "]").c_str(), at.slots);
  add(("heap, " + std::to_string(at.heap_bytes) + " bytes").c_str(), at.heap);
  add("spare", at.heap + at.heap_bytes);
  add("end", at.bytes);
  EXPECT_EQ(at.count_width, 5u);
  expect_in_document(block);
}

TEST(LayoutDocument, ShowsWords) {
  const auto hex = [](std::uint64_t word) { return static_cast<unsigned long long>(word); };
  const std::uint16_t code = protocol::make_code(core::kStreamCombine, 0);
  const std::uint32_t first = protocol::next_epoch(protocol::kFirstEpoch);
  std::string block = line_of("%016llx  arrived, combine, generation beef: turn 1 has landed",
                              hex(protocol::make_mark(0xBEEF, first, code)));
  block += line_of("%016llx  credit, combine, as formatted: two turns may be written",
                   hex(protocol::make_mark(0xBEEF, protocol::next_epoch(first), code)));
  block += line_of("%016llx  the mark after the last one before the wrap",
                   hex(protocol::make_mark(0xBEEF, protocol::next_epoch(0xFFFF'FFFF), code)));
  block += line_of("%016llx  counts, notify turn 1: 7 rows", hex(protocol::make_count(first, 7)));
  expect_in_document(block);
}

TEST(LayoutDocument, ShowsATurnOfRows) {
  core::RowFields fields;
  fields.bytes[core::kFieldX] = 7168;
  fields.bytes[core::kFieldScales] = 224;
  fields.bytes[core::kFieldExperts] = fields.bytes[core::kFieldWeights] = 32;
  const core::TurnLayout turn = core::TurnLayout::make(fields, 0xF, 100);
  std::string block;
  const char* const names[] = {"x", "scales", "experts", "weights"};
  for (int field = 0; field < 4; ++field) {
    block += line_of("%06llx  %s: 100 rows of %llu bytes", static_cast<unsigned long long>(turn.offset[field]),
                     names[field], static_cast<unsigned long long>(turn.stride[field]));
  }
  block += line_of("%06llx  end", static_cast<unsigned long long>(turn.bytes));
  expect_in_document(block);
}

TEST(LayoutDocument, ShowsLowLatencyRegions) {
  const LowLatencyBytes kept = play();
  const core::DispatchRegionLayout out = core::dispatch_region(small_shape(), kRanks, Wire::kBF16);
  std::string block = dump(kept.dispatch.data(), 0, 16) + dump(kept.dispatch.data(), out.counts, 8);
  for (std::uint64_t record = 0; record < 2; ++record) {
    const std::uint64_t at = out.records + record * out.stride;
    block += dump(kept.dispatch.data(), at, 8);
    block += dump(kept.dispatch.data(), at + out.choices, record == 0 ? 16 : 8);
    block += dump(kept.dispatch.data(), at + out.payload, 32);
  }
  expect_in_document(block);

  const core::CombineRegionLayout back = core::combine_region(small_shape(), kRanks, true, Wire::kBF16);
  block = dump(kept.combine.data(), 0, 16) + dump(kept.combine.data(), back.weights, 48) +
          dump(kept.combine.data(), back.answer, 16);
  expect_in_document(block);
}

}  // namespace
}  // namespace anyep
