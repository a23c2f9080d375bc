// anyep bench: how fast, in the manner of nccl-tests.
#include <anyep/config.h>
#include <fmt/format.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "bench/support/machine.h"
#include "bench/support/record.h"
#include "cli/command.h"
#include "cli/shape_options.h"
#include "cli/sweep.h"
#include "cli/table.h"
#include "core/limits.h"

namespace anyep::cli {
namespace {

struct BenchOptions {
  ShapeOptions shape;
  std::int64_t begin = 8, end = 4096, factor = 8;
  int iterations = 20, warm_up = 5, check = 1;
  std::vector<std::string> ops = {"all"};
  std::string dtype = "both", memory = "both", profile = "uniform", trace, write_trace, device = "cpu";
  int num_sms = 0;
  std::uint64_t seed = 1;
  std::int64_t most_pair_tokens = 128;
  std::vector<double> late_us;
  bool threads = false, processes = false, json = false, quiet = false;
};

bool wants(const std::vector<std::string>& list, const std::string& name) {
  return std::find(list.begin(), list.end(), name) != list.end() ||
         std::find(list.begin(), list.end(), "all") != list.end();
}

std::vector<workload::Batch> batches_of(const BenchOptions& options, const workload::ModelPreset& model) {
  if (!options.trace.empty()) return {workload::split(workload::read_trace(options.trace), options.shape.ranks)};
  std::vector<workload::Batch> batches;
  for (std::int64_t tokens = options.begin; tokens <= options.end; tokens *= options.factor) {
    workload::Request request;
    request.profile = workload::parse_profile(options.profile);
    request.seed = options.seed;
    request.num_experts = model.num_experts;
    request.top_k = model.top_k;
    request.num_ranks = options.shape.ranks;
    request.tokens_per_rank = tokens;
    batches.push_back(workload::generate(request));
  }
  return batches;
}

std::vector<FigureSpec> figures_of(const BenchOptions& options, std::int64_t tokens) {
  std::vector<bench::RowType> types;
  if (options.dtype != "fp8") types.push_back(bench::RowType::kBF16);
  if (options.dtype != "bf16") types.push_back(bench::RowType::kFP8);
  std::vector<bench::Memory> memories;
  if (options.memory != "caller") memories.push_back(bench::Memory::kWindow);
  if (options.memory != "window") memories.push_back(bench::Memory::kCaller);

  std::vector<FigureSpec> figures;
  for (const BenchOp op : {BenchOp::kDispatch, BenchOp::kDispatchCached, BenchOp::kCombine}) {
    if (!wants(options.ops, name_of(op))) continue;
    for (const bench::RowType type : types) {
      // Answers are BF16, whatever was dispatched.
      if (op == BenchOp::kCombine && type != types.front()) continue;
      for (const bench::Memory memory : memories) figures.push_back({tokens, op, type, memory});
    }
  }
  if (wants(options.ops, "pair") && tokens <= options.most_pair_tokens) {
    for (const bench::RowType type : types) figures.push_back({tokens, BenchOp::kPair, type, bench::Memory::kCaller});
  }
  // Beside each other, so that both meet the same state of the machine.
  std::vector<FigureSpec> with_late;
  for (const FigureSpec& aligned : figures) {
    with_late.push_back(aligned);
    for (const double late_us : options.late_us) {
      with_late.push_back(aligned);
      with_late.back().late_us = late_us;
    }
  }
  return with_late;
}

SweepOptions sweep_options(const BenchOptions& options, const std::string& routing) {
  SweepOptions sweep;
  sweep.team = {options.shape.ranks, options.threads};
  sweep.device = options.device == "cuda" ? Device::kCuda : Device::kCpu;
  sweep.num_sms = options.num_sms;
  if (sweep.device == Device::kCuda && !options.late_us.empty()) {
    throw UsageError("--late is for CPU ranks: calls of GPU ranks queue up behind each other");
  }
  sweep.model = options.shape.model_preset();
  if (options.dtype != "bf16" && sweep.model.hidden % core::kRowGranule != 0) {
    throw UsageError(fmt::format("--hidden = {}, allowed with FP8 rows: multiples of {}. Or use --dtype bf16",
                                 sweep.model.hidden, core::kRowGranule));
  }
  sweep.routing = routing;
  sweep.batches = batches_of(options, sweep.model);
  sweep.iterations = options.iterations;
  sweep.warm_up = options.warm_up;
  sweep.check = options.check != 0;
  sweep.show_progress = !options.quiet;
  for (const workload::Batch& batch : sweep.batches) {
    sweep.model.top_k = batch.top_k;
    const std::int64_t tokens = *std::max_element(batch.tokens_per_rank.begin(), batch.tokens_per_rank.end());
    const std::vector<FigureSpec> figures = figures_of(options, tokens);
    sweep.figures.insert(sweep.figures.end(), figures.begin(), figures.end());
  }
  if (sweep.figures.empty()) {
    throw UsageError(fmt::format(
        "nothing to measure: pairs are measured up to {} tokens (--most-pair-tokens), and -b {} -e {} has none",
        options.most_pair_tokens, options.begin, options.end));
  }
  return sweep;
}

std::string optional_number(const std::optional<double>& value) {
  return value ? number(*value) : "-";
}

void print_table(const SweepOptions& sweep, const SweepResult& result) {
  fmt::print("anyep {} on {}, {} ranks as {}\nrouting {}, the last size:\n{}\n\n", version(),
             result.machine.gpu.empty() ? result.machine.cpu_model
                                        : fmt::format("{} x {}", result.machine.gpus, result.machine.gpu),
             sweep.team.num_ranks, sweep.team.threads ? "threads" : "processes", sweep.routing,
             workload::measure(sweep.batches.back(), sweep.batches.back().num_experts, sweep.team.num_ranks).to_text());
  Table table({{"tokens", "per rank"},
               {"hidden", ""},
               {"k", ""},
               {"E", ""},
               {"dtype", "of dispatched rows", true},
               {"op", "dispatch: with routing; dispatch_cached: without; pair: low-latency dispatch and combine", true},
               {"memory", "where dispatch's output or combine's input lies", true},
               {"late", "us by which one rank, each in turn, calls later than the others"},
               {"us p50", "slowest rank, median"},
               {"us p99", "slowest rank, 99th percentile"},
               {"algbw", "GB/s of rows at the busiest rank, its own included"},
               {"busbw", "GB/s of rows between ranks, busiest direction of the busiest rank"},
               {"of copy", "algbw over the memory-copy ceiling of this run"},
               {"#wrong", "elements that differ from what they must be, before and after the measurement"}});
  for (const bench::Figure& figure : result.figures) {
    table.add({std::to_string(figure.tokens), std::to_string(figure.hidden), std::to_string(figure.topk),
               std::to_string(figure.experts), figure.dtype, figure.op, figure.memory.empty() ? "-" : figure.memory,
               figure.late_us > 0 ? number(figure.late_us) : "-", number(figure.us_p50), number(figure.us_p99),
               optional_number(figure.logical_gbs()), optional_number(figure.wire_gbs()),
               figure.share() ? fmt::format("{:.0f} %", *figure.share() * 100) : "-",
               sweep.check ? std::to_string(figure.wrong) : "N/A"});
  }
  fmt::print("{}\n{}\n", table.to_text(), table.legend());
  if (result.ceiling_gbs > 0) {
    fmt::print("{}: {} GB/s per rank ({}), all ranks at once\n",
               sweep.device == Device::kCuda ? "rows to all peers" : "memory copy", number(result.ceiling_gbs),
               result.ceiling_method);
  }
}

int measure(const BenchOptions& options) {
  if (options.end < options.begin) throw UsageError("-e is below -b");
  const std::string routing =
      options.trace.empty() ? fmt::format("{}:{}", options.profile, options.seed) : "trace:" + options.trace;
  SweepOptions sweep = sweep_options(options, routing);
  if (!options.write_trace.empty()) workload::write_trace(options.write_trace, sweep.batches.back());
  SweepResult result = run_sweep(sweep);
  for (const std::string& failure : result.failures) fmt::print(stderr, "{}\n", failure);
  if (!result.failures.empty()) return kExitEngine;
  if (options.json) {
    for (const bench::Figure& figure : result.figures) fmt::print("{}\n", bench::to_json_line(figure, result.machine));
  } else {
    print_table(sweep, result);
  }
  const bool wrong =
      std::any_of(result.figures.begin(), result.figures.end(), [](const auto& figure) { return figure.wrong != 0; });
  return wrong ? kExitWrong : kExitOk;
}

void add_options(CLI::App& app, BenchOptions& options) {
  options.shape.add_to(app);
  app.add_option("-b", options.begin, "fewest tokens per rank")->capture_default_str()->check(CLI::PositiveNumber);
  app.add_option("-e", options.end, "most tokens per rank")->capture_default_str()->check(CLI::PositiveNumber);
  app.add_option("-f", options.factor, "factor from one size to the next")
      ->capture_default_str()
      ->check(CLI::Range(2, 1 << 20));
  app.add_option("-n", options.iterations, "iterations")->capture_default_str()->check(CLI::Range(1, 1 << 20));
  app.add_option("-w", options.warm_up, "warm-up iterations")->capture_default_str()->check(CLI::Range(0, 1 << 20));
  app.add_option("-c", options.check, "1 = check every element before and after")
      ->capture_default_str()
      ->check(CLI::Range(0, 1));
  app.add_option("--op", options.ops, "dispatch, dispatch_cached, combine, pair, all")
      ->delimiter(',')
      ->check(CLI::IsMember({"dispatch", "dispatch_cached", "combine", "pair", "all"}))
      ->default_str("all");
  app.add_option("--dtype", options.dtype, "bf16, fp8, both")
      ->capture_default_str()
      ->check(CLI::IsMember({"bf16", "fp8", "both"}));
  app.add_option("--memory", options.memory, "window, caller, both: where dispatch writes and combine reads")
      ->capture_default_str()
      ->check(CLI::IsMember({"window", "caller", "both"}));
  app.add_option("--profile", options.profile, "routing; `anyep info` lists the forms")->capture_default_str();
  app.add_option("--seed", options.seed, "of the routing")->capture_default_str();
  app.add_option("--trace", options.trace, "replay the ids and weights of this file instead of a profile");
  app.add_option("--write-trace", options.write_trace, "write the routing of the last size to this file");
  app.add_option("--most-pair-tokens", options.most_pair_tokens, "pairs are measured up to this many tokens")
      ->capture_default_str();
  app.add_option("--late", options.late_us, "also with one rank, each in turn, late by so many microseconds: 10,50")
      ->delimiter(',')
      ->check(CLI::Range(0.1, 1e6));
  app.add_option("--device", options.device,
                 "cpu, or cuda: ranks share the GPUs in turn (as processes they then need MPS)")
      ->capture_default_str()
      ->check(CLI::IsMember({"cpu", "cuda"}));
  app.add_option("--sms", options.num_sms, "GPU ranks: most SMs of an operation, 0 = the plan chooses")
      ->capture_default_str()
      ->check(CLI::Range(0, 1024));
  auto* const threads = app.add_flag("--threads", options.threads, "ranks are threads of one process");
  app.add_flag("--processes", options.processes, "ranks are processes (this is the default)")->excludes(threads);
  app.add_flag("--json", options.json, "print JSON lines in the record format (bench/METRICS.md)");
  app.add_flag("--quiet", options.quiet, "no progress");
}

}  // namespace

Command add_bench(CLI::App& parent) {
  CLI::App* const app = parent.add_subcommand("bench", "how fast, in the manner of nccl-tests");
  const auto options = std::make_shared<BenchOptions>();
  add_options(*app, *options);
  app->footer(
      "Every iteration measures all figures of a size in turn. High throughput starts with cold caches; a pair is the "
      "mean of\n"
      "20 back to back, warm. Times are those of the slowest rank. On GPUs calls queue up behind each other, and the "
      "20\n"
      "pairs are a replayed graph (bench/METRICS.md).\n"
      "\n"
      "Examples:\n"
      "  anyep bench --ranks 2 --op dispatch,combine -b 4096 -e 4096\n"
      "  anyep bench --ranks 2 --op pair -b 1 -e 128 -f 2 --dtype fp8 --json\n"
      "  anyep bench --ranks 2 --op pair -b 8 -e 128 -f 4 --late 10,50\n"
      "  anyep bench --device cuda --ranks 2 --sms 16 -b 4096 -e 4096 --op dispatch,combine\n"
      "  anyep bench --model kimi-k2 --profile lognormal:1.1 --write-trace routing.txt\n"
      "Exit codes: 0 measured, 1 a wrong value, 2 bad arguments, 3 an engine failed or a rank died.");
  return {app, [options] { return measure(*options); }};
}

}  // namespace anyep::cli
