// anyep run: the main job.
#include <anyep/config.h>
#include <fmt/format.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "bench/support/memory_copy.h"
#include "cli/command.h"
#include "cli/job.h"
#include "cli/run_report.h"
#include "cli/shape_options.h"
#include "core/limits.h"

namespace anyep::cli {
namespace {

/// Stands in where there is neither --text nor a repository around.
constexpr const char* kFallbackText =
    "A mixture of experts keeps many small networks and lets a gate choose a few of them for every token. When the "
    "experts "
    "are spread over ranks, every rank sends each of its tokens to the ranks that host the chosen experts, waits for "
    "what the "
    "others send, lets its own experts work, and returns one answer per token and rank. The home of the token adds the "
    "answers in the order of the ranks and rounds once, so that the sum has the same bits on every run. In training "
    "and "
    "prefill thousands of tokens travel at a time and the bandwidth of the links decides; in decode a handful of "
    "tokens "
    "travel and every microsecond of waiting counts. Both directions count their rows first, then move each row "
    "straight "
    "to its place, and a flag that is written after the rows says that they have landed.";

struct RunOptions {
  ShapeOptions shape;
  std::vector<std::string> text;
  bool threads = false, processes = false, json = false, quiet = false;
  std::uint64_t seed = 1;
  std::int64_t tokens = 0;
  std::int64_t chunk = 0;
  int decode_steps = 48;
  std::int64_t decode_tokens = 8;
};

/// README.md and docs/**/*.md of the working directory, in a fixed order.
std::vector<std::string> repository_documents() {
  namespace fs = std::filesystem;
  std::vector<std::string> paths;
  std::error_code ignored;
  if (fs::exists("docs", ignored)) {
    for (const auto& entry : fs::recursive_directory_iterator("docs", ignored)) {
      if (entry.is_regular_file(ignored) && entry.path().extension() == ".md") paths.push_back(entry.path().string());
    }
  }
  std::sort(paths.begin(), paths.end());
  if (fs::exists("README.md", ignored)) paths.insert(paths.begin(), "README.md");
  return paths;
}

struct Source {
  workload::TextWorkload text;
  std::string name;
};

Source load_text(const RunOptions& options, const workload::ModelPreset& model) {
  workload::TextWorkload::Options how;
  how.hidden = model.hidden;
  how.gate = workload::gate_of(model);
  how.seed = options.seed;
  const std::vector<std::string> paths = options.text.empty() ? repository_documents() : options.text;
  if (paths.empty()) return {workload::TextWorkload::from_text(kFallbackText, how), "built-in text"};
  std::string name = paths.front();
  if (paths.size() > 1) name += fmt::format(" and {} more", paths.size() - 1);
  return {workload::TextWorkload::load(paths, how), name};
}

/// Several calls, each large enough to be about bandwidth.
std::int64_t chunk_of(std::int64_t tokens, int ranks) {
  constexpr std::int64_t kCalls = 8, kLeast = 64, kMost = 1024;
  return std::clamp(tokens / (kCalls * ranks) + 1, kLeast, kMost);
}

JobOptions job_options(const RunOptions& options, const workload::ModelPreset& model, std::int64_t num_words) {
  JobOptions job;
  job.team = {options.shape.ranks, options.threads};
  job.model = model;
  job.seed = options.seed;
  job.tokens = options.tokens > 0 ? options.tokens : num_words;
  job.chunk_tokens = options.chunk > 0 ? options.chunk : chunk_of(job.tokens, options.shape.ranks);
  job.decode_steps = options.decode_steps;
  job.decode_tokens = options.decode_tokens;
  job.show_progress = !options.quiet;
  return job;
}

int run(const RunOptions& options) {
  const double start = bench::now_us();
  const workload::ModelPreset model = options.shape.model_preset();
  if (model.hidden % core::kRowGranule != 0) {
    throw UsageError(fmt::format("--hidden = {}, allowed: multiples of {}, since the job sends one byte per element",
                                 model.hidden, core::kRowGranule));
  }
  Source source = load_text(options, model);
  const Job job(job_options(options, model, source.text.num_words()), source.text);
  const int capacity = static_cast<int>(job.num_chunks()) + job.options.decode_steps + 64;
  Board board(options.shape.ranks, kNumSeries, capacity);
  const std::vector<std::string> failures = run_job(job, board);
  const RunReport report = make_report(job, board, source.name, failures, (bench::now_us() - start) * 1e-6);
  fmt::print("{}", options.json ? report.to_json() : report.to_text());
  if (!failures.empty()) return kExitEngine;
  return report.wrong == 0 ? kExitOk : kExitWrong;
}

}  // namespace

Command add_run(CLI::App& parent) {
  CLI::App* const app = parent.add_subcommand(
      "run", "the main job: text through gate, dispatch, experts and combine, checked bit for bit");
  const auto options = std::make_shared<RunOptions>();
  options->shape.add_to(*app);
  app->add_option("--text", options->text,
                  "files whose words are the tokens; not given = README.md and docs/**/*.md here");
  app->add_option("--tokens", options->tokens,
                  "words of all ranks together; not given = the whole text, longer = from its start again")
      ->check(CLI::PositiveNumber);
  app->add_option("--chunk", options->chunk,
                  "high throughput: tokens per rank and call; not given = an eighth of the text")
      ->check(CLI::Range(1, 65536));
  app->add_option("--decode-steps", options->decode_steps, "decode steps, 0 = none")
      ->capture_default_str()
      ->check(CLI::Range(0, 1 << 20));
  app->add_option("--decode-tokens", options->decode_tokens, "decode: tokens per rank and micro-batch")
      ->capture_default_str()
      ->check(CLI::Range(1, 4096));
  app->add_option("--seed", options->seed, "of embedding, gate and experts")->capture_default_str();
  auto* const threads = app->add_flag("--threads", options->threads, "ranks are threads of one process");
  app->add_flag("--processes", options->processes, "ranks are processes (this is the default)")->excludes(threads);
  app->add_flag("--json", options->json, "print JSON");
  app->add_flag("--quiet", options->quiet, "no progress");
  app->footer(
      "What happens: every word is embedded and routed by a gate. High throughput takes the whole text, chunk by "
      "chunk:\n"
      "FP8 rows are dispatched, each rank's experts answer, BF16 answers are combined. Then decode takes small batches "
      "in\n"
      "two micro-batches with receive hooks. Every element of every result is compared with a computation from the "
      "text.\n"
      "\n"
      "Examples:\n"
      "  anyep run                                     four ranks, DeepSeek-V3's shape\n"
      "  anyep run --ranks 2 --model gpt-oss-120b --threads\n"
      "  anyep run --text book.txt --tokens 8192 --json\n"
      "Exit codes: 0 everything equal, 1 a wrong value, 2 bad arguments, 3 an engine failed or a rank died.");
  return {app, [options] { return run(*options); }};
}

}  // namespace anyep::cli
