#include <anyep/plan.h>
#include <fmt/format.h>

#include <algorithm>
#include <string>

#include "core/buffers.h"
#include "core/check.h"
#include "core/limits.h"
#include "core/low_latency.h"
#include "core/perf_model.h"

namespace anyep {
namespace {

using core::round_up;

/// Private memory of an engine itself: watcher and worker stacks as far as touched, queues, tables.
/// Measured by bench/run_cpu.py on Linux 6.18 with glibc 2.36.
constexpr std::uint64_t kEnginePrivateBytes = 160 * 1024;

/// Builds one plan; each function adds what one op needs.
class Planner {
 public:
  Planner(Op op, const Shape& shape, const Budget& budget, const Topology& topology, const Tuning& tuning,
          const LowLatencyOptions& options, double copy_gbs)
      : shape_(shape),
        options_(options),
        tuning_(tuning),
        layout_(core::WindowLayout::make(budget, topology.num_ranks())),
        copy_gbs_(copy_gbs) {
    plan_.op = op;
    plan_.shape = shape;
    plan_.num_ranks = topology.num_ranks();
    plan_.rank = topology.rank;
    plan_.local_experts = core::expert_block(shape.num_experts, plan_.num_ranks, plan_.rank).count;
    tokens_ = static_cast<std::uint64_t>(shape.max_tokens);
    ranks_ = static_cast<std::uint64_t>(plan_.num_ranks);
    traffic_ = core::uniform_traffic(plan_.num_ranks, shape.num_experts, shape.top_k);
  }

  Plan make() {
    choose("backend", "cpu", "ranks of one host share memory through descriptors");
    choose("cuda backend", "rejected", "not in this build");
    choose("threads per rank", "1", "one thread fills its core's share of the memory rate; decision 0004");
    region("words, records, count board", "window", layout_.mailboxes, layout_.mailboxes);
    add("engine", "private", kEnginePrivateBytes);
    switch (plan_.op) {
      case Op::kRoute:
        route();
        break;
      case Op::kDispatch:
        dispatch();
        break;
      case Op::kCombine:
        combine();
        break;
      case Op::kLowLatencyDispatch:
        low_latency_dispatch();
        break;
      case Op::kLowLatencyCombine:
        low_latency_combine();
        break;
      case Op::kBarrier:
        choose("barrier", "one word per peer", "a sum could not say who is missing");
        break;
    }
    return std::move(plan_);
  }

 private:
  void choose(std::string what, std::string value, std::string why) {
    plan_.choices.push_back({std::move(what), std::move(value), std::move(why)});
  }
  void region(std::string name, std::string memory, std::uint64_t reserved, std::uint64_t backed) {
    plan_.memory.push_back({std::move(name), std::move(memory), next_offset_, reserved,
                            std::min(round_up(backed, core::kPageBytes), round_up(reserved, core::kPageBytes))});
  }
  void add(std::string name, std::string memory, std::uint64_t bytes) {
    region(std::move(name), std::move(memory), bytes, bytes);
  }
  std::uint64_t received_rows() const {
    return static_cast<std::uint64_t>(traffic_.copied * static_cast<double>(tokens_));
  }

  void predict(double rows_copied_per_token, double wire_per_token, std::int64_t row_bytes) {
    plan_.row_bytes = row_bytes;
    plan_.wire_bytes =
        static_cast<std::uint64_t>(wire_per_token * static_cast<double>(tokens_) * static_cast<double>(row_bytes));
    plan_.predicted_us = core::floor_us(rows_copied_per_token * static_cast<double>(tokens_), row_bytes, copy_gbs_);
  }

  // ---- high throughput ----

  void route() {
    choose("counts", "words that carry their epoch", "no flag and no fence per value; two slots by parity of the turn");
    choose("token lists", "one bit per token and rank", "a handle is whole after route(), as values");
    const std::uint64_t bytes = ranks_ * core::kRegions * core::kMailboxBytes;
    region("mailboxes", "window", bytes,
           ranks_ * round_up(std::min(core::kMailboxBytes, tokens_ / 8 + 1), core::kPageBytes));
    add("handle", "private", tokens_ * ranks_ * sizeof(std::int32_t) + received_rows() * sizeof(std::int32_t));
    predict(0, 0, 0);
  }

  core::RowFields row_fields() const {
    core::RowFields fields;
    fields.bytes[core::kFieldX] =
        static_cast<std::uint32_t>(shape_.hidden * static_cast<std::int64_t>(size_of(shape_.dtype)));
    fields.bytes[core::kFieldScales] = static_cast<std::uint32_t>(shape_.num_scales) * sizeof(float);
    fields.bytes[core::kFieldExperts] = static_cast<std::uint32_t>(shape_.top_k) * sizeof(std::int32_t);
    fields.bytes[core::kFieldWeights] = static_cast<std::uint32_t>(shape_.top_k) * sizeof(float);
    return fields;
  }

