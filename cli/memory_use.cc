#include "cli/memory_use.h"

#include <anyep/engine.h>
#include <malloc.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <sstream>
#include <string>

#include "bench/support/budget.h"
#include "bench/support/high_throughput_case.h"
#include "bench/support/low_latency_case.h"

namespace anyep::cli {
namespace {

constexpr std::uint64_t kContentSeed = 1;
/// Calls before the second look: enough to have used both regions of every ring.
constexpr int kCalls = 4;

std::uint64_t private_anonymous_bytes() {
  malloc_trim(0);  // what the allocator keeps is not in use
  std::ifstream rollup("/proc/self/smaps_rollup");
  for (std::string line; std::getline(rollup, line);) {
    if (line.compare(0, 10, "Anonymous:") == 0) return std::stoull(line.substr(10)) * 1024;
  }
  return 0;
}

/// Pages of a mapped memory file that exist, whoever touched them.
std::uint64_t backed_bytes(std::uint64_t begin, std::uint64_t end) {
  const auto page = static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> there((end - begin) / page);
  if (mincore(reinterpret_cast<void*>(begin), end - begin, there.data()) != 0) return 0;
  return static_cast<std::uint64_t>(
             std::count_if(there.begin(), there.end(), [](unsigned char one) { return (one & 1) != 0; })) *
         page;
}

/// This rank's window is the one that memory() points into; its staging area the one that it may write.
std::uint64_t own_shared_bytes(Engine& engine) {
  const auto inside = reinterpret_cast<std::uint64_t>(engine.memory(Mode::kLowLatency, 0, 0).data);
  std::uint64_t sum = 0;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    std::istringstream fields(line);
    std::uint64_t begin = 0, end = 0;
    char dash = 0;
    std::string access;
    fields >> std::hex >> begin >> dash >> end >> access;
    const bool window = line.find("memfd:anyep-window") != std::string::npos && begin <= inside && inside < end;
    const bool staging = line.find("memfd:anyep-staging") != std::string::npos && access[1] == 'w';
    if (window || staging) sum += backed_bytes(begin, end);
  }
  return sum;
}

workload::Batch batch_of(const MemoryOptions& options) {
  workload::Request request;
  request.seed = options.seed;
  request.num_experts = options.model.num_experts;
  request.top_k = options.model.top_k;
  request.num_ranks = options.team.num_ranks;
  request.tokens_per_rank = options.tokens;
  return workload::generate(request);
}

Shape shape_of(const MemoryOptions& options) {
  Shape shape;
  shape.num_experts = options.model.num_experts;
  shape.top_k = options.model.top_k;
  shape.hidden = options.model.hidden;
  shape.max_tokens = options.tokens;
  return shape;
}

Budget budget_of(const MemoryOptions& options) {
  Budget budget;
  budget.max_experts = std::max(budget.max_experts, options.model.num_experts);
  if (options.low_latency) {
    budget.low_latency_bytes = low_latency_bytes_for(shape_of(options), options.team.num_ranks);
  } else {
    budget.rows_bytes = bench::rows_bytes_for(0, options.team.num_ranks);
  }
  return budget;
}

/// Several calls touch the same region: it counts once, as large as the largest use.
std::uint64_t planned_bytes(const MemoryOptions& options) {
  const std::vector<Op> ops = options.low_latency ? std::vector<Op>{Op::kLowLatencyDispatch, Op::kLowLatencyCombine}
                                                  : std::vector<Op>{Op::kRoute, Op::kDispatch, Op::kCombine};
  std::map<std::string, std::uint64_t> regions;
  for (const Op op : ops) {
    const Plan plan = make_plan(op, shape_of(options), budget_of(options), Topology::one_host(options.team.num_ranks),
                                Tuning::from_environment());
    for (const PlanRegion& region : plan.memory) {
      std::uint64_t& most = regions[region.memory + "/" + region.name];
      most = std::max(most, region.backed);
    }
  }
  std::uint64_t sum = 0;
  for (const auto& [name, bytes] : regions) sum += bytes;
  return sum;
}

Options waiting() {
  Options options;
  options.wait = true;
  return options;
}

/// The caller's memory is shared memory, so that it is not taken for the engine's.
struct ThroughputMemory {
  explicit ThroughputMemory(const bench::HighThroughputData& of)
      : data(of),
        top_k(of.batch().top_k),
        x(bytes(of.num_rows() * of.hidden() * 2)),
        sums(bytes(of.num_tokens() * of.hidden() * 2)),
        experts(bytes(of.num_rows() * top_k * 8)),
        weights(bytes(of.num_rows() * top_k * 4)) {}
  static std::size_t bytes(std::int64_t value) { return static_cast<std::size_t>(value); }

