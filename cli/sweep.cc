#include "cli/sweep.h"

#include <anyep/engine.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>

#include "bench/support/budget.h"
#include "bench/support/low_latency_case.h"
#include "bench/support/memory_copy.h"
#include "bench/support/samples.h"
#include "cli/sweep_series.h"
#include "cli/table.h"

namespace anyep::cli {
namespace {

constexpr std::uint64_t kContentSeed = 0x51ed;
constexpr std::int64_t kCopyBytes = 64 << 20;
/// Below this many tokens a rate says nothing: the time is that of messages.
constexpr std::int64_t kFewestTokensForRates = 128;

Budget budget_of(const SweepOptions& options) {
  Budget budget;
  const int ranks = options.team.num_ranks;
  std::int64_t heap = 0;
  for (const FigureSpec& figure : options.figures) {
    if (is_pair(figure)) {
      budget.low_latency_bytes = std::max(budget.low_latency_bytes, pair_bytes(options, figure));
    } else {
      // Outputs and answers of both row types may lie in the window at once.
      heap = std::max(heap, 4 * bench::most_rows_bytes(ranks, figure.tokens, 2 * options.model.hidden));
    }
  }
  budget.rows_bytes = bench::rows_bytes_for(heap, ranks);
  budget.max_experts = std::max(budget.max_experts, options.batches.front().num_experts);
  return budget;
}

/// What one rank times for one figure.
struct Timed {
  int figure = 0;
  bool cold = true;
  int repeats = 1;
  double late_us = 0;
  std::function<void()> call;
  std::function<std::int64_t()> wrong;
};

/// All figures of one batch on one rank.
class BatchRun {
 public:
  BatchRun(const SweepOptions& options, const workload::Batch& batch, int rank, Engine& engine, Board& board)
      : options_(options),
        batch_(batch),
        rank_(rank),
        engine_(engine),
        board_(board),
        series_{static_cast<int>(options.figures.size())},
        content_(options.model.hidden, engine.num_ranks(), std::max<std::int64_t>(1, most_tokens(batch)),
                 kContentSeed) {
    for (int figure = 0; figure < series_.figures; ++figure) {
      if (options.figures[static_cast<std::size_t>(figure)].tokens == most_tokens(batch)) add(figure);
    }
  }
  void run(bench::CacheFlush& flush, bench::MemoryCopy& copy);

 private:
  void add(int figure);
  void add_pair(int figure, const FigureSpec& spec);
  bench::HighThroughputCase& high_throughput(bench::RowType type, bench::Memory memory);
  const bench::HighThroughputData& data(bench::RowType type);
  void check();
  double time(const Timed& timed, int iteration);

