// The sweep of GPU ranks: the cases of bench/gpu, timed as bench/run_gpu times them.
#include <fmt/format.h>

#include <fstream>

#include "cli/command.h"
#include "cli/sweep_series.h"
#include "cli/table.h"

#if ANYEP_CUDA
#include <anyep/engine.h>
#include <cuda_runtime_api.h>

#include <map>
#include <memory>

#include "bench/gpu/high_throughput.h"
#include "bench/gpu/low_latency.h"
#include "bench/probes/check.h"
#include "bench/support/content.h"
#endif

namespace anyep::cli {

#if ANYEP_CUDA
namespace {

constexpr std::uint64_t kContentSeed = 0x51ed;
constexpr std::int64_t kCopyBytes = std::int64_t{256} << 20;
constexpr int kCopySms = 16, kCopyRowBytes = 7168;

/// Enough that windows need not grow while ranks are timed.
Budget budget_of(const SweepOptions& options) {
  constexpr std::int64_t kSlotBytes = std::int64_t{256} << 20, kHeldAtOnce = 8;
  Budget budget;
  const int ranks = options.team.num_ranks;
  std::int64_t rows = 0;
  for (const FigureSpec& figure : options.figures) {
    if (!is_pair(figure)) {
      rows = std::max(rows, ranks * figure.tokens * (2 * options.model.hidden + 1024));
      continue;
    }
    budget.low_latency_bytes = std::max(budget.low_latency_bytes, pair_bytes(options, figure));
  }
  budget.rows_bytes = ranks * kSlotBytes + kHeldAtOnce * rows;
  budget.max_experts = std::max(budget.max_experts, options.batches.front().num_experts);
  return budget;
}

/// All figures of one batch on one rank.
class GpuBatchRun {
 public:
  GpuBatchRun(const SweepOptions& options, const workload::Batch& batch, int rank, Engine& engine, bench::Timer& timer,
              Board& board)
      : options_(options),
        batch_(batch),
        rank_(rank),
        engine_(engine),
        timer_(timer),
        board_(board),
        series_{static_cast<int>(options.figures.size())},
        content_(options.model.hidden, engine.num_ranks(), std::max<std::int64_t>(1, most_tokens(batch)),
                 kContentSeed) {}

  void run() {
    for (int figure = 0; figure < series_.figures; ++figure) {
      const FigureSpec& spec = options_.figures[static_cast<std::size_t>(figure)];
      if (spec.tokens != most_tokens(batch_)) continue;
      is_pair(spec) ? run_pair(figure, spec) : run_high_throughput(figure, spec);
      engine_.check();
    }
  }

 private:
  void run_high_throughput(int figure, const FigureSpec& spec);
  void run_pair(int figure, const FigureSpec& spec);
  void add(int series, const std::vector<double>& values) {
    for (const double value : values) board_.add(rank_, series, value);
  }