  void cut_turns(const core::RowFields& fields, std::uint32_t present, std::uint64_t region_bytes) {
    const std::uint64_t fit = core::TurnLayout::rows_that_fit(fields, present, region_bytes);
    if (fit == 0) {
      core::throw_capacity(name_of(plan_.op), "bytes of one turn of a ring (a share of budget.rows_bytes)",
                           fields.total() + core::kMaxFields * core::kArrayAlignment + 1, region_bytes,
                           "Use a larger rows_bytes.");
    }
    plan_.tokens_per_turn =
        static_cast<std::int64_t>(std::min<std::uint64_t>(fit, std::max<std::uint64_t>(tokens_, 1)));
    plan_.regions = static_cast<int>(core::kRegions);
  }
  std::uint64_t turns() const {
    return core::ceil_div(std::max<std::uint64_t>(tokens_, 1), static_cast<std::uint64_t>(plan_.tokens_per_turn));
  }

  void dispatch() {
    const core::RowFields fields = row_fields();
    const std::uint32_t all = 0xF;
    cut_turns(fields, all, layout_.staging_region_bytes);
    const std::uint64_t staged =
        core::TurnLayout::make(fields, all, static_cast<std::uint64_t>(plan_.tokens_per_turn)).bytes;
    choose("rows into make_rows() memory", "push", "written once, by the sender, at their final place");
    choose("rows into any other tensor", fmt::format("fetch from staging, {} tokens a turn", plan_.tokens_per_turn),
           "peers cannot write the caller's memory; a turn stays in the cache between writer and reader");
    choose("ids and weights", "fetch from staging", "the receiver translates them to local ids");
    choose("staging through the whole window", "rejected", "rings of two turns need less memory and stay cached");
    region("staging", "staging", layout_.staging_bytes(), staged * std::min<std::uint64_t>(core::kRegions, turns()));
    region("heap", "window", layout_.heap_bytes, 0);
    const std::uint64_t payload = fields.bytes[core::kFieldX] + fields.bytes[core::kFieldScales];
    predict(traffic_.copied, traffic_.wire, static_cast<std::int64_t>(payload));
  }

  void combine() {
    core::RowFields fields;
    fields.bytes[core::kFieldX] =
        static_cast<std::uint32_t>(shape_.hidden * static_cast<std::int64_t>(size_of(shape_.dtype)));
    cut_turns(fields, 1u, layout_.slot_region_bytes);
    const std::uint64_t slots =
        core::TurnLayout::make(fields, 1u, static_cast<std::uint64_t>(plan_.tokens_per_turn)).bytes;
    choose("x in make_rows() memory", "gather", "the token's home reads rows where they lie; no slots");
    choose("x in any other tensor", fmt::format("slots, {} tokens a turn", plan_.tokens_per_turn),
           "the expert's rank pushes; a turn stays in the cache between writer and reader");
    choose("sum", "FP32, ranks ascending, one rounding", "specification 10.2");
    region("slots", "window", ranks_ * core::kRegions * layout_.slot_region_bytes,
           (ranks_ - 1) * slots * std::min<std::uint64_t>(core::kRegions, turns()));
    predict(traffic_.copied, traffic_.wire, fields.bytes[core::kFieldX]);
  }

  // ---- low latency ----

  void low_latency_memory(const char* name, std::uint64_t used_per_source) {
    region(name, "window", core::kLowLatencyRegions * ranks_ * layout_.low_latency_region_bytes,
           core::kLowLatencyRegions * ranks_ * round_up(used_per_source, core::kPageBytes));
  }

  void low_latency_dispatch() {
    const auto at = core::dispatch_region(shape_, plan_.num_ranks, options_.wire);
    must_fit(at.bytes);
    const double records = traffic_.distinct_ranks / static_cast<double>(ranks_) * static_cast<double>(tokens_);
    choose("rows", "one record per (token, rank)", "the receiver copies it to each chosen expert's slab");
    choose("regions", "4, no credit words",
           "two ops in flight; three regions overwrite (models/low_latency_regions.py)");
    choose("flag", "one mark per peer and turn", "counts travel under it; decision 0002");
    low_latency_memory("low-latency regions", at.records + static_cast<std::uint64_t>(records) * at.stride);
    predict(traffic_.copied + shape_.top_k, traffic_.wire,
            core::dispatch_payload_bytes(shape_, options_.wire) + 4 * core::num_dispatch_scales(shape_, options_.wire));
  }

