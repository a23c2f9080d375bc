// Tests of the high-throughput kernels on real GPUs, ranks as threads: random calls against an oracle, ranks that never
// come, values that no correct call has. With --bench: times of whole operations.
//
//   high_throughput_kernels_test [--ranks 2] [--cases 200] [--seed 1] [--no-combine] [--faults] [--bench] [--limit seconds]
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "cuda/runtime/launch.h"
#include "high_throughput_bench.h"
#include "high_throughput_run.h"

namespace {

using namespace anyep;
using namespace anyep::test;

Case random_case(int num_ranks, std::uint64_t seed) {
  std::mt19937_64 random(seed * 1000003 + static_cast<std::uint64_t>(num_ranks));
  const auto below = [&](std::uint64_t limit) { return static_cast<int>(random() % limit); };
  Case c;
  c.seed = seed;
  c.num_ranks = num_ranks;
  c.num_experts = num_ranks + below(60);
  c.top_k = 1 + below(below(4) == 0 ? 32 : 9);
  const int most = below(4) == 0 ? 1500 : 200;
  for (int rank = 0; rank < num_ranks; ++rank)
    c.tokens.push_back(below(5) == 0 ? 0 : below(static_cast<std::uint64_t>(most)));
  c.routes = static_cast<Routes>(below(6));
  c.dtype = below(3) == 0 ? DType::kF32 : below(2) == 0 ? DType::kBF16 : DType::kF16;
  const int hiddens[] = {8, 16, 24, 136, 512, 1000, 2048, 2880, 4096, 7168};
  c.hidden = hiddens[below(most > 200 ? 7 : 10)];
  if (most <= 200 && below(20) == 0) c.hidden = 16384;
  c.num_scales = below(2) == 0 ? 0 : below(60);
  c.extra_elements = below(3) == 0 ? 8 * below(20) : 0;
  c.wide_in = below(2) == 0;
  c.wide_out = below(2) == 0;
  c.by_columns = below(2) == 0;
  c.with_ids = below(4) != 0;
  c.given_ranks = below(5) == 0;
  c.x_beside = below(4) == 0 ? c.element_bytes() * (1 + below(7)) : 0;
  c.x_pad = below(4) == 0 ? 4 * (1 + below(8)) : 0;
  c.room = below(3);
  c.num_sms = 1 + below(16);
  c.num_weights = below(2) == 0 ? 0 : c.top_k;
  c.num_bias = below(3);
  for (bool& gather : c.gather) gather = below(2) == 0;
  if (below(3) == 0) c.tokens_per_turn = 1 + below(static_cast<std::uint64_t>(most));
  return c;
}

std::string describe(const Case& c) {
  std::string text = "ranks " + std::to_string(c.num_ranks) + " seed " + std::to_string(c.seed) + " hidden " +
                     std::to_string(c.hidden) + " type " + std::to_string(static_cast<int>(c.dtype)) + " top " +
                     std::to_string(c.top_k) + "/" + std::to_string(c.num_experts) + " sms " +
                     std::to_string(c.num_sms) + " room " + std::to_string(c.room) + " beside " +
                     std::to_string(c.x_beside) + " pad " + std::to_string(c.x_pad) + " scales " +
                     std::to_string(c.num_scales) + " extra " + std::to_string(c.extra_elements) + " turn " +
                     std::to_string(c.tokens_per_turn) + " tokens";
  for (const int tokens : c.tokens) text += " " + std::to_string(tokens);
  text += " gather";
  for (int rank = 0; rank < c.num_ranks; ++rank) text += c.gather[rank] ? " 1" : " 0";
  return text;
}

Budget budget_for(int num_ranks) {
  Budget budget;
  budget.rows_bytes = std::int64_t{num_ranks} * (160 << 20);
  budget.max_experts = 1024;
  return budget;
}

int random_tests(int num_ranks, int cases, std::uint64_t first_seed, bool combine) {
  World world(num_ranks, budget_for(num_ranks), std::size_t{1} << 30, 2'000'000'000);
  world.each([](int) { cuda::load_kernels(); });
  int failed = 0;
  const std::uint64_t start = protocol::now_ns();
  for (int i = 0; i < cases; ++i) {
    const Case c = random_case(num_ranks, first_seed + static_cast<std::uint64_t>(i));
    const std::string difference = Run(world, c).execute(combine);
    if (difference.empty()) continue;
    std::printf("WRONG %s: %s\n", describe(c).c_str(), difference.c_str());
    std::fflush(stdout);
    ++failed;
    if (!world.fault().empty() || failed > 10) break;
  }
  std::printf("%d ranks: %d cases, %d wrong, %.1f s\n", num_ranks, cases, failed,
              static_cast<double>(protocol::now_ns() - start) * 1e-9);
  std::fflush(stdout);
  return failed;
}

}  // namespace

int main(int argc, char** argv) {
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  int cases = 100, failed = 0, limit_s = 45;
  std::uint64_t seed = 1;
  std::vector<int> ranks;
  bool combine = true, bench = false, faults = false;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    const auto value = [&] { return i + 1 < argc ? std::atoi(argv[++i]) : 0; };
    if (option == "--ranks") ranks.push_back(value());
    if (option == "--cases") cases = value();
    if (option == "--limit") limit_s = value();
    if (option == "--seed") seed = static_cast<std::uint64_t>(value());
    if (option == "--no-combine") combine = false;
    if (option == "--bench") bench = true;
    if (option == "--faults") faults = true;
  }
  std::thread([limit_s] {
    std::this_thread::sleep_for(std::chrono::seconds(limit_s));
    std::printf("the test's own limit\n");
    std::fflush(stdout);
    _exit(3);
  }).detach();
  try {
    for (const int n : ranks) failed += random_tests(n, cases, seed, combine);
    if (faults) failed += fault_tests();
    if (bench) run_bench(combine);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    failed = 1;
  }
  std::printf("%s\n", failed == 0 ? "all right" : "FAILED");
  std::fflush(stdout);
  _exit(failed == 0 ? 0 : 1);  // a detached watchdog, and perhaps kernels that wait
}
