// anyep layout: byte maps of the shared memory, from the same functions that the engine uses.
#include <anyep/plan.h>
#include <fmt/format.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench/support/budget.h"
#include "cli/command.h"
#include "cli/shape_options.h"
#include "cli/table.h"
#include "core/buffers.h"
#include "core/fp8.h"
#include "core/layout.h"
#include "core/low_latency.h"

namespace anyep::cli {
namespace {

struct Range {
  std::string name;
  std::uint64_t offset = 0, bytes = 0;
  std::string meaning;
};

struct Map {
  std::string name, about;
  std::vector<Range> ranges;
  std::uint64_t bytes = 0;
};

struct LayoutOptions {
  ShapeOptions shape;
  std::int64_t tokens = 128;
  std::string dtype = "bf16", rows_bytes;
  bool json = false;
};

/// Ends each range where the next begins.
Map finish(Map map) {
  std::stable_sort(map.ranges.begin(), map.ranges.end(),
                   [](const Range& a, const Range& b) { return a.offset < b.offset; });
  for (std::size_t i = 0; i < map.ranges.size(); ++i) {
    const std::uint64_t end = i + 1 < map.ranges.size() ? map.ranges[i + 1].offset : map.bytes;
    map.ranges[i].bytes = end - map.ranges[i].offset;
  }
  return map;
}

Map window_map(const core::WindowLayout& at) {
  Map map{"window", "memory of one rank that peers map and write", {}, at.bytes};
  const auto add = [&map](const char* name, std::uint64_t offset, const char* meaning) {
    map.ranges.push_back({name, offset, 0, meaning});
  };
  add("header", at.header, "magic, version, ranks, generation");
  add("doorbell", at.doorbell, "where this rank sleeps, and who rings");
  add("announced", at.announced, "per peer: the operation it is in");
  add("described", at.described, "what this rank's current call asked, in words");
  static constexpr const char* kStreams[] = {"lists", "dispatch", "combine"};
  for (int stream = 0; stream < core::kNumStreams; ++stream) {
    const std::string of = std::string(" (") + kStreams[stream] + ")";
    map.ranges.push_back({"arrived" + of, at.arrived[stream], 0, "per producer: its turns that have landed"});
    map.ranges.push_back({"credit" + of, at.credit[stream], 0, "per consumer: turns that may be written"});
    map.ranges.push_back({"offer" + of, at.offer[stream], 0, "per producer: what a turn holds and where"});
  }
  add("grant", at.grant, "per consumer: where rows go, and room for how many");
  add("barrier", at.barrier, "per peer: barriers reached");
  add("low-latency arrived", at.low_latency_arrived, "per peer: turns whose rows have landed");
  add("low-latency asked", at.low_latency_asked, "per peer: turns whose weights have landed");
  add("counts", at.counts, "two boards of {epoch, value}: rows, pairs per expert, tokens of each source");
  add("mailboxes", at.mailboxes, "per source, two turns: which tokens come here, as bits");
  add("low-latency regions", at.low_latency, "four turns of every source: records out, rows back");
  add("slots", at.slots, "per source, two turns: combine's rows that no window holds");
  add("heap", at.heap, "rows of make_rows()");
  add("spare", at.heap + at.heap_bytes,
      "never used: Engine::memory() shows as many bytes as rows_bytes, staging is not here");
  return finish(std::move(map));
}

Map staging_map(const core::WindowLayout& at) {
  Map map{"staging",
          "memory of one rank that peers map for reading only: dispatch's rows from the caller's tensors",
          {},
          at.staging_bytes()};
  for (std::uint32_t turn = 0; turn < core::kRegions; ++turn) {
    map.ranges.push_back(
        {fmt::format("region {}", turn), at.staging_region(turn), 0, "rows of one turn, field by field"});
  }
  return finish(std::move(map));
}

core::RowFields fields_of(const Shape& shape) {
  core::RowFields fields;
  fields.bytes[core::kFieldX] =
      static_cast<std::uint32_t>(shape.hidden * static_cast<std::int64_t>(size_of(shape.dtype)));
  fields.bytes[core::kFieldScales] = static_cast<std::uint32_t>(shape.num_scales * 4);
  fields.bytes[core::kFieldExperts] = static_cast<std::uint32_t>(shape.top_k) * 4;
  fields.bytes[core::kFieldWeights] = static_cast<std::uint32_t>(shape.top_k) * 4;
  return fields;
}

Map turn_map(const core::RowFields& fields, std::uint64_t region_bytes) {
  constexpr std::uint32_t kAll = (1u << core::kFirstExtraField) - 1;
  const std::uint64_t rows = core::TurnLayout::rows_that_fit(fields, kAll, region_bytes);
  const core::TurnLayout turn = core::TurnLayout::make(fields, kAll, rows);
  Map map{"turn",
          fmt::format("one region of staging, {} rows: high-throughput dispatch of the caller's tensors", rows),
          {},
          turn.bytes};
  static constexpr const char* kNames[] = {"x", "scales", "experts", "weights"};
  for (int field = 0; field < core::kFirstExtraField; ++field) {
    if (turn.stride[field] == 0) continue;
    map.ranges.push_back({kNames[field], turn.offset[field], 0, fmt::format("{} bytes per row", turn.stride[field])});
  }
  return finish(std::move(map));
}

std::vector<Map> low_latency_maps(const LayoutOptions& options, const Shape& shape) {
  const int ranks = options.shape.ranks;
  const bool fp8 = options.dtype == "fp8";
  const auto out = core::dispatch_region(shape, ranks, fp8 ? Wire::kFP8 : Wire::kBF16);
  Map region{
      "low-latency dispatch", fmt::format("one turn of one source, {} tokens at most", options.tokens), {}, out.bytes};
  region.ranges = {
      {"head", 0, 0, "turn, code, tokens and records of the source"},
      {"counts", out.counts, 0, "int32 per local expert"},
      {"records", out.records, 0, fmt::format("{} bytes per token sent here, in token order", out.stride)}};
  Map record{"record", "one token of a low-latency dispatch", {}, out.stride};
  record.ranges = {{"token", 0, 0, "token, number of choices"},
                   {"choices", out.choices, 0, "{local expert, position} pairs"},
                   {"payload", out.payload, 0, fp8 ? "E4M3" : "bfloat16"}};
  if (fp8) record.ranges.push_back({"scales", out.scales, 0, "float32 per 128 elements"});
  const auto back = core::combine_region(shape, ranks, true, Wire::kBF16);
  Map answer{"low-latency combine", "one turn of one peer, rows summed at the experts' rank", {}, back.bytes};
  answer.ranges = {{"head", 0, 0, "of what the home asks"},
                   {"weights", back.weights, 0, "{token, expert, position, weight} per choice"},
                   {"answer", back.answer, 0, "head of the answer"},
                   {"rows", back.rows, 0, fmt::format("{} bytes per token", back.row_stride)}};
  return {finish(std::move(region)), finish(std::move(record)), finish(std::move(answer))};
}

std::vector<Map> maps_of(const LayoutOptions& options) {
  Shape shape = options.shape.shape(options.tokens);
  Budget budget;
  budget.max_experts = std::max(budget.max_experts, shape.num_experts);
  budget.low_latency_bytes = low_latency_bytes_for(shape, options.shape.ranks);
  if (options.dtype == "fp8") {
    shape.dtype = DType::kF8E4M3;
    shape.num_scales = static_cast<int>(core::num_fp8_scales(shape.hidden));
  }
  budget.rows_bytes =
      options.rows_bytes.empty()
          ? bench::rows_bytes_for(bench::most_rows_bytes(options.shape.ranks, options.tokens, 2 * shape.hidden),
                                  options.shape.ranks)
          : parse_bytes(options.rows_bytes, "--rows-bytes");
  const core::WindowLayout at = core::WindowLayout::make(budget, options.shape.ranks);
  std::vector<Map> maps = {window_map(at), staging_map(at), turn_map(fields_of(shape), at.staging_region_bytes)};
  for (Map& map : low_latency_maps(options, shape)) maps.push_back(std::move(map));
  return maps;
}

void print_text(const Map& map) {
  fmt::print("{}: {} ({} bytes)\n", map.name, map.about, map.bytes);
  Table table({{"offset", ""}, {"bytes", ""}, {"", "", true}, {"what", "", true}, {"", "", true}});
  for (const Range& range : map.ranges) {
    table.add({fmt::format("{:#x}", range.offset), std::to_string(range.bytes), bytes_text(range.bytes), range.name,
               range.meaning});
  }
  fmt::print("{}\n", table.to_text());
}

int print_layout(const LayoutOptions& options) {
  const std::vector<Map> maps = maps_of(options);
  if (!options.json) {
    for (const Map& map : maps) print_text(map);
    return kExitOk;
  }
  auto all = nlohmann::ordered_json::array();
  for (const Map& map : maps) {
    auto ranges = nlohmann::ordered_json::array();
    for (const Range& range : map.ranges) {
      ranges.push_back(
          {{"name", range.name}, {"offset", range.offset}, {"bytes", range.bytes}, {"meaning", range.meaning}});
    }
    all.push_back({{"name", map.name}, {"about", map.about}, {"bytes", map.bytes}, {"ranges", ranges}});
  }
  fmt::print("{}\n", all.dump(2));
  return kExitOk;
}

}  // namespace

Command add_layout(CLI::App& parent) {
  CLI::App* const app = parent.add_subcommand("layout", "byte maps of the memory that ranks share");
  const auto options = std::make_shared<LayoutOptions>();
  options->shape.add_to(*app);
  app->add_option("--tokens", options->tokens, "tokens per rank")->capture_default_str()->check(CLI::Range(1, 1 << 20));
  app->add_option("--dtype", options->dtype, "rows of dispatch: bf16, or fp8 with scales")
      ->capture_default_str()
      ->check(CLI::IsMember({"bf16", "fp8"}));
  app->add_option("--rows-bytes", options->rows_bytes, "budget for rows (64M, 2G); not given = enough for the tokens");
  app->add_flag("--json", options->json, "print JSON");
  app->footer(
      "Offsets come from the functions that the engine itself uses, for one rank of the group.\n"
      "Example: anyep layout --ranks 8 --model qwen3-30b --tokens 256 --dtype fp8");
  return {app, [options] { return print_layout(*options); }};
}

}  // namespace anyep::cli
