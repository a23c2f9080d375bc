#include "cli/run_report.h"

#include <anyep/config.h>
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "bench/support/memory_copy.h"
#include "bench/support/samples.h"
#include "cli/table.h"

namespace anyep::cli {
namespace {

constexpr int kBarWidth = 40;

struct Rows {
  std::vector<double> wire;     ///< per call: rows of the busiest direction of the busiest rank
  std::vector<double> logical;  ///< per call: rows that the busiest rank receives, own ones included
};

Rows rows_of(const Job& job, const Board& board) {
  Rows rows;
  for (int rank = 0; rank < job.options.team.num_ranks; ++rank) {
    const std::vector<double> own = board.values(rank, kOwnRows), sent = board.values(rank, kSentRows),
                              received = board.values(rank, kReceivedRows);
    rows.wire.resize(std::max(rows.wire.size(), received.size()), 0);
    rows.logical.resize(rows.wire.size(), 0);
    for (std::size_t i = 0; i < received.size(); ++i) {
      rows.wire[i] = std::max({rows.wire[i], sent[i], received[i]});
      rows.logical[i] = std::max(rows.logical[i], own[i] + received[i]);
    }
  }
  return rows;
}

double median_rate(const std::vector<double>& rows, const std::vector<double>& us, double row_bytes) {
  std::vector<double> rates;
  for (std::size_t i = 0; i < std::min(rows.size(), us.size()); ++i) {
    if (us[i] > 0) rates.push_back(rows[i] * row_bytes / us[i] * 1e-3);
  }
  return bench::median(rates);
}

PhaseFigures figures(const char* mode, const char* name, const std::vector<double>& us) {
  PhaseFigures phase;
  phase.mode = mode;
  phase.name = name;
  phase.calls = static_cast<std::int64_t>(us.size());
  phase.us_p50 = bench::median(us);
  phase.us_p99 = bench::percentile(us, 99);
  return phase;
}

void add_throughput(RunReport& report, const Job& job, const Board& board) {
  const Rows rows = rows_of(job, board);
  const double hidden = static_cast<double>(report.hidden);
  const double scale_bytes = static_cast<double>((report.hidden + 127) / 128 * 4);
  struct Phase {
    Series series;
    const char* name;
    double row_bytes;
  };
  for (const Phase& phase : {Phase{kPrepare, "embed, cast", 0}, Phase{kRoute, "route", 0},
                             Phase{kDispatch, "dispatch FP8", hidden + scale_bytes}, Phase{kExperts, "experts", 0},
                             Phase{kCombine, "combine BF16", 2 * hidden}}) {
    const std::vector<double> us = board.slowest(phase.series);
    PhaseFigures line = figures("high throughput", phase.name, us);
    if (phase.row_bytes > 0) {
      line.wire_gbs = median_rate(rows.wire, us, phase.row_bytes);
      line.logical_gbs = median_rate(rows.logical, us, phase.row_bytes);
      line.of_ceiling = report.ceiling_gbs > 0 ? line.logical_gbs / report.ceiling_gbs : 0;
    }
    report.phases.push_back(line);
  }
}

void add_decode(RunReport& report, const Board& board) {
  struct Phase {
    Series series;
    const char* name;
  };
  for (const Phase& phase : {Phase{kDispatchSend, "dispatch, send"}, Phase{kDispatchReceive, "dispatch, receive"},
                             Phase{kDecodeExperts, "experts"}, Phase{kCombineSend, "combine, send"},
                             Phase{kCombineReceive, "combine, receive"}, Phase{kDecodeStep, "whole step"}}) {
    report.phases.push_back(figures("decode", phase.name, board.slowest(phase.series)));
  }
}

void add_ceiling(RunReport& report, const Job& job, const Board& board) {
  for (int method = 0; method < bench::MemoryCopy::kNumMethods; ++method) {
    const double us = bench::median(board.slowest(kMemcpy + method));
    const double gbs = us > 0 ? static_cast<double>(job.options.copy_bytes) / us * 1e-3 : 0;
    if (gbs <= report.ceiling_gbs) continue;
    report.ceiling_gbs = gbs;
    report.ceiling_method = bench::MemoryCopy::name(method);
  }
}

std::string optional_number(double value) {
  return value > 0 ? number(value) : "-";
}

std::string phase_table(const RunReport& report) {
  Table table({{"mode", "", true},
               {"phase", "", true},
               {"calls", "how often; decode: steps, each of two micro-batches, whose times are added"},
               {"median", "time of one call on the slowest rank"},
               {"p99", "the same, 99th percentile"},
               {"wire GB/s", "bytes of rows that the busiest rank sends or receives from others, over time"},
               {"logical GB/s", "bytes of rows that the busiest rank receives, its own included, over time"},
               {"of ceiling", "logical over what a rank copies in memory while all ranks copy, measured in this run"}});
  std::string mode;
  for (const PhaseFigures& phase : report.phases) {
    if (phase.calls == 0) continue;
    table.add({phase.mode == mode ? "" : phase.mode, phase.name, std::to_string(phase.calls),
               microseconds_text(phase.us_p50), microseconds_text(phase.us_p99), optional_number(phase.wire_gbs),
               optional_number(phase.logical_gbs),
               phase.of_ceiling > 0 ? fmt::format("{:.0f} %", phase.of_ceiling * 100) : "-"});
    mode = phase.mode;
  }
  return table.to_text() + "\n" + table.legend();
}

std::string rank_bars(const workload::Statistics& routing) {
  double most = 0;
  for (const std::int64_t rows : routing.rows_per_rank) most = std::max(most, static_cast<double>(rows));
  std::string text;
  for (std::size_t rank = 0; rank < routing.rows_per_rank.size(); ++rank) {
    text += fmt::format("  rank {:<3} {:>8} {}\n", rank, routing.rows_per_rank[rank],
                        bar(static_cast<double>(routing.rows_per_rank[rank]), most, kBarWidth));
  }
  return text;
}

}  // namespace

RunReport make_report(const Job& job, const Board& board, const std::string& text_name,
                      const std::vector<std::string>& failures, double seconds) {
  RunReport report;
  const JobOptions& options = job.options;
  report.model = std::string(options.model.name);
  report.source = text_name;
  report.ranks_are = options.team.threads ? "threads" : "processes";
  report.num_ranks = options.team.num_ranks;
  report.hidden = options.model.hidden;
  report.tokens = options.tokens;
  report.words = job.text.num_words();
  report.num_experts = options.model.num_experts;
  report.top_k = options.model.top_k;
  report.failures = failures;
  report.seconds = seconds;
  add_ceiling(report, job, board);
  add_throughput(report, job, board);
  add_decode(report, board);
  report.routing = job.routing();
  report.compared = static_cast<std::int64_t>(board.sum(kCompared));
  report.wrong = static_cast<std::int64_t>(board.sum(kWrong));
  return report;
}

std::string RunReport::to_text() const {
  std::string text =
      fmt::format("anyep {}: {} ({} elements, {} experts, top-{}) on {} ranks as {}\n{} tokens of {} ({} words)\n\n",
                  version(), model, hidden, num_experts, top_k, num_ranks, ranks_are, tokens, source, words);
  if (!failures.empty()) {
    for (const std::string& failure : failures) text += failure + "\n";
    return text + fmt::format("FAILED after {:.1f} s\n", seconds);
  }
  text += phase_table(*this);
  text += fmt::format("\nmemory copy: {} GB/s per rank ({}), all {} ranks at once\n", number(ceiling_gbs),
                      ceiling_method, num_ranks);
  text += fmt::format(
      "\ntokens per rank (high throughput; a token counts once at every rank that hosts one of its experts)\n{}{}\n",
      rank_bars(routing), routing.to_text());
  text += fmt::format("\n{} elements compared, {} wrong: {} ({:.1f} s)\n", compared, wrong, wrong == 0 ? "ok" : "WRONG",
                      seconds);
  return text;
}

std::string RunReport::to_json() const {
  nlohmann::ordered_json lines = nlohmann::ordered_json::array();
  for (const PhaseFigures& phase : phases) {
    if (phase.calls == 0) continue;
    nlohmann::ordered_json line = {{"mode", phase.mode},
                                   {"phase", phase.name},
                                   {"calls", phase.calls},
                                   {"us_p50", phase.us_p50},
                                   {"us_p99", phase.us_p99}};
    line["wire_gbs"] = phase.wire_gbs > 0 ? nlohmann::ordered_json(phase.wire_gbs) : nullptr;
    line["logical_gbs"] = phase.logical_gbs > 0 ? nlohmann::ordered_json(phase.logical_gbs) : nullptr;
    line["ratio"] = phase.of_ceiling > 0 ? nlohmann::ordered_json(phase.of_ceiling) : nullptr;
    lines.push_back(line);
  }
  const nlohmann::ordered_json all = {{"version", version()},
                                      {"model", model},
                                      {"text", source},
                                      {"words", words},
                                      {"ranks", num_ranks},
                                      {"ranks_are", ranks_are},
                                      {"hidden", hidden},
                                      {"experts", num_experts},
                                      {"topk", top_k},
                                      {"tokens", tokens},
                                      {"phases", lines},
                                      {"ceiling_gbs", ceiling_gbs},
                                      {"ceiling_method", ceiling_method},
                                      {"rows_per_rank", routing.rows_per_rank},
                                      {"rank_max_over_mean", routing.rank_rows_max_over_mean},
                                      {"distinct_ranks_per_token", routing.distinct_ranks_per_token},
                                      {"compared", compared},
                                      {"wrong", wrong},
                                      {"failures", failures},
                                      {"seconds", seconds}};
  return all.dump(2) + "\n";
}

}  // namespace anyep::cli