  Handle run(Engine& engine) const {
    const std::int64_t rows = data.num_rows();
    Rows out;
    out.x = TensorView::dense(x.data(), DType::kBF16, {rows, data.hidden()});
    out.experts = TensorView::dense(experts.data(), DType::kI64, {rows, top_k});
    out.weights = TensorView::dense(weights.data(), DType::kF32, {rows, top_k});
    Handle handle = engine.route(data.shape(), data.routing(), {}, waiting());
    engine.dispatch(data.input(), handle, out, {}, waiting());
    CombineInput in;
    in.x = out.x;
    Rows back;
    back.x = TensorView::dense(sums.data(), DType::kBF16, {data.num_tokens(), data.hidden()});
    engine.combine(in, handle, back, {}, waiting());
    return handle;
  }

  const bench::HighThroughputData& data;
  std::int64_t top_k;
  SharedMemory x, sums, experts, weights;
};

struct LowLatencyMemory {
  explicit LowLatencyMemory(const bench::LowLatencyData& of)
      : data(of),
        slabs(of.local_experts(), of.num_ranks(), of.max_tokens(), of.hidden(), Wire::kBF16),
        x(static_cast<std::size_t>(of.local_experts() * slabs.rows_per_expert() * of.hidden() * 2)),
        sums(static_cast<std::size_t>(of.num_tokens() * of.hidden() * 2)) {}

  void run(Engine& engine) const {
    LowLatencyOptions options;
    options.wait = true;
    ExpertSlabs slab = slabs.view();
    slab.x = TensorView::dense(x.data(), DType::kBF16, slab.x.shape);
    engine.low_latency_dispatch(data.shape(), data.x(), data.routing(), slab, {}, options);
    const TensorView out = TensorView::dense(sums.data(), DType::kBF16, {data.num_tokens(), data.hidden()});
    engine.low_latency_combine(data.shape(), slab, data.routing(), out, {}, options);
  }

  const bench::LowLatencyData& data;
  bench::SlabMemory slabs;
  SharedMemory x, sums;
};

enum Series : int { kShared, kPrivate, kNumSeries };

void measure_rank(const MemoryOptions& options, int rank, Bootstrap& bootstrap, Board& board) {
  const workload::Batch batch = batch_of(options);
  const std::int64_t hidden = options.model.hidden;
  const bench::RandomContent content(hidden, options.team.num_ranks, options.tokens, kContentSeed);
  const bench::HighThroughputData data(batch, rank, hidden, bench::RowType::kBF16, content);
  const bench::LowLatencyData pair(batch, rank, hidden, Wire::kBF16, content);
  const ThroughputMemory throughput(data);
  const LowLatencyMemory low_latency(pair);

  const std::uint64_t before = private_anonymous_bytes();
  Engine engine =
      Engine::create(budget_of(options), Topology::discover(bootstrap), Tuning::from_environment(), bootstrap);
  Handle handle;
  for (int call = 0; call < kCalls; ++call) {
    if (options.low_latency) {
      low_latency.run(engine);
    } else {
      handle = throughput.run(engine);
    }
  }
  const std::uint64_t after = private_anonymous_bytes();
  board.add(rank, kShared, static_cast<double>(own_shared_bytes(engine)));
  board.add(rank, kPrivate, static_cast<double>(after) - static_cast<double>(before));
  engine.barrier();  // a rank that leaves early gives its memory back
  engine.close();
}

}  // namespace

MemoryUse measure_memory(const MemoryOptions& options) {
  Board board(options.team.num_ranks, kNumSeries, 1);
  MemoryUse use;
  use.failures =
      run_team(options.team, [&](int rank, Bootstrap& bootstrap) { measure_rank(options, rank, bootstrap, board); });
  use.planned_bytes = planned_bytes(options);
  for (int rank = 0; rank < options.team.num_ranks && use.failures.empty(); ++rank) {
    const double shared = board.values(rank, kShared).at(0), own = std::max(0.0, board.values(rank, kPrivate).at(0));
    if (static_cast<std::uint64_t>(shared + own) <= use.measured_bytes()) continue;
    use.shared_bytes = static_cast<std::uint64_t>(shared);
    use.private_bytes = static_cast<std::uint64_t>(own);
  }
  return use;
}

}  // namespace anyep::cli