  void low_latency_combine() {
    plan_.sums_at_expert_rank = core::sums_at_expert_rank(options_, tuning_.exact_combine);
    const auto at = core::combine_region(shape_, plan_.num_ranks, plan_.sums_at_expert_rank, options_.wire);
    must_fit(at.bytes);
    const double tokens_there = traffic_.distinct_ranks / static_cast<double>(ranks_) * static_cast<double>(tokens_);
    const double rows = plan_.sums_at_expert_rank ? tokens_there
                                                  : static_cast<double>(shape_.top_k) / static_cast<double>(ranks_) *
                                                        static_cast<double>(tokens_);
    if (plan_.sums_at_expert_rank) {
      choose("rows", "one per (token, rank)", "weights travel first; the expert's rank adds up; specification 10.3");
    } else {
      choose("rows", "one per choice",
             options_.hook ? "a hook's send half waits for nobody"
                           : "LogFMT codes rows, exact arithmetic rounds once, both at the source");
    }
    low_latency_memory("low-latency regions", at.rows + static_cast<std::uint64_t>(rows) * at.row_stride);
    predict(rows / std::max(1.0, static_cast<double>(tokens_)) + shape_.top_k, traffic_.wire,
            core::combine_row_bytes(shape_, options_.wire));
  }

  void must_fit(std::uint64_t bytes) const {
    if (bytes <= layout_.low_latency_region_bytes) return;
    core::throw_capacity(name_of(plan_.op), "budget.low_latency_bytes",
                         core::kLowLatencyRegions * ranks_ * round_up(bytes, core::kPageBytes),
                         core::kLowLatencyRegions * ranks_ * layout_.low_latency_region_bytes,
                         "low_latency_bytes_for() gives what every form of a shape needs.");
  }

  Plan plan_;
  const Shape shape_;
  const LowLatencyOptions options_;
  const Tuning tuning_;
  const core::WindowLayout layout_;
  const double copy_gbs_;
  core::Traffic traffic_;
  std::uint64_t tokens_ = 0, ranks_ = 1, next_offset_ = 0;
};

void check_shape(Op op, const Shape& shape, const Budget& budget) {
  const auto refuse = [&](const char* name, std::int64_t got, std::int64_t low, std::int64_t high) {
    if (got < low || got > high) {
      core::throw_argument(name_of(op), name, fmt::to_string(got), fmt::format("{}..{}", low, high));
    }
  };
  refuse("shape.num_experts", shape.num_experts, 1, budget.max_experts);
  refuse("shape.top_k", shape.top_k, 1, std::min(core::kMaxTopK, shape.num_experts));
  refuse("shape.hidden", shape.hidden, 1, core::kMaxHidden);
  refuse("shape.max_tokens", shape.max_tokens, 0, core::kMaxTokens);
  const std::int64_t row_bytes = shape.hidden * static_cast<std::int64_t>(size_of(shape.dtype));
  if (row_bytes % core::kRowGranule != 0) {
    core::throw_argument(name_of(op), "shape.hidden", fmt::to_string(shape.hidden),
                         fmt::format("row bytes a multiple of {}", core::kRowGranule));
  }
}

}  // namespace

Plan make_plan(Op op, const Shape& shape, const Budget& budget, const Topology& topology, const Tuning& tuning,
               const LowLatencyOptions& options, double copy_gbs) {
  check_shape(op, shape, budget);
  return Planner(op, shape, budget, topology, tuning, options, copy_gbs).make();
}

std::uint64_t Plan::bytes(const char* memory_kind) const {
  std::uint64_t sum = 0;
  for (const PlanRegion& one : memory) sum += one.memory == memory_kind ? one.backed : 0;
  return sum;
}

std::string Plan::to_text() const {
  std::string text =
      fmt::format("{}: hidden {} {}, top-{} of {} experts ({} here), rank {} of {}, {} tokens per rank\n", name_of(op),
                  shape.hidden, name_of(shape.dtype), shape.top_k, shape.num_experts, local_experts, rank, num_ranks,
                  shape.max_tokens);
  text += "choices\n";
  for (const Choice& one : choices) text += fmt::format("  {:<30} {:<40} {}\n", one.what, one.value, one.why);
  text += "memory\n";
  for (const PlanRegion& one : memory) {
    text += fmt::format("  {:<30} {:<8} reserved {:>14}  backed {:>14} bytes\n", one.name, one.memory, one.bytes,
                        one.backed);
  }
  text += fmt::format("  {:<30} {:<8} {:>23}  backed {:>14} bytes\n", "sum", "", "",
                      bytes("window") + bytes("staging") + bytes("private"));
  text += fmt::format("traffic\n  row {} bytes, leaving this rank {} bytes\n", row_bytes, wire_bytes);
  if (predicted_us > 0) text += fmt::format("  predicted floor {:.1f} us at the measured copy rate\n", predicted_us);
  return text;
}

}  // namespace anyep
