// anyep_bench_probes: the yardsticks alone, ranks as threads. METRICS.md has the formulas.
#include <anyep/bootstrap.h>
#include <anyep/workload.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "bench/probes/arguments.h"
#include "bench/probes/check.h"
#include "bench/probes/probes.h"
#include "bench/support/samples.h"

namespace anyep::bench {
namespace {

constexpr const char* kUsage =
    "usage: anyep_bench_probes [--ranks N] [--tokens T] [--hidden H] [--topk K] [--experts E] [--profile P] [--seed "
    "S]\n"
    "                          [--what push,gather,copy,step] [--sms 8,12,16] [--rows 0,1,8,32,128] [--rounds R]\n"
    "                          [--start together|in-turn]\n"
    "Ranks are threads of this process and share the GPUs in turn. Times: slowest rank, median over the rounds.\n"
    "--start in-turn starts a thread per rank for each replay of steps, one after another: lateness counts.\n";

constexpr std::int64_t kCopyBytes = std::int64_t{512} << 20;
constexpr int kStepsDropped = 3;

bool wants(const std::vector<std::string>& list, const std::string& word) {
  return std::find(list.begin(), list.end(), word) != list.end();
}

/// Replays as a program makes them that starts a thread for each rank, again and again: the first rank waits for the last.
class StartsInTurn {
 public:
  explicit StartsInTurn(int num_ranks) : replays_(static_cast<std::size_t>(num_ranks)), us_(replays_.size()) {}
  /// Microseconds of the slowest rank; collective.
  double replayed(Timer& timer, int device, cudaGraphExec_t graph) {
    const auto self = static_cast<std::size_t>(timer.rank());
    replays_[self] = [this, &timer, device, graph, self] {
      check(cudaSetDevice(device), "cudaSetDevice");
      us_[self] = timer.replayed_alone(graph);
    };
    timer.meeting().barrier();
    if (self == 0) {
      std::vector<std::thread> threads;
      for (const auto& replay : replays_) threads.emplace_back(replay);
      for (std::thread& thread : threads) thread.join();
    }
    timer.meeting().barrier();
    return timer.meeting().largest(timer.rank(), us_[self]);
  }

 private:
  std::vector<std::function<void()>> replays_;
  std::vector<double> us_;
};

/// One rank's run. Names of figures are in the order in which they are first measured; rank 0 prints.
class Run {
 public:
  Run(const Arguments& arguments, Meeting& meeting, StartsInTurn& starts, int rank, int num_gpus)
      : arguments_(arguments), meeting_(meeting), starts_(starts), rank_(rank), num_gpus_(num_gpus) {}
  /// Wrong elements.
  double run();

 private:
  void measure_throughput(Probes& probes, const std::vector<std::string>& what);
  void measure_steps(Timer& timer, Probes& probes);
  double wrong(Probes& probes, const std::vector<std::string>& what);
  void add(const std::string& name, const std::vector<double>& us);
  void print(double wire_rows) const;

