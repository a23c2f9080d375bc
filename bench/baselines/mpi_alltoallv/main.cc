// One MPI program that measures, in the same processes and in turn, the memory-copy ceiling, MPI_Alltoallv and AnyEP.
// bench/METRICS.md says what is measured; bench/run_cpu.py starts it and makes records of what it writes.
#include <anyep/engine.h>
#include <anyep/workload.h>
#include <mpi.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench/support/budget.h"
#include "bench/support/buffer.h"
#include "bench/support/machine.h"
#include "bench/support/memory_copy.h"
#include "high_throughput.h"
#include "low_latency.h"
#include "single_copy.h"

namespace {

using namespace anyep;
using Json = nlohmann::ordered_json;

struct Arguments {
  std::string mode = "ht", profile = "uniform", out;
  std::int64_t tokens = 4096, hidden = 7168;
  int experts = 256, topk = 8;
  double seconds = 10;
  int least_iterations = 10, most_iterations = 400, warm_up = 3;
  std::uint64_t seed = 1;
  bool mpi_only = false;
};

constexpr std::int64_t kCopyBytes = 128 << 20;
constexpr int kPairsPerIteration = 20;

/// One figure: what is timed, how its output is checked, and what it moves.
struct Timed {
  Json about;
  std::function<void()> call;
  std::function<std::int64_t()> wrong;
  std::function<void()> poison;
  bool cold = true;
  int repeats = 1;
  std::vector<double> us;
  std::int64_t num_wrong = 0;
};

int world_rank() {
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  return rank;
}

int world_size() {
  int size = 1;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return size;
}

std::int64_t largest_of_ranks(std::int64_t mine) {
  std::int64_t most = 0;
  MPI_Allreduce(&mine, &most, 1, MPI_INT64_T, MPI_MAX, MPI_COMM_WORLD);
  return most;
}

CallbackBootstrap mpi_bootstrap() {
  return CallbackBootstrap(world_rank(), world_size(), [](std::span<const std::byte> mine, std::span<std::byte> all) {
    MPI_Allgather(mine.data(), static_cast<int>(mine.size()), MPI_BYTE, all.data(), static_cast<int>(mine.size()),
                  MPI_BYTE, MPI_COMM_WORLD);
  });
}

class Run {
 public:
  explicit Run(const Arguments& options)
      : options_(options),
        flush_(world_size()),
        copy_(kCopyBytes),
        bootstrap_(mpi_bootstrap()),
        engine_(make_engine()) {
    add_ceiling();
    options_.mode == "ht" ? add_high_throughput() : add_low_latency();
  }
  void run() {
    check();
    const int iterations = choose_iterations();
    for (int i = 0; i < options_.warm_up; ++i) round(nullptr);
    for (int i = 0; i < iterations; ++i) round(&round_us_);
    check();
    engine_.close();
  }
  /// Rank 0 writes; the others take part in the reductions.
  void write();

 private:
  workload::Batch batch() const;
  Engine make_engine();
  void add_ceiling();
  void add_high_throughput();
  void add_row_type(bench::RowType type);
  void add_low_latency();
  void add(Timed timed) {
    if (!options_.mpi_only || timed.about.at("who") == "mpi") figures_.push_back(std::move(timed));
  }
  Timed rows(const char* who, const char* op, bench::RowType type, const char* memory) const;
  void check();
  int choose_iterations();
  void round(std::vector<double>* keep);