  const SweepOptions& options_;
  const workload::Batch& batch_;
  int rank_;
  Engine& engine_;
  Board& board_;
  SeriesOf series_;
  bench::RandomContent content_;
  std::map<bench::RowType, std::unique_ptr<bench::HighThroughputData>> data_;
  std::map<std::pair<bench::RowType, bench::Memory>, std::unique_ptr<bench::HighThroughputCase>> cases_;
  std::map<bench::RowType, std::unique_ptr<bench::LowLatencyData>> pair_data_;
  std::map<bench::RowType, std::unique_ptr<bench::LowLatencyCase>> pair_cases_;
  std::vector<Timed> timed_;
};

const bench::HighThroughputData& BatchRun::data(bench::RowType type) {
  auto& slot = data_[type];
  if (!slot) slot = std::make_unique<bench::HighThroughputData>(batch_, rank_, options_.model.hidden, type, content_);
  return *slot;
}

bench::HighThroughputCase& BatchRun::high_throughput(bench::RowType type, bench::Memory memory) {
  auto& slot = cases_[{type, memory}];
  if (!slot) slot = std::make_unique<bench::HighThroughputCase>(engine_, data(type), memory);
  return *slot;
}

void BatchRun::add(int figure) {
  const FigureSpec& spec = options_.figures[static_cast<std::size_t>(figure)];
  if (is_pair(spec)) return add_pair(figure, spec);
  bench::HighThroughputCase& one = high_throughput(spec.type, spec.memory);
  const bench::HighThroughputData& of = data(spec.type);
  Timed timed;
  timed.figure = figure;
  timed.late_us = spec.late_us;
  if (spec.op == BenchOp::kCombine) {
    timed.call = [&one] { one.combine(); };
    timed.wrong = [&one] { return one.wrong_combine(); };
  } else {
    const bool cached = spec.op == BenchOp::kDispatchCached;
    timed.call = [&one, cached] { cached ? one.dispatch_cached() : one.dispatch(); };
    timed.wrong = [&one] { return one.wrong_dispatch(); };
  }
  timed_.push_back(std::move(timed));
  board_.add(rank_, series_.wire_rows(figure), static_cast<double>(std::max(of.sent_rows(), of.received_rows())));
  board_.add(rank_, series_.logical_rows(figure), static_cast<double>(of.num_rows()));
}

void BatchRun::add_pair(int figure, const FigureSpec& spec) {
  const Wire wire = spec.type == bench::RowType::kFP8 ? Wire::kFP8 : Wire::kBF16;
  auto& data = pair_data_[spec.type];
  auto& slot = pair_cases_[spec.type];
  if (!data) data = std::make_unique<bench::LowLatencyData>(batch_, rank_, options_.model.hidden, wire, content_);
  if (!slot) slot = std::make_unique<bench::LowLatencyCase>(engine_, *data);
  bench::LowLatencyCase* const one = slot.get();
  Timed timed;
  timed.figure = figure;
  timed.late_us = spec.late_us;
  timed.cold = false;
  timed.repeats = kPairsPerIteration;
  timed.call = [one] {
    one->dispatch();
    one->combine();
  };
  timed.wrong = [one] { return one->wrong_dispatch() + one->wrong_combine(); };
  timed_.push_back(std::move(timed));
  board_.add(rank_, series_.wire_rows(figure), static_cast<double>(data->wire_rows()));
}

void BatchRun::check() {
  if (!options_.check) return;
  for (auto& [key, one] : cases_) one->poison();
  for (const Timed& timed : timed_) {
    timed.call();
    board_.add(rank_, series_.wrong(timed.figure), static_cast<double>(timed.wrong()));
  }
}

/// The clocks of all ranks start at the barrier: the late rank's lateness is in its time, and in its peers' as far as they
/// wait for it.
double BatchRun::time(const Timed& timed, int iteration) {
  const bool late = timed.late_us > 0 && iteration % engine_.num_ranks() == rank_;
  engine_.barrier();
  const double start = bench::now_us();
  for (int repeat = 0; repeat < timed.repeats; ++repeat) {
    for (const double before = bench::now_us(); late && bench::now_us() - before < timed.late_us;) {
    }
    timed.call();
  }
  return (bench::now_us() - start) / timed.repeats;
}

void BatchRun::run(bench::CacheFlush& flush, bench::MemoryCopy& copy) {
  check();
  const bool cold = std::any_of(timed_.begin(), timed_.end(), [](const Timed& timed) { return timed.cold; });
  for (int i = -options_.warm_up; i < options_.iterations; ++i) {
    for (const Timed& timed : timed_) {
      if (timed.cold) flush.run();
      const double us = time(timed, i + options_.warm_up);
      if (i >= 0) board_.add(rank_, series_.time(timed.figure), us);
    }
    for (int method = 0; cold && method < bench::MemoryCopy::kNumMethods; ++method) {
      engine_.barrier();
      const double us = copy.copy(method);
      if (i >= 0) board_.add(rank_, series_.copy(method), us);
    }
  }
  check();
}

void add_ceiling(SweepResult& result, const Board& board, const SeriesOf& series) {
  for (int method = 0; method < bench::MemoryCopy::kNumMethods; ++method) {
    const double us = bench::median(board.slowest(series.copy(method)));
    const double gbs = us > 0 ? static_cast<double>(kCopyBytes) / us * 1e-3 : 0;
    if (gbs <= result.ceiling_gbs) continue;
    result.ceiling_gbs = gbs;
    result.ceiling_method = bench::MemoryCopy::name(method);
  }
}

}  // namespace

bench::Figure figure_of(const SweepOptions& options, int index, const Board& board, double ceiling_gbs) {
  const FigureSpec& spec = options.figures[static_cast<std::size_t>(index)];
  const SeriesOf series{static_cast<int>(options.figures.size())};
  const std::vector<double> us = board.slowest(series.time(index));
  const std::int64_t hidden = options.model.hidden;
  const bool fp8_rows = spec.type == bench::RowType::kFP8 && spec.op != BenchOp::kCombine && !is_pair(spec);
  bench::Figure figure;
  figure.op = name_of(spec.op);
  figure.kind = is_pair(spec) ? "ll" : "ht";
  figure.dtype = spec.op == BenchOp::kCombine ? "bf16" : bench::name_of(spec.type);
  figure.memory = is_pair(spec) ? "" : bench::name_of(spec.memory);
  figure.tokens = spec.tokens;
  figure.hidden = hidden;
  figure.topk = options.model.top_k;
  figure.experts = options.batches.front().num_experts;
  figure.ranks = options.team.num_ranks;
  figure.routing = options.routing;
  figure.late_us = spec.late_us;
  figure.us_p50 = bench::median(us);
  figure.us_p99 = bench::percentile(us, 99);
  figure.iterations = static_cast<std::int64_t>(us.size());
  figure.row_bytes = fp8_rows ? hidden + (hidden + 127) / 128 * 4 : 2 * hidden;
  figure.wire_rows = static_cast<std::int64_t>(board.largest(series.wire_rows(index)));
  if (spec.tokens >= kFewestTokensForRates)
    figure.logical_rows = static_cast<std::int64_t>(board.largest(series.logical_rows(index)));
  figure.ceiling_gbs = is_pair(spec) ? 0 : ceiling_gbs;
  figure.wrong = static_cast<std::int64_t>(board.sum(series.wrong(index)));
  return figure;
}

const char* name_of(BenchOp op) {
  switch (op) {
    case BenchOp::kDispatch:
      return "dispatch";
    case BenchOp::kDispatchCached:
      return "dispatch_cached";
    case BenchOp::kCombine:
      return "combine";
    case BenchOp::kPair:
      return "pair";
  }
  return "?";
}

SweepResult run_sweep(const SweepOptions& options) {
  if (options.device == Device::kCuda) return run_gpu_sweep(options);
  const SeriesOf series{static_cast<int>(options.figures.size())};
  const int copies = options.iterations * static_cast<int>(options.batches.size());
  Board board(options.team.num_ranks, series.count(), std::max(copies, options.iterations) + 2);
  SweepResult result;
  result.failures = run_team(options.team, [&](int rank, Bootstrap& bootstrap) {
    Engine engine =
        Engine::create(budget_of(options), Topology::discover(bootstrap), Tuning::from_environment(), bootstrap);
    bench::CacheFlush flush(engine.num_ranks());
    bench::MemoryCopy copy(kCopyBytes);
    const bool shows = rank == 0 && options.show_progress;
    Progress progress =
        shows ? Progress("bench", static_cast<std::int64_t>(options.batches.size())) : Progress::quiet();
    std::int64_t done = 0;
    for (const workload::Batch& batch : options.batches) {
      BatchRun(options, batch, rank, engine, board).run(flush, copy);
      progress.show(++done, "sizes");
    }
    progress.finish();
    engine.close();
  });
  add_ceiling(result, board, series);
  result.machine = bench::this_machine();
  for (int index = 0; index < series.figures; ++index) {
    result.figures.push_back(figure_of(options, index, board, result.ceiling_gbs));
  }
  return result;
}

}  // namespace anyep::cli
