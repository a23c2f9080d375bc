// Failures: the kernel leaves, the record says why, the context goes on.
#include <cstdio>

#include "cuda/runtime/launch.h"
#include "high_throughput_bench.h"
#include "high_throughput_run.h"

namespace anyep::test {
namespace {

constexpr std::uint64_t kLimitNs = 50'000'000;

struct Fault {
  const char* name;
  protocol::Ended ended;
  int peer;
};

/// Rank 0 alone takes part in two-rank ops; rank 1 never comes.
bool leaves(const Fault& want, const std::function<void(World&, cuda::Team)>& launch,
            const std::function<void(World&)>& meanwhile = {}) {
  Budget budget;
  budget.rows_bytes = 64 << 20;
  World world(2, budget, std::size_t{64} << 20, kLimitNs);
  check(cudaSetDevice(world.ranks[0].device), "device");
  cuda::load_kernels();
  launch(world, world.team(0, protocol::make_code(1, 1)));
  if (meanwhile) meanwhile(world);
  check(cudaStreamSynchronize(world.ranks[0].stream), "synchronize");
  const protocol::FaultRecord& record = *world.ranks[0].record;
  const bool right =
      record.ready == 1 && record.ended == static_cast<std::uint32_t>(want.ended) && record.peer == want.peer;
  // The context lives: a copy through the device comes back.
  std::uint32_t out = 0;
  check(cudaMemset(world.ranks[0].memory, 0x5A, 4), "memset");
  check(cudaMemcpy(&out, world.ranks[0].memory, 4, cudaMemcpyDeviceToHost), "copy");
  const bool alive = out == 0x5A5A5A5A;
  std::printf("%s %s: %s\n", right && alive ? "ok   " : "WRONG", want.name, world.fault().c_str());
  std::fflush(stdout);
  return right && alive;
}

struct Inputs {
  std::byte* x;
  std::int32_t *place, *before, *rows_until;
};

/// 64 tokens that all go to both ranks.
Inputs make_inputs(World& world) {
  Arena& arena = world.ranks[0].arena;
  Inputs in{arena.take(128 * 1024), arena.array<std::int32_t>(128), arena.array<std::int32_t>(2),
            arena.array<std::int32_t>(2)};
  std::vector<std::int32_t> place;
  for (int token = 0; token < 64; ++token) place.insert(place.end(), {token, token});
  const std::int32_t before[2] = {0, 0}, rows_until[2] = {64, 128};
  check(cudaMemcpy(in.place, place.data(), 512, cudaMemcpyHostToDevice), "inputs");
  check(cudaMemcpy(in.before, before, 8, cudaMemcpyHostToDevice), "inputs");
  check(cudaMemcpy(in.rows_until, rows_until, 8, cudaMemcpyHostToDevice), "inputs");
  return in;
}

void launch_routes(World& world, const cuda::Team& team) {
  Arena& arena = world.ranks[0].arena;
  cuda::NotifyParams p;
  p.team = team;
  p.num_experts = 8;
  p.place = arena.array<std::int32_t>(2);
  p.before = arena.array<std::int32_t>(2);
  p.num_ranges = 1;
  p.tokens_per_range = 1;
  p.rows_until = arena.array<std::int32_t>(2);
  p.tokens = arena.array<std::int32_t>(2);
  p.partial = arena.array<std::int32_t>(10);
  p.page = world.ranks[0].page;
  cuda::launch_notify(p, world.ranks[0].stream);
}

void launch_rows(World& world, const cuda::Team& team, std::size_t beside) {
  const Inputs in = make_inputs(world);
  cuda::DispatchParams p;
  p.team = team;
  p.places = {in.place, in.before, 64, 64};
  p.x = in.x + beside;
  p.x_row_stride = 1024;
  p.row_bytes = 1024;
  constexpr std::uint64_t kNone = cuda::Grant::kNone;
  p.grant = {
      world.layout.heap, kNone, kNone, kNone, world.layout.heap + (1 << 20), {kNone, kNone, kNone, kNone}, 128, 1};
  p.rows_until = in.rows_until;
  cuda::launch_dispatch(p, 4, world.ranks[0].stream);
}

void launch_sums(World& world, const cuda::Team& team, bool gather, std::int64_t num_rows, std::size_t beside) {
  const Inputs in = make_inputs(world);
  cuda::CombineParams p;
  p.team = team;
  p.hidden = 512;
  p.x = gather ? world.ranks[0].window + world.layout.heap : in.x + beside;
  if (gather) p.x_in_window = world.layout.heap;
  p.x_row_stride = 1024;
  p.num_rows = num_rows;
  p.rows_until = in.rows_until;
  p.places = {in.place, in.before, 64, 64};
  p.out = world.ranks[0].arena.take(65536);
  p.out_row_stride = 1024;
  cuda::launch_combine(p, 4, world.ranks[0].stream);
}

}  // namespace

int fault_tests() {
  using protocol::Ended;
  const auto abort_soon = [](World& world) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    std::atomic_ref<std::uint64_t>(*world.ranks[0].abort).store(1, std::memory_order_release);
  };
  int failed = 0;
  failed += !leaves({"notify, peer absent", Ended::kTimeout, 1}, launch_routes);
  failed += !leaves({"notify, aborted", Ended::kAborted, 1}, launch_routes, abort_soon);
  for (const std::size_t beside : {0, 4}) {
    const auto rows = [beside](World& world, const cuda::Team& team) { launch_rows(world, team, beside); };
    failed += !leaves({"dispatch, peer absent", Ended::kTimeout, 1}, rows);
    failed += !leaves({"dispatch, aborted", Ended::kAborted, 1}, rows, abort_soon);
    const auto push = [beside](World& world, const cuda::Team& team) { launch_sums(world, team, false, 128, beside); };
    failed += !leaves({"combine by slots, peer absent", Ended::kTimeout, 1}, push);
    const auto few = [beside](World& world, const cuda::Team& team) { launch_sums(world, team, false, 127, beside); };
    failed += !leaves({"combine, fewer rows than the handle has", Ended::kTooMany, 0}, few);
  }
  const auto gather = [](World& world, const cuda::Team& team) { launch_sums(world, team, true, 128, 0); };
  failed += !leaves({"combine by gather, peer absent", Ended::kTimeout, 1}, gather);
  return failed;
}

}  // namespace anyep::test
