// Low-latency kernels against the reference, bit for bit: random shapes call by call, uneven batches, hooks, masks, faults.
//   kernels_low_latency [ranks] [seconds] [--bench [--tokens 1,8,32]] [--seed n] [--few: what compute-sanitizer can follow]
#include <cstdint>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/device/ptx.cuh"
#include "low_latency_bench.h"
#include "low_latency_case.h"
#include "low_latency_untouched.h"

namespace anyep::test {
namespace {

#if defined(ANYEP_EMULATION)
constexpr bool kSlow = true;  ///< a second a pair and more: fewer of them
#else
constexpr bool kSlow = false;
#endif

/// Fills SMs: two blocks take all threads of one.
__global__ void crowd(const __grid_constant__ LingerParams p) {
  std::byte* const most = cuda::ptx::dynamic_shared<16>();
  const std::uint64_t from = protocol::now_ns();
  while (protocol::now_ns() - from < p.ns) most[threadIdx.x] = std::byte{1};
}
const cuda::Kernel<LingerParams> kCrowd(crowd, "crowd");

/// Others hold most SMs: blocks do not start together, some retreat, and the last one serves in their place. In the first rounds
/// all ranks are crowded; then one is, and others late, so that its blocks retreat while the peers' words come in.
bool crowded(World& world, Test& test) {
  std::vector<cudaStream_t> streams;
  for (int r = 0; r < world.num_gpus(); ++r) {
    CHECK_CUDA(cudaSetDevice(world.at(r).device));
    streams.emplace_back();
    CHECK_CUDA(cudaStreamCreateWithFlags(&streams.back(), cudaStreamNonBlocking));
  }
  bool right = true;
  constexpr int kAll = kSlow ? 3 : 6, kRounds = kSlow ? 6 : 40;
  for (int round = 0; round < kRounds && right; ++round) {
    Pair pair = test.random_pair(200, round % 4 == 3);
    pair.dispatch.hook = pair.combine.hook = false;
    pair.dispatch.num_sms = pair.combine.num_sms = 0;
    for (int r = 0; r < (round < kAll ? world.num_gpus() : 1); ++r) {
      CHECK_CUDA(cudaSetDevice(world.at(r).device));
      const int all = cuda::device_traits().num_sms, blocks = round < 2 ? all - 1 : all * 3 / 4;
      kCrowd({.blocks = 2 * static_cast<unsigned>(blocks),
              .threads = 1024,
              .shared_bytes = 100 << 10,
              .stream = streams[static_cast<std::size_t>(r)]},
             {round < 4 || round >= kAll ? 30'000'000u : 1'000'000u});
    }
    right = test.one_pair(pair, round < kAll ? 0 : 80);
    for (int r = 0; r < world.num_gpus(); ++r) CHECK_CUDA(cudaStreamSynchronize(streams[static_cast<std::size_t>(r)]));
  }
  for (int r = 0; r < world.num_gpus(); ++r) CHECK_CUDA(cudaStreamDestroy(streams[static_cast<std::size_t>(r)]));
  return right;
}

/// A graph with an odd number of ops, replayed with eager ops in between; then what the last replay left is checked.
bool replayed(World& world, Test& test) {
  for (int round = 0; round < 3; ++round) {
    Pair first = test.random_pair(60), second = test.random_pair(60);
    first.dispatch.hook = true;
    first.combine.hook = round == 1;
    Run a, b;
    test.prepare(a, first, 0);
    test.prepare(b, second, 1);
    std::vector<cudaGraphExec_t> graphs(static_cast<std::size_t>(world.num_ranks()));
    const int both = ll::kSend | ll::kReceive;
    for (int r = 0; r < world.num_ranks(); ++r) {
      CHECK_CUDA(cudaSetDevice(world.at(r).device));
      cudaGraph_t graph;
      CHECK_CUDA(cudaStreamBeginCapture(world.at(r).stream, cudaStreamCaptureModeThreadLocal));
      test.dispatch(a, r, ll::kSend);
      if (second.dispatch.hook) {
        test.dispatch(b, r, ll::kSend);
        test.dispatch(a, r, ll::kReceive, 1);
        test.dispatch(b, r, ll::kReceive);
      } else {
        test.dispatch(b, r, both);
        test.dispatch(a, r, ll::kReceive, 1);
      }
      if (first.combine.hook) {
        test.combine(a, r, ll::kSend);
        test.combine(a, r, ll::kReceive);
      } else {
        test.combine(a, r, both);
      }
      CHECK_CUDA(cudaStreamEndCapture(world.at(r).stream, &graph));
      CHECK_CUDA(cudaGraphInstantiate(&graphs[static_cast<std::size_t>(r)], graph, 0));
      CHECK_CUDA(cudaGraphDestroy(graph));
      CHECK_CUDA(cudaGraphUpload(graphs[static_cast<std::size_t>(r)], world.at(r).stream));
    }
    for (int replay = 0; replay < 5; ++replay) {
      for (int r = 0; r < world.num_ranks(); ++r) {
        CHECK_CUDA(cudaSetDevice(world.at(r).device));
        Run::Device& d = a.device[static_cast<std::size_t>(r)];
        CHECK_CUDA(cudaMemsetAsync(d.slab, 0xFF, d.slab_bytes, world.at(r).stream));
        CHECK_CUDA(cudaMemsetAsync(d.out, 0xFF, a.want_out[static_cast<std::size_t>(r)].size(), world.at(r).stream));
        for (Run* run : {&a, &b}) {
          const auto at = static_cast<std::size_t>(r);
          CHECK_CUDA(cudaMemsetAsync(run->device[at].received, 0, run->want[at].counts.size() * 4, world.at(r).stream));
        }
        CHECK_CUDA(cudaGraphLaunch(graphs[static_cast<std::size_t>(r)], world.at(r).stream));
        if (replay == 4) continue;
        if (second.combine.hook) {
          test.combine(b, r, ll::kSend);
          test.combine(b, r, ll::kReceive);
        } else {
          test.combine(b, r, both);
        }
      }
    }
    const bool right = test.settled("a graph") && test.check_dispatch(a) && test.check_dispatch(b) &&
                       test.check_combine(a) && test.check_combine(b);
    for (int r = 0; r < world.num_ranks(); ++r) {
      CHECK_CUDA(cudaSetDevice(world.at(r).device));
      CHECK_CUDA(cudaGraphExecDestroy(graphs[static_cast<std::size_t>(r)]));
    }
    if (!right) return false;
  }
  return true;
}

/// The checker is checked: one wrong bit of what is wanted must be noticed, in every field.
bool notices(World& world, Test& test) {
  Pair pair = test.random_pair(30);
  pair.dispatch.hook = pair.combine.hook = false;
  pair.dispatch.wire = Wire::kFP8;
  pair.shape.num_experts = 8;
  for (int& tokens : pair.tokens) tokens = static_cast<int>(pair.shape.max_tokens);
  Run run;
  test.prepare(run, pair, 0);
  for (int r = 0; r < world.num_ranks(); ++r) {
    test.dispatch(run, r, ll::kSend | ll::kReceive);
    test.combine(run, r, ll::kSend | ll::kReceive);
  }
  bool right = test.settled("a pair") && test.check_dispatch(run) && test.check_combine(run);
  std::printf("four failures must follow:\n");
  reference::Slabs& want = run.want.back();
  std::size_t expert = 0;
  while (want.counts[expert] == 0) ++expert;
  const std::size_t row = expert * static_cast<std::size_t>(want.rows_per_expert);
  const auto flipped = [&](auto& value, auto&& check) {
    value ^= std::remove_reference_t<decltype(value)>{1};
    right = !check() && right;
    value ^= std::remove_reference_t<decltype(value)>{1};
  };
  const auto dispatched = [&] { return test.check_dispatch(run); };
  flipped(want.source[row], dispatched);
  flipped(want.range[0], dispatched);
  flipped(want.x[row * static_cast<std::size_t>(pair.shape.hidden)], dispatched);
  flipped(run.want_out.back().back(), [&] { return test.check_combine(run); });
  return right;
}

bool missing_rank(World& world, Test& test) {
  if (world.num_ranks() < 2) return true;
  world.reset();
  world.set_limit_ms(150);
  Pair pair = test.random_pair(20);
  pair.dispatch.hook = pair.combine.hook = false;
  Run run;
  test.prepare(run, pair, 0);
  const int missing = world.num_ranks() - 1;
  for (int r = 0; r < missing; ++r) test.dispatch(run, r, ll::kSend | ll::kReceive);
  world.synchronize();
  bool right = true;
  for (int r = 0; r < missing; ++r) {
    const protocol::FaultRecord& record = world.at(r).control->record;
    right = right && record.ready == 1 && record.peer == missing &&
            record.ended == static_cast<unsigned>(protocol::Ended::kTimeout);
  }
  if (!right) {
    std::printf("FAIL: the time-out does not name rank %d\n", missing);
    world.print_records();
  }
  world.reset();  // the contexts still work
  world.set_limit_ms(5000);
  return right && test.one_pair(test.random_pair(40));
}

bool other_shape(World& world, Test& test) {
  if (world.num_ranks() < 2) return true;
  world.reset();
  world.set_limit_ms(1000);
  Pair pair = test.random_pair(20);
  pair.dispatch.hook = pair.combine.hook = false;
  Run run;
  test.prepare(run, pair, 0);
  for (int r = 0; r < world.num_ranks(); ++r) {
    Run mine = run;
    if (r == 0) mine.pair.shape.max_tokens += 1;
    test.dispatch(mine, r, ll::kSend | ll::kReceive);
  }
  world.synchronize();
  bool right = world.at(0).control->record.ended == static_cast<unsigned>(protocol::Ended::kMismatch);
  if (!right) {
    std::printf("FAIL: a mismatch was not found\n");
    world.print_records();
  }
  world.reset();
  world.set_limit_ms(5000);
  return right && test.one_pair(test.random_pair(40));
}

/// Two ops in flight: both sends first, then both receives.
bool two_in_flight(World& world, Test& test, Pair first, Pair second) {
  first.dispatch.hook = second.dispatch.hook = first.combine.hook = second.combine.hook = true;
  Run a, b;
  test.prepare(a, first, 0);
  test.prepare(b, second, 1);
  test.maybe_late(30);
  for (int r = 0; r < world.num_ranks(); ++r) {
    test.dispatch(a, r, ll::kSend);
    test.dispatch(b, r, ll::kSend);
    test.dispatch(a, r, ll::kReceive, 1);
    test.combine(a, r, ll::kSend);
    test.dispatch(b, r, ll::kReceive, 1);
    test.combine(b, r, ll::kSend);
    test.combine(a, r, ll::kReceive, 1);
    test.combine(b, r, ll::kReceive, 0);
  }
  return test.settled("two in flight") && test.check_dispatch(a) && test.check_dispatch(b) && test.check_combine(a) &&
         test.check_combine(b);
}

/// A hook is open while a whole op passes.
bool hook_around(World& world, Test& test, Pair first, Pair second) {
  first.dispatch.hook = true;
  second.dispatch.hook = false;
  Run a, b;
  test.prepare(a, first, 0);
  test.prepare(b, second, 1);
  for (int r = 0; r < world.num_ranks(); ++r) {
    test.dispatch(a, r, ll::kSend);
    test.dispatch(b, r, ll::kSend | ll::kReceive);
    test.dispatch(a, r, ll::kReceive, 1);
  }
  return test.settled("a hook around an op") && test.check_dispatch(a) && test.check_dispatch(b);
}

/// A rank that is silent is masked; its tokens are lost, the others' are right.
bool masked_rank(World& world, Test& test) {
  if (world.num_ranks() < 2) return true;
  world.reset();
  world.allow_masks();
  world.set_limit_ms(100);
  Pair pair = test.random_pair(40);
  pair.dispatch.hook = pair.combine.hook = pair.combine.exact = false;
  pair.combine.wire = Wire::kBF16;
  pair.tokens.back() = 0;
  const int missing = world.num_ranks() - 1;
  Run run;
  test.prepare(run, pair, 0);
  // What the others should get: nothing from or by the missing rank.
  Run want = run;
  for (int r = 0; r < missing; ++r) test.dispatch(run, r, ll::kSend | ll::kReceive);
  for (int r = 0; r < missing; ++r) test.combine(run, r, ll::kSend | ll::kReceive);
  world.synchronize();
  bool right = world.failed() < 0;
  for (int r = 0; r < missing; ++r) right = right && world.at(r).control->masked[missing] == 1;
  for (int r = 0; r < missing && right; ++r) {
    const auto at = static_cast<std::size_t>(r);
    CHECK_CUDA(cudaSetDevice(world.at(r).device));
    const auto counts = test.fetch<std::int32_t>(run.device[at].counts, run.want[at].counts.size());
    right = right && counts == run.want[at].counts;
  }
  for (std::vector<std::int64_t>& ids : want.ids) {
    const int first = reference::experts_of(missing, world.num_ranks(), pair.shape.num_experts).first;
    for (std::int64_t& id : ids) id = id >= first ? -1 : id;
  }
  for (int r = 0; r < world.num_ranks(); ++r) {
    want.routing[static_cast<std::size_t>(r)].experts =
        TensorView::dense(want.ids[static_cast<std::size_t>(r)].data(), DType::kI64,
                          {pair.tokens[static_cast<std::size_t>(r)], pair.shape.top_k});
  }
  std::vector<ExpertSlabs> slabs;
  for (int r = 0; r < world.num_ranks(); ++r) {
    const auto at = static_cast<std::size_t>(r);
    const reference::Slabs& slab = run.want[at];
    ExpertSlabs in;
    in.x = TensorView::dense(run.y[at].data(), DType::kBF16,
                             {slab.local_experts, slab.rows_per_expert, pair.shape.hidden});
    in.source = TensorView::dense(slab.source.data(), DType::kI32, {slab.local_experts, slab.rows_per_expert});
    in.range = TensorView::dense(slab.range.data(), DType::kI64, {slab.local_experts, world.num_ranks()});
    slabs.push_back(in);
  }
  const auto out = reference::low_latency_combine(pair.shape, slabs, want.routing, {});
  for (int r = 0; r < missing && right; ++r) {
    const auto at = static_cast<std::size_t>(r);
    CHECK_CUDA(cudaSetDevice(world.at(r).device));
    right = right && test.fetch<std::byte>(run.device[at].out, out[at].size()) == out[at];
  }
  if (!right) {
    std::printf("FAIL: masks\n");
    world.print_records();
  }
  world.reset();
  world.set_limit_ms(5000);
  return right && test.one_pair(test.random_pair(40));
}

bool barriers(World& world) {
  for (int i = 0; i < 3; ++i) {
    for (int r = 0; r < world.num_ranks(); ++r) {
      CHECK_CUDA(cudaSetDevice(world.at(r).device));
      cuda::BarrierParams p{world.call(r, Shape{}, 6).team};
      cuda::launch_barrier(p, world.at(r).stream);
    }
  }
  world.synchronize();
  return world.failed() < 0;
}

/// `few`: every kind of kernel, nothing that goes by the clock or takes thousands of pairs.
int run(int num_ranks, int seconds, std::uint64_t seed, bool few) {
  World world(num_ranks, std::uint64_t{kSlow ? 1u : 2u} << 29);
  Test test(world, seed);
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  int pairs = 0;
  bool right = barriers(world);
  const auto phase = [&](const char* name, bool ok) {
    std::printf("%-28s %s (%.1f s, %d pairs)\n", name, ok ? "ok" : "FAILED", elapsed(), pairs);
    std::fflush(stdout);
    right = right && ok;
    return ok;
  };
  phase("barrier", right);
  if (!phase("the checker notices", notices(world, test))) return 1;
  // Plain pairs first: what fails here fails everywhere.
  bool ok = true;
  for (int i = 0; i < 12 && ok; ++i, ++pairs) {
    Pair pair = test.random_pair(i < 6 ? 8 : 200);
    pair.dispatch.num_sms = pair.combine.num_sms = 0;
    if (i < 9) pair.dispatch.hook = pair.combine.hook = pair.combine.exact = false;
    if (i < 9) pair.combine.wire = Wire::kBF16;
    ok = test.one_pair(pair);
  }
  if (!phase("plain pairs", ok)) return 1;
  for (int i = 0; i < (kSlow ? 4 : 12) && ok; ++i, ++pairs) {
    Pair pair = test.random_pair(1, true);
    if (i < 4) pair.dispatch.hook = pair.combine.hook = pair.combine.exact = false;
    if (i < 4) pair.combine.wire = Wire::kBF16;
    if (i == 0) {  // every block copies several records, one of a slot after the other
      pair.shape.hidden = 7168;
      pair.shape.num_experts = 8;
      pair.shape.max_tokens = 140;
      pair.tokens.assign(static_cast<std::size_t>(num_ranks), 140);
      pair.dispatch.wire = Wire::kBF16;
      pair.dispatch.num_sms = pair.combine.num_sms = 8;
    }
    ok = test.one_pair(pair);
  }
  if (!phase("many wide rows", ok)) return 1;
  // One block does everything, again and again: what depends on which of its warps is ahead shows only here. Without the __syncwarp()
  // at the end of gather_counts() one in some thousands or tens of thousands stands still (decision 0019).
  constexpr int kTimes = kSlow ? 10 : 1500;
  for (const double end = elapsed() + 3; elapsed() < end && ok && !few; pairs += kTimes) {
    Pair pair = test.random_pair(1, true);
    pair.dispatch.num_sms = 1;
    pair.dispatch.hook = false;
    for (int& tokens : pair.tokens) tokens = std::min(tokens, 20);
    ok = test.many_pairs(pair, kTimes);
  }
  if (!few && !phase("one block", ok)) return 1;
  for (int i = 0; i < (few ? 2 : 8) && ok; ++i, pairs += 2)
    ok = two_in_flight(world, test, test.random_pair(100), test.random_pair(100)) &&
         hook_around(world, test, test.random_pair(100), test.random_pair(100));
  if (!phase("hooks", ok)) return 1;
  if (!phase("graphs", replayed(world, test))) return 1;
  if (few && kSlow) phase("untouched slots, records", Untouched(world, test).records_go_around());
  if (few) return right ? 0 : 1;
  if (!phase("crowded", crowded(world, test))) return 1;
  // Through the wrap, and through the turns that refresh.
  for (const std::uint32_t turn : {0xFFFF'FFF7u, 0x7FFF'FFFCu}) {
    world.reset();
    world.set_turn(turn);
    for (int i = 0; i < 12 && ok; ++i, ++pairs) ok = test.one_pair(test.random_pair(100, i % 4 == 3));
  }
  if (!phase("wrap and refresh", ok)) return 1;
  if (!phase("untouched slots", Untouched(world, test).run())) return 1;
  if (!phase("missing rank", missing_rank(world, test))) return 1;
  if (!phase("other shape", other_shape(world, test))) return 1;
  if (!phase("masked rank", masked_rank(world, test))) return 1;
  while (elapsed() < seconds && ok) {
    ok = test.one_pair(test.random_pair(test.chance(20) ? 300 : 80));
    ++pairs;
  }
  phase("random pairs", ok);
  return right ? 0 : 1;
}

}  // namespace
}  // namespace anyep::test

int main(int argc, char** argv) {
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  int ranks = 2, seconds = 20, position = 0;
  std::uint64_t seed = 1;
  bool bench = false, few = false;
  std::vector<int> tokens = {1, 8, 16, 32, 64, 128, 256, 512};
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) == "--bench") {
      bench = true;
    } else if (std::string(argv[i]) == "--few") {
      few = true;
    } else if (std::string(argv[i]) == "--tokens" && i + 1 < argc) {  // of the bench, separated by commas, at most 512
      tokens.clear();
      std::stringstream list(argv[++i]);
      for (std::string one; std::getline(list, one, ',');) tokens.push_back(std::atoi(one.c_str()));
    } else if (std::string(argv[i]) == "--seed" && i + 1 < argc) {
      seed = std::strtoull(argv[++i], nullptr, 10);
    } else {
      (position++ == 0 ? ranks : seconds) = std::atoi(argv[i]);
    }
  }
  anyep::test::watch(seconds + 45);
  const int result = bench ? anyep::test::bench(ranks, tokens) : anyep::test::run(ranks, seconds, seed, few);
  std::printf("%d ranks: %s\n", ranks, result == 0 ? "PASS" : "FAIL");
  std::fflush(stdout);
  _exit(result);
}