  const Arguments& arguments_;
  Meeting& meeting_;
  StartsInTurn& starts_;
  int rank_, num_gpus_;
  std::vector<std::string> names_;
  std::map<std::string, std::vector<double>> series_;
};

void Run::add(const std::string& name, const std::vector<double>& us) {
  if (!series_.contains(name)) names_.push_back(name);
  std::vector<double>& all = series_[name];
  all.insert(all.end(), us.begin(), us.end());
}

void Run::measure_throughput(Probes& probes, const std::vector<std::string>& what) {
  const int hidden = arguments_.number("hidden", 7168);
  for (const int sms : arguments_.numbers("sms", "8,12,16")) {
    for (const auto order : {probes::Order::kTickets, probes::Order::kStrides}) {
      const char* const way = order == probes::Order::kTickets ? "tickets" : "strides";
      if (wants(what, "push")) {
        add(fmt::format("push bf16 {} {} SMs", way, sms), probes.push(2 * hidden, order, sms));
        add(fmt::format("push fp8 {} {} SMs", way, sms), probes.push(hidden, order, sms));
      }
      if (wants(what, "gather")) add(fmt::format("gather {} {} SMs", way, sms), probes.gather(2 * hidden, order, sms));
    }
    if (!wants(what, "copy")) continue;
    for (const int row_bytes : {hidden, 2 * hidden}) {
      const double push = probes.copy_gbs(row_bytes, probes::Direction::kPush, sms);
      const double pull = probes.copy_gbs(row_bytes, probes::Direction::kPull, sms);
      add(fmt::format("copy push GB/s {} B {} SMs", row_bytes, sms), {push});
      add(fmt::format("copy pull GB/s {} B {} SMs", row_bytes, sms), {pull});
    }
  }
}

void Run::measure_steps(Timer& timer, Probes& probes) {
  const bool in_turn = arguments_.text("start", "together") == "in-turn";
  for (int i = -kStepsDropped; i < 15; ++i) {
    const auto keep = [&](const std::string& name, double us) {
      if (i >= 0) add(name, {us});
    };
    keep("step empty kernel", probes.empty_step());
    for (const int row_bytes : {7424, 14336}) {
      for (const int rows : arguments_.numbers("rows", "0,1,8,32,128")) {
        for (const int blocks : Probes::step_blocks(rows, meeting_.num_ranks(), num_gpus_)) {
          for (const auto form : {probes::StepForm::kCopied, probes::StepForm::kTight}) {
            const char* const name = form == probes::StepForm::kTight ? "tight step" : "step";
            keep(fmt::format("{} {} B {} rows {} blocks", name, row_bytes, rows, blocks),
                 in_turn ? starts_.replayed(timer, device_of(rank_, num_gpus_),
                                            probes.step_graph(form, row_bytes, rows, blocks)) /
                               Probes::kStepsPerGraph
                         : probes.step(form, row_bytes, rows, blocks));
          }
        }
      }
    }
  }
}

double Run::wrong(Probes& probes, const std::vector<std::string>& what) {
  const int row_bytes = 2 * arguments_.number("hidden", 7168), sms = arguments_.numbers("sms", "8,12,16").back();
  double wrong = 0;
  for (const auto order : {probes::Order::kTickets, probes::Order::kStrides}) {
    if (wants(what, "push"))
      wrong += probes.wrong_push(row_bytes, order, sms) + probes.wrong_push(row_bytes / 2, order, sms);
    if (wants(what, "gather")) wrong += probes.wrong_gather(row_bytes, order, sms);
  }
  return wrong;
}

void Run::print(double wire_rows) const {
  fmt::print("{} ranks on {} GPUs, {} wire rows\n", meeting_.num_ranks(), num_gpus_, wire_rows);
  for (const std::string& name : names_) {
    const std::vector<double>& values = series_.at(name);
    fmt::print("{:<40} {:>9.2f}  ({:.2f} .. {:.2f})\n", name, median(values), percentile(values, 1),
               percentile(values, 90));
  }
}

double Run::run() {
  check(cudaSetDevice(device_of(rank_, num_gpus_)), "cudaSetDevice");
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  const std::vector<std::string> what = arguments_.words("what", "push,gather,copy,step");
  workload::Request request;
  request.profile = workload::parse_profile(arguments_.text("profile", "uniform"));
  request.seed = static_cast<std::uint64_t>(arguments_.number("seed", 1));
  request.num_experts = arguments_.number("experts", 256);
  request.top_k = arguments_.number("topk", 8);
  request.num_ranks = meeting_.num_ranks();
  request.tokens_per_rank = arguments_.number("tokens", 4096);
  ProbeLimits limits;
  limits.tokens = request.tokens_per_rank;
  limits.row_bytes = 2 * arguments_.number("hidden", 7168);
  limits.copy_bytes = wants(what, "copy") ? kCopyBytes : 0;

  Timer timer(meeting_, rank_, stream);
  Probes probes(timer, limits);
  probes.set_routing(workload::generate(request));
  const double wrong_words = wrong(probes, what);
  for (int round = 0; round < arguments_.number("rounds", 5); ++round) measure_throughput(probes, what);
  if (wants(what, "step")) measure_steps(timer, probes);
  if (probes.failed()) throw std::runtime_error("a step waited for a peer in vain");
  if (rank_ == 0) {
    print(static_cast<double>(
        workload::measure(workload::generate(request), request.num_experts, request.num_ranks).rows));
    fmt::print("{} wrong words\n", wrong_words);
  }
  return wrong_words;
}

int main_of(int argc, char** argv) {
  const Arguments arguments(argc, argv,
                            {"ranks", "tokens", "hidden", "topk", "experts", "profile", "seed", "what", "sms", "rows",
                             "rounds", "gpus", "start"});
  setenv("CUDA_MODULE_LOADING", "EAGER", 0);
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
  int gpus = 0;
  check(cudaGetDeviceCount(&gpus), "cudaGetDeviceCount");
  const int ranks = arguments.number("ranks", std::max(2, gpus));
  gpus = std::min({gpus, ranks, arguments.number("gpus", gpus)});
  Meeting meeting(ranks);
  StartsInTurn starts(ranks);
  double wrong = 0;
  LocalGroup::run_threads(ranks, [&](int rank) {
    try {
      const double of_rank = Run(arguments, meeting, starts, rank, gpus).run();
      if (rank == 0) wrong = of_rank;
    } catch (...) {
      meeting.leave();
      throw;
    }
  });
  return wrong == 0 ? 0 : 1;
}

}  // namespace
}  // namespace anyep::bench

int main(int argc, char** argv) {
  try {
    return anyep::bench::main_of(argc, argv);
  } catch (const std::invalid_argument& error) {
    fmt::print(stderr, "{}\n{}", error.what(), anyep::bench::kUsage);
    return 2;
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
    return 3;
  }
}