  const SweepOptions& options_;
  const workload::Batch& batch_;
  int rank_;
  Engine& engine_;
  bench::Timer& timer_;
  Board& board_;
  SeriesOf series_;
  bench::RandomContent content_;
};

void GpuBatchRun::run_high_throughput(int figure, const FigureSpec& spec) {
  const bench::HighThroughputData data(batch_, rank_, options_.model.hidden, spec.type, content_);
  bench::GpuHighThroughput one(engine_, data, spec.memory, options_.num_sms, timer_.stream());
  const auto call = [&](int i) {
    if (spec.op == BenchOp::kDispatch) {
      one.dispatch(i);
    } else if (spec.op == BenchOp::kDispatchCached) {
      one.dispatch_cached(i);
    } else {
      one.combine(i);
    }
  };
  const auto check = [&] {
    if (!options_.check) return;
    timer_.meeting().barrier();
    const std::int64_t wrong = spec.op == BenchOp::kDispatch         ? one.wrong_dispatch()
                               : spec.op == BenchOp::kDispatchCached ? one.wrong_dispatch_cached()
                                                                     : one.wrong_combine();
    board_.add(rank_, series_.wrong(figure), static_cast<double>(wrong));
    timer_.meeting().barrier();
  };
  check();
  constexpr int kTimed = bench::Timer::kBatch - bench::Timer::kDropped;
  for (int done = 0; done < options_.iterations; done += kTimed) add(series_.time(figure), timer_.queued(call));
  check();
  board_.add(rank_, series_.wire_rows(figure), static_cast<double>(std::max(data.sent_rows(), data.received_rows())));
  board_.add(rank_, series_.logical_rows(figure), static_cast<double>(data.num_rows()));
}

void GpuBatchRun::run_pair(int figure, const FigureSpec& spec) {
  const Wire wire = spec.type == bench::RowType::kFP8 ? Wire::kFP8 : Wire::kBF16;
  const bench::LowLatencyData data(batch_, rank_, options_.model.hidden, wire, content_);
  bench::GpuLowLatency one(engine_, data, options_.num_sms, timer_.stream());
  const auto check = [&] {
    if (!options_.check) return;
    timer_.meeting().barrier();
    board_.add(rank_, series_.wrong(figure), static_cast<double>(one.wrong(false)));
    timer_.meeting().barrier();
  };
  check();
  const bench::Graph graph(timer_.stream(), [&] {
    for (int i = 0; i < kPairsPerIteration; ++i) one.pair();
  });
  for (int i = -options_.warm_up; i < options_.iterations; ++i) {
    const double us = timer_.replayed(graph.get(), kPairsPerIteration);
    if (i >= 0) board_.add(rank_, series_.time(figure), us);
  }
  check();
  board_.add(rank_, series_.wire_rows(figure), static_cast<double>(data.wire_rows()));
}

/// Everything of one rank.
void run_rank(const SweepOptions& options, int rank, Bootstrap& bootstrap, bench::Meeting& meeting, Board& board) {
  int gpus = 0;
  bench::check(cudaGetDeviceCount(&gpus), "cudaGetDeviceCount");
  Topology topology = Topology::discover(bootstrap);
  topology.device = bench::device_of(rank, gpus);
  bench::check(cudaSetDevice(topology.device), "cudaSetDevice");
  cudaStream_t stream = nullptr;
  bench::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  Engine engine = Engine::create(budget_of(options), topology, Tuning::from_environment(), bootstrap);
  bench::Timer timer(meeting, rank, stream);
  if (engine.num_ranks() > 1) {
    bench::ProbeLimits limits;
    limits.tokens = 1;
    limits.copy_bytes = kCopyBytes;
    bench::Probes probes(timer, limits);
    const double gbs = probes.copy_gbs(kCopyRowBytes, bench::probes::Direction::kPush, kCopySms);
    board.add(rank, SeriesOf{static_cast<int>(options.figures.size())}.copy(0), gbs);
  }
  Progress progress = rank == 0 && options.show_progress
                          ? Progress("bench", static_cast<std::int64_t>(options.batches.size()))
                          : Progress::quiet();
  std::int64_t done = 0;
  for (const workload::Batch& batch : options.batches) {
    GpuBatchRun(options, batch, rank, engine, timer, board).run();
    progress.show(++done, "sizes");
  }
  progress.finish();
  engine.close();
}

/// After the ranks have ended: a process that has started CUDA must not fork them.
void add_gpus(bench::Machine& machine, int num_ranks) {
  int gpus = 0, version = 0;
  cudaDeviceProp properties{};
  if (cudaGetDeviceCount(&gpus) != cudaSuccess || cudaGetDeviceProperties(&properties, 0) != cudaSuccess) return;
  (void)cudaDriverGetVersion(&version);
  machine.gpu = properties.name;
  machine.gpus = std::min(gpus, num_ranks);
  machine.cuda = fmt::format("{}.{}", version / 1000, version % 1000 / 10);
  std::ifstream("/sys/module/nvidia/version") >> machine.driver;
}

}  // namespace

SweepResult run_gpu_sweep(const SweepOptions& options) {
  setenv("CUDA_MODULE_LOADING", "EAGER", 0);  // a first launch must not wait behind a kernel that waits for a peer
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
  const SeriesOf series{static_cast<int>(options.figures.size())};
  Board board(options.team.num_ranks, series.count(), options.iterations + bench::Timer::kBatch);
  bench::Meeting meeting(options.team.num_ranks);
  SweepResult result;
  result.failures = run_team(options.team, [&](int rank, Bootstrap& bootstrap) {
    try {
      run_rank(options, rank, bootstrap, meeting, board);
    } catch (...) {
      meeting.leave();
      throw;
    }
  });
  result.ceiling_gbs = board.largest(series.copy(0));
  result.ceiling_method = fmt::format("{} SMs", kCopySms);
  result.machine = bench::this_machine();
  add_gpus(result.machine, options.team.num_ranks);
  for (int index = 0; index < series.figures; ++index) {
    result.figures.push_back(figure_of(options, index, board, result.ceiling_gbs));
    result.figures.back().graph = is_pair(options.figures[static_cast<std::size_t>(index)]);
    result.figures.back().threads = options.num_sms;
  }
  return result;
}
#else
SweepResult run_gpu_sweep(const SweepOptions&) {
  throw UsageError("--device cuda: this build has no CUDA backend (configure with -DANYEP_CUDA=ON)");
}
#endif

}  // namespace anyep::cli
