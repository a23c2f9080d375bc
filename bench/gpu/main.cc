// anyep_bench_gpu: operations of the C++ API on GPU ranks beside the yardsticks, in the same rounds. One process start of
// bench/run_gpu; METRICS.md has the formulas.
#include <anyep/bootstrap.h>
#include <anyep/engine.h>
#include <fmt/format.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bench/gpu/runs.h"
#include "bench/probes/arguments.h"
#include "bench/probes/check.h"

namespace anyep::bench {
namespace {

constexpr const char* kUsage =
    "usage: anyep_bench_gpu --out FILE [--ht POINTS] [--ll POINTS] [--copies SMS] [--ranks N] [--gpus G]\n"
    "                       [--ranks-as processes|threads] [--rounds R]\n"
    "POINTS: \"tokens=4096 sms=16;tokens=256 ops=combine\": fields tokens, hidden, topk, experts, sms, seed, profile,\n"
    "  ops (high throughput: dispatch, dispatch_ahead, dispatch_cached, combine; low latency: graph, hook, eager, "
    "parts), dtype "
    "(bf16,\n"
    "  fp8), memory (window, caller), idle=1 (also from an idle stream), product=1 (beside a matrix product; low\n"
    "  latency: that product while a hook pends),\n"
    "  max_tokens (low latency). Ranks share the GPUs in turn; as processes they then need MPS.\n"
    "Exit codes: 0 measured, 1 a wrong value, 2 bad arguments, 3 an engine failed or a rank died.\n";

constexpr std::int64_t kCopyBytes = std::int64_t{512} << 20;

struct Plan {
  std::vector<Point> high_throughput, low_latency;
  std::vector<int> copies;
  int ranks = 2, gpus = 0, rounds = 15;
  bool threads = false;
  std::string out;
};

Plan plan_of(int argc, char** argv) {
  const Arguments arguments(argc, argv, {"out", "ht", "ll", "copies", "ranks", "gpus", "ranks-as", "rounds"});
  Plan plan;
  plan.high_throughput =
      parse_points(arguments.text("ht", ""), {"dispatch", "dispatch_ahead", "dispatch_cached", "combine"});
  plan.low_latency = parse_points(arguments.text("ll", ""), {"graph", "hook", "eager", "parts"});
  plan.copies = arguments.numbers("copies", "");
  plan.ranks = arguments.number("ranks", 2);
  plan.gpus = arguments.number("gpus", 0);
  plan.rounds = arguments.number("rounds", 15);
  plan.threads = arguments.text("ranks-as", "processes") == "threads";
  plan.out = arguments.text("out", "");
  if (plan.out.empty()) throw std::invalid_argument("--out is missing");
  if (plan.high_throughput.empty() && plan.low_latency.empty() && plan.copies.empty()) {
    throw std::invalid_argument("nothing to measure: --ht, --ll or --copies");
  }
  return plan;
}

/// Window memory for full slots and for what a point's cases hold at once: outputs and answers of both row types, and those
/// that are being made, for the worst case, while the ones before are given back.
Budget budget_of(const Plan& plan) {
  constexpr std::int64_t kSlotBytes = std::int64_t{64} << 20, kSlotRegions = 2, kSlotShare = 2, kHeldAtOnce = 8;
  Budget budget;
  std::int64_t rows = 0;
  for (const Point& point : plan.high_throughput) {
    rows = std::max(rows, plan.ranks * point.tokens * (2 * point.hidden + 1024));
    budget.max_experts = std::max(budget.max_experts, point.experts);
  }
  const std::int64_t slots = plan.ranks * kSlotRegions * kSlotBytes;
  budget.rows_bytes =
      plan.high_throughput.empty() ? std::int64_t{64} << 20 : std::max(kSlotShare * slots, slots + kHeldAtOnce * rows);
  for (const Point& point : plan.low_latency) {
    Shape shape;
    shape.num_experts = point.experts;
    shape.top_k = point.topk;
    shape.hidden = point.hidden;
    shape.max_tokens = std::max(point.tokens, point.max_tokens);
    budget.low_latency_bytes = std::max(budget.low_latency_bytes, low_latency_bytes_for(shape, plan.ranks));
  }
  return budget;
}

ProbeLimits limits_of(const Plan& plan) {
  ProbeLimits limits;
  limits.tokens = 1;
  limits.row_bytes = 16;
  for (const Point& point : plan.high_throughput) {
    limits.tokens = std::max(limits.tokens, point.tokens);
    limits.row_bytes = std::max(limits.row_bytes, 2 * point.hidden);
  }
  for (const Point& point : plan.low_latency) limits.tokens = std::max(limits.tokens, point.tokens);
  limits.copy_bytes = plan.copies.empty() ? 0 : kCopyBytes;
  return limits;
}

/// Everything of one rank; wrong elements of all.
double run_rank(const Plan& plan, Meeting& meeting, int rank, Bootstrap& bootstrap) {
  int gpus = 0;
  check(cudaGetDeviceCount(&gpus), "cudaGetDeviceCount");
  if (plan.gpus > 0) gpus = std::min(gpus, plan.gpus);
  gpus = std::min(gpus, plan.ranks);
  const int device = device_of(rank, gpus);
  check(cudaSetDevice(device), "cudaSetDevice");
  cudaStream_t stream = nullptr;
  int least = 0, greatest = 0;  // communication goes first where something else computes
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
  check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest), "cudaStreamCreateWithPriority");