  Arguments options_;
  bench::CacheFlush flush_;
  bench::MemoryCopy copy_;
  CallbackBootstrap bootstrap_;
  Engine engine_;
  std::unique_ptr<bench::RandomContent> content_;
  std::vector<std::unique_ptr<bench::HighThroughputData>> data_;
  std::vector<std::unique_ptr<bench::HighThroughputCase>> cases_;
  std::vector<std::unique_ptr<baselines::MpiHighThroughput>> mpi_cases_;
  std::vector<std::unique_ptr<bench::LowLatencyData>> pair_data_;
  std::vector<std::unique_ptr<bench::LowLatencyCase>> pair_cases_;
  std::vector<std::unique_ptr<baselines::MpiLowLatency>> mpi_pair_cases_;
  std::vector<Timed> figures_;
  std::vector<double> round_us_;
};

workload::Batch Run::batch() const {
  workload::Request request;
  request.profile = workload::parse_profile(options_.profile);
  request.seed = options_.seed;
  request.num_experts = options_.experts;
  request.top_k = options_.topk;
  request.num_ranks = world_size();
  request.tokens_per_rank = options_.tokens;
  return workload::generate(request);
}

Engine Run::make_engine() {
  Budget budget;
  const int ranks = world_size();
  budget.max_experts = std::max(budget.max_experts, options_.experts);
  if (options_.mode == "ht") {
    budget.rows_bytes =
        bench::rows_bytes_for(4 * bench::most_rows_bytes(ranks, options_.tokens, 2 * options_.hidden), ranks);
  } else {
    Shape shape;
    shape.num_experts = options_.experts;
    shape.top_k = options_.topk;
    shape.hidden = options_.hidden;
    shape.max_tokens = options_.tokens;
    budget.low_latency_bytes = low_latency_bytes_for(shape, ranks);
  }
  return Engine::create(budget, Topology::discover(bootstrap_), Tuning::from_environment(), bootstrap_);
}

void Run::add_ceiling() {
  if (options_.mode != "ht") return;
  for (int method = 0; method < bench::MemoryCopy::kNumMethods; ++method) {
    Timed timed;
    timed.about = {
        {"who", "copy"}, {"op", "ceiling"}, {"method", bench::MemoryCopy::name(method)}, {"bytes", kCopyBytes}};
    timed.call = [this, method] { copy_.copy(method); };
    timed.wrong = [] { return std::int64_t{0}; };
    timed.poison = [] {};
    add(std::move(timed));
  }
}

Timed Run::rows(const char* who, const char* op, bench::RowType type, const char* memory) const {
  const bench::HighThroughputData& data = *data_.back();
  const bool combine = std::string(op) == "combine";
  const std::int64_t row_bytes = combine ? 2 * options_.hidden : data.row_bytes() + data.num_scales() * 4;
  Timed timed;
  timed.about = {{"who", who},
                 {"op", op},
                 {"kind", "ht"},
                 {"dtype", combine ? "bf16" : bench::name_of(type)},
                 {"memory", memory},
                 {"row_bytes", row_bytes},
                 {"wire_rows", largest_of_ranks(std::max(data.sent_rows(), data.received_rows()))},
                 {"logical_rows", largest_of_ranks(data.num_rows())}};
  return timed;
}

void Run::add_row_type(bench::RowType type) {
  data_.push_back(std::make_unique<bench::HighThroughputData>(batch(), world_rank(), options_.hidden, type, *content_));
  const bench::HighThroughputData& data = *data_.back();
  const bool with_combine = type == bench::RowType::kBF16;
  mpi_cases_.push_back(std::make_unique<baselines::MpiHighThroughput>(data));
  const auto add_all = [&](auto* one, const char* who, const char* memory) {
    struct Call {
      const char* op;
      std::function<void()> call;
      std::function<std::int64_t()> wrong;
    };
    std::vector<Call> calls = {
        {"dispatch", [one] { one->dispatch(); }, [one] { return one->wrong_dispatch(); }},
        {"dispatch_cached", [one] { one->dispatch_cached(); }, [one] { return one->wrong_dispatch(); }}};
    if (with_combine) calls.push_back({"combine", [one] { one->combine(); }, [one] { return one->wrong_combine(); }});
    for (Call& call : calls) {
      Timed timed = rows(who, call.op, type, memory);
      timed.call = std::move(call.call);
      timed.wrong = std::move(call.wrong);
      timed.poison = [one] { one->poison(); };
      add(std::move(timed));
    }
  };
  add_all(mpi_cases_.back().get(), "mpi", "caller");
  for (const bench::Memory memory : {bench::Memory::kWindow, bench::Memory::kCaller}) {
    cases_.push_back(std::make_unique<bench::HighThroughputCase>(engine_, data, memory));
    add_all(cases_.back().get(), "anyep", bench::name_of(memory));
  }
}

void Run::add_high_throughput() {
  content_ = std::make_unique<bench::RandomContent>(options_.hidden, world_size(), options_.tokens, options_.seed);
  add_row_type(bench::RowType::kBF16);
  add_row_type(bench::RowType::kFP8);
}

void Run::add_low_latency() {
  content_ = std::make_unique<bench::RandomContent>(options_.hidden, world_size(), options_.tokens, options_.seed);
  for (const Wire wire : {Wire::kBF16, Wire::kFP8}) {
    pair_data_.push_back(
        std::make_unique<bench::LowLatencyData>(batch(), world_rank(), options_.hidden, wire, *content_));
    const bench::LowLatencyData& data = *pair_data_.back();
    mpi_pair_cases_.push_back(std::make_unique<baselines::MpiLowLatency>(data));
    pair_cases_.push_back(std::make_unique<bench::LowLatencyCase>(engine_, data));
    const auto add_pair = [&](auto* one, const char* who) {
      Timed timed;
      timed.about = {{"who", who},
                     {"op", "pair"},
                     {"kind", "ll"},
                     {"dtype", wire == Wire::kFP8 ? "fp8" : "bf16"},
                     {"wire_rows", largest_of_ranks(data.wire_rows())}};
      timed.call = [one] {
        one->dispatch();
        one->combine();
      };
      timed.wrong = [one] { return one->wrong_dispatch() + one->wrong_combine(); };
      timed.poison = [] {};
      timed.cold = false;
      timed.repeats = kPairsPerIteration;
      add(std::move(timed));
    };
    add_pair(mpi_pair_cases_.back().get(), "mpi");
    add_pair(pair_cases_.back().get(), "anyep");
  }
}

void Run::check() {
  for (Timed& timed : figures_) {
    timed.poison();
    timed.call();
    timed.num_wrong += timed.wrong();
  }
}

void Run::round(std::vector<double>* keep) {
  const double start = bench::now_us();
  for (Timed& timed : figures_) {
    if (timed.cold) flush_.run();
    MPI_Barrier(MPI_COMM_WORLD);
    const double begin = bench::now_us();
    for (int i = 0; i < timed.repeats; ++i) timed.call();
    const double us = (bench::now_us() - begin) / timed.repeats;
    if (keep != nullptr) timed.us.push_back(us);
  }
  if (keep != nullptr) keep->push_back(bench::now_us() - start);
}

int Run::choose_iterations() {
  double us = bench::now_us();
  round(nullptr);
  us = bench::now_us() - us;
  MPI_Bcast(&us, 1, MPI_DOUBLE, 0, MPI_COMM_WORLD);
  const double wanted = options_.seconds * 1e6 / std::max(us, 1.0);
  return static_cast<int>(std::clamp(wanted, static_cast<double>(options_.least_iterations),
                                     static_cast<double>(options_.most_iterations)));
}

void Run::write() {
  std::ofstream file;
  if (world_rank() == 0) file.open(options_.out, std::ios::app);
  const std::string mechanism = baselines::single_copy_mechanism();
  const bool readable = baselines::neighbour_is_readable();
  const bench::Machine machine = bench::this_machine();
  for (Timed& timed : figures_) {
    std::vector<double> slowest(timed.us.size());
    MPI_Reduce(timed.us.data(), slowest.data(), static_cast<int>(slowest.size()), MPI_DOUBLE, MPI_MAX, 0,
               MPI_COMM_WORLD);
    std::int64_t wrong = 0;
    MPI_Reduce(&timed.num_wrong, &wrong, 1, MPI_INT64_T, MPI_SUM, 0, MPI_COMM_WORLD);
    Json line = timed.about;
    line.update(Json{{"tokens", options_.tokens},
                     {"hidden", options_.hidden},
                     {"topk", options_.topk},
                     {"experts", options_.experts},
                     {"ranks", world_size()},
                     {"routing", options_.profile + ":" + std::to_string(options_.seed)},
                     {"us", slowest},
                     {"wrong", wrong},
                     {"mpi", baselines::mpi_version()},
                     {"single_copy", mechanism},
                     {"process_vm_readv", readable},
                     {"cpu", machine.cpu_model},
                     {"cores", machine.cores},
                     {"kernel", machine.kernel},
                     {"version", version()}});
    if (world_rank() == 0) file << line.dump() << "\n";
  }
}

int parse(int argc, char** argv, Arguments& options) {
  CLI::App app("Memory-copy ceiling, MPI_Alltoallv and AnyEP in the same processes. Start with mpirun.");
  app.add_option("--mode", options.mode, "ht or ll")->check(CLI::IsMember({"ht", "ll"}));
  app.add_option("--tokens", options.tokens, "per rank")->check(CLI::PositiveNumber);
  app.add_option("--hidden", options.hidden)->check(CLI::PositiveNumber);
  app.add_option("--experts", options.experts)->check(CLI::PositiveNumber);
  app.add_option("--topk", options.topk)->check(CLI::Range(1, 32));
  app.add_option("--seconds", options.seconds, "how long to measure, about");
  app.add_option("--least-iterations", options.least_iterations)->check(CLI::PositiveNumber);
  app.add_option("--most-iterations", options.most_iterations)->check(CLI::PositiveNumber);
  app.add_option("--warm-up", options.warm_up)->check(CLI::NonNegativeNumber);
  app.add_option("--seed", options.seed);
  app.add_option("--profile", options.profile);
  app.add_flag("--mpi-only", options.mpi_only, "measure MPI alone, to choose its settings");
  app.add_option("--out", options.out, "JSON lines are appended to it")->required();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return world_rank() == 0 ? app.exit(error) + 1 : 1;
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  Arguments options;
  int status = parse(argc, argv, options);
  if (status == 0) {
    try {
      Run run(options);
      run.run();
      run.write();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "rank %d: %s\n", world_rank(), error.what());
      MPI_Abort(MPI_COMM_WORLD, 3);
    }
  }
  MPI_Finalize();
  return status == 0 ? 0 : 2;
}
