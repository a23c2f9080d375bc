// anyep plan: what one call would do, as data.
#include <anyep/plan.h>
#include <fmt/core.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "bench/support/budget.h"
#include "bench/support/machine.h"
#include "bench/support/memory_copy.h"
#include "cli/command.h"
#include "cli/memory_use.h"
#include "cli/shape_options.h"
#include "cli/table.h"

namespace anyep::cli {
namespace {

const std::map<std::string, Op> kOps = {{"route", Op::kRoute},
                                        {"dispatch", Op::kDispatch},
                                        {"combine", Op::kCombine},
                                        {"low_latency_dispatch", Op::kLowLatencyDispatch},
                                        {"low_latency_combine", Op::kLowLatencyCombine},
                                        {"barrier", Op::kBarrier}};
const std::map<std::string, Wire> kWires = {
    {"bf16", Wire::kBF16}, {"fp8", Wire::kFP8}, {"ue8m0", Wire::kUE8M0}, {"logfmt", Wire::kLogFMT}};

struct PlanOptions {
  ShapeOptions shape;
  Op op = Op::kDispatch;
  std::int64_t tokens = 4096;
  std::string dtype = "bf16";
  Wire wire = Wire::kBF16;
  bool hook = false, measure = false, json = false;
  int rank = 0;
  double copy_gbs = -1;
  std::string rows_bytes, low_latency_bytes;
};

/// GB/s that each of `num_ranks` threads copies while the others copy too.
double measured_copy_gbs(int num_ranks) {
  constexpr std::int64_t kBytes = 64 << 20;
  std::vector<double> least(static_cast<std::size_t>(num_ranks), 1e300);
  std::vector<std::thread> threads;
  for (double& best : least) {
    threads.emplace_back([&best] {
      bench::MemoryCopy copy(kBytes);
      for (int i = 0; i < 6; ++i) best = std::min(best, copy.copy(i % bench::MemoryCopy::kNumMethods));
    });
  }
  for (std::thread& thread : threads) thread.join();
  return static_cast<double>(kBytes) / *std::max_element(least.begin(), least.end()) * 1e-3;
}

Shape shape_of(const PlanOptions& options) {
  Shape shape = options.shape.shape(options.tokens);
  if (options.op == Op::kDispatch && options.dtype == "fp8") {
    shape.dtype = DType::kF8E4M3;
    shape.num_scales = static_cast<int>((shape.hidden + 127) / 128);
  }
  return shape;
}

Budget budget_of(const PlanOptions& options, const Shape& shape) {
  Budget budget;
  const int ranks = options.shape.ranks;
  budget.max_experts = std::max(budget.max_experts, shape.num_experts);
  budget.rows_bytes =
      options.rows_bytes.empty()
          ? bench::rows_bytes_for(bench::most_rows_bytes(ranks, options.tokens, 2 * shape.hidden), ranks)
          : parse_bytes(options.rows_bytes, "--rows-bytes");
  const bool low_latency = options.op == Op::kLowLatencyDispatch || options.op == Op::kLowLatencyCombine;
  if (!options.low_latency_bytes.empty()) {
    budget.low_latency_bytes = parse_bytes(options.low_latency_bytes, "--low-latency-bytes");
  } else if (low_latency) {
    budget.low_latency_bytes = low_latency_bytes_for(shape, ranks);
  }
  return budget;
}

nlohmann::ordered_json as_json(const Plan& plan, double copy_gbs) {
  auto regions = nlohmann::ordered_json::array(), choices = nlohmann::ordered_json::array();
  for (const PlanRegion& region : plan.memory) {
    regions.push_back({{"name", region.name},
                       {"memory", region.memory},
                       {"offset", region.offset},
                       {"bytes", region.bytes},
                       {"backed", region.backed}});
  }
  for (const Choice& choice : plan.choices) {
    choices.push_back({{"what", choice.what}, {"value", choice.value}, {"why", choice.why}});
  }
  return {{"op", name_of(plan.op)},
          {"ranks", plan.num_ranks},
          {"rank", plan.rank},
          {"experts", plan.shape.num_experts},
          {"topk", plan.shape.top_k},
          {"hidden", plan.shape.hidden},
          {"tokens", plan.shape.max_tokens},
          {"dtype", name_of(plan.shape.dtype)},
          {"local_experts", plan.local_experts},
          {"tokens_per_turn", plan.tokens_per_turn},
          {"regions", plan.regions},
          {"threads", plan.num_threads},
          {"row_bytes", plan.row_bytes},
          {"sums_at_expert_rank", plan.sums_at_expert_rank},
          {"memory", regions},
          {"choices", choices},
          {"wire_bytes", plan.wire_bytes},
          {"copy_gbs", copy_gbs},
          {"predicted_us", plan.predicted_us}};
}

/// Runs the calls of the op's mode on real ranks.
int print_memory(const PlanOptions& options) {
  MemoryOptions how;
  how.team.num_ranks = options.shape.ranks;
  how.model = options.shape.model_preset();
  how.low_latency = options.op == Op::kLowLatencyDispatch || options.op == Op::kLowLatencyCombine;
  how.tokens = options.tokens;
  const MemoryUse use = measure_memory(how);
  for (const std::string& failure : use.failures) fmt::print(stderr, "{}\n", failure);
  if (!use.failures.empty()) return kExitEngine;
  const bench::Machine machine = bench::this_machine();
  const double deviation = static_cast<double>(use.measured_bytes()) / static_cast<double>(use.planned_bytes) - 1;
  if (options.json) {
    const nlohmann::ordered_json line = {{"cpu", machine.cpu_model},
                                         {"cores", machine.cores},
                                         {"kernel", machine.kernel},
                                         {"op", "memory"},
                                         {"kind", how.low_latency ? "ll" : "ht"},
                                         {"dtype", "bf16"},
                                         {"memory", "caller"},
                                         {"tokens", options.tokens},
                                         {"hidden", how.model.hidden},
                                         {"topk", how.model.top_k},
                                         {"experts", how.model.num_experts},
                                         {"ranks", options.shape.ranks},
                                         {"sms", 1},
                                         {"routing", "uniform:1"},
                                         {"shared_bytes", use.shared_bytes},
                                         {"private_bytes", use.private_bytes},
                                         {"measured_bytes", use.measured_bytes()},
                                         {"planned_bytes", use.planned_bytes}};
    fmt::print("{}\n", line.dump());
  } else {
    fmt::print("{}, {} tokens, {} ranks: a rank occupies {} ({} in memory files, {} private), planned {} ({:+.1f} %)\n",
               how.low_latency ? "low latency, a pair" : "route, dispatch, combine in the caller's memory",
               options.tokens, options.shape.ranks, bytes_text(use.measured_bytes()), bytes_text(use.shared_bytes),
               bytes_text(use.private_bytes), bytes_text(use.planned_bytes), deviation * 100);
  }
  return kExitOk;
}

int print_plan(const PlanOptions& options) {
  if (options.rank >= options.shape.ranks)
    throw UsageError(fmt::format("--rank = {}, allowed: below --ranks", options.rank));
  if (options.measure) return print_memory(options);
  const Shape shape = shape_of(options);
  const double copy_gbs =
      options.copy_gbs >= 0 ? options.copy_gbs : measured_copy_gbs(std::min(options.shape.ranks, 16));
  LowLatencyOptions call;
  call.hook = options.hook;
  call.wire = options.wire;
  const Plan plan =
      make_plan(options.op, shape, budget_of(options, shape), Topology::one_host(options.shape.ranks, options.rank),
                Tuning::from_environment(), call, copy_gbs);
  if (options.json) {
    fmt::print("{}\n", as_json(plan, copy_gbs).dump(2));
    return kExitOk;
  }
  fmt::print("{}", plan.to_text());
  fmt::print("\nmemory of one rank: window {}, staging {}, private {}\n", bytes_text(plan.bytes("window")),
             bytes_text(plan.bytes("staging")), bytes_text(plan.bytes("private")));
  fmt::print("memory copy: {} GB/s per rank{}\n", number(copy_gbs),
             options.copy_gbs >= 0 ? ", as given" : ", measured just now");
  return kExitOk;
}

}  // namespace

Command add_plan(CLI::App& parent) {
  CLI::App* const app = parent.add_subcommand("plan", "what one call would do, its memory and its predicted time");
  const auto options = std::make_shared<PlanOptions>();
  options->shape.add_to(*app);
  app->add_option("--op", options->op, "which call")
      ->transform(CLI::CheckedTransformer(kOps, CLI::ignore_case))
      ->default_str("dispatch");
  app->add_option("--tokens", options->tokens, "tokens per rank")->capture_default_str()->check(CLI::NonNegativeNumber);
  app->add_option("--dtype", options->dtype, "rows of dispatch: bf16, or fp8 with scales")
      ->capture_default_str()
      ->check(CLI::IsMember({"bf16", "fp8"}));
  app->add_option("--wire", options->wire, "low latency: how rows travel (bf16, fp8, ue8m0, logfmt)")
      ->transform(CLI::CheckedTransformer(kWires, CLI::ignore_case))
      ->default_str("bf16");
  app->add_flag("--hook", options->hook, "low latency: with a receive hook");
  app->add_option("--rank", options->rank, "whose plan")->capture_default_str()->check(CLI::NonNegativeNumber);
  app->add_option("--copy-gbs", options->copy_gbs, "memory-copy rate per rank; not given = measured")
      ->check(CLI::PositiveNumber);
  app->add_option("--rows-bytes", options->rows_bytes, "budget for rows (64M, 2G); not given = enough for the call");
  app->add_option("--low-latency-bytes", options->low_latency_bytes, "budget for low latency, likewise");
  app->add_flag("--measure", options->measure, "run the op's mode on real ranks and set its memory beside the plans'");
  app->add_flag("--json", options->json, "print JSON");
  app->footer(
      "Examples:\n"
      "  anyep plan --op combine --tokens 4096 --ranks 2\n"
      "  anyep plan --op low_latency_dispatch --tokens 128 --wire fp8 --hook --model kimi-k2\n"
      "A shape that cannot be served is refused with the reason, exit code 2.");
  return {app, [options] { return print_plan(*options); }};
}

}  // namespace anyep::cli