  std::ofstream out;
  if (rank == 0) out.open(plan.out, std::ios::app);
  cudaDeviceProp properties{};
  int driver = 0;
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");

  Topology topology = Topology::discover(bootstrap);
  topology.device = device;
  Engine engine = Engine::create(budget_of(plan), topology, Tuning::from_environment(), bootstrap);
  double wrong = 0;
  {
    Timer timer(meeting, rank, stream);
    Probes probes(timer, limits_of(plan));
    Bench bench{&engine, &timer, &probes, rank, plan.ranks, gpus, plan.rounds, {}};
    bench.report = [&](Line line) {
      if (rank != 0) return;
      line.text("gpu", properties.name).number("gpus", gpus).number("cuda_driver", driver).text("version", version());
      out << line.to_json() << '\n' << std::flush;
    };
    run_copies(bench, plan.copies, {7168, 14336});
    for (const Point& point : plan.high_throughput) wrong += run_high_throughput(bench, point);
    for (const Point& point : plan.low_latency) wrong += run_low_latency(bench, point);
    run_copies(bench, plan.copies, {7168, 14336});
    if (probes.failed()) throw std::runtime_error("a decode step waited for a peer in vain");
  }
  engine.close();
  return wrong;
}

int run(const Plan& plan) {
  // Kernels of a first launch would wait behind those that wait for peers; ranks as threads need a queue each, and MPS has
  // not enough for many processes with 32.
  setenv("CUDA_MODULE_LOADING", "EAGER", 0);
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", plan.threads ? "32" : "8", 1);
  LocalGroup group(plan.ranks);
  Meeting meeting(plan.ranks);
  const auto body = [&](int rank) {
    try {
      const double wrong = run_rank(plan, meeting, rank, *group.member(rank));
      return wrong == 0 ? 0 : 1;
    } catch (const std::exception& error) {
      meeting.leave();
      fmt::print(stderr, "rank {}: {}\n", rank, error.what());
      return 3;
    }
  };
  std::vector<int> statuses(static_cast<std::size_t>(plan.ranks), 0);
  if (plan.threads) {
    LocalGroup::run_threads(plan.ranks, [&](int rank) { statuses[static_cast<std::size_t>(rank)] = body(rank); });
  } else {
    statuses = LocalGroup::run_processes(plan.ranks, [&](int rank) {
      const int status = body(rank);
      std::fflush(nullptr);
      if (status != 0) std::_Exit(status);
    });
    for (int& status : statuses) status = WIFEXITED(status) ? WEXITSTATUS(status) : 3;
  }
  return *std::max_element(statuses.begin(), statuses.end());
}

int main_of(int argc, char** argv) {
  try {
    return run(plan_of(argc, argv));
  } catch (const std::invalid_argument& error) {
    fmt::print(stderr, "{}\n{}", error.what(), kUsage);
    return 2;
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
    return 3;
  }
}

}  // namespace
}  // namespace anyep::bench

int main(int argc, char** argv) {
  return anyep::bench::main_of(argc, argv);
}
