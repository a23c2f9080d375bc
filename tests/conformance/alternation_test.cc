// One engine, other shapes in every call, one rank always late.
#include <array>

#include "conformance/conformance.h"

namespace anyep::test {
namespace {

class Alternation : public Conformance {};

/// Call by call another rank is late.
Pace late(int call, int num_ranks) {
  return {.delayed = call % num_ranks, .delay_ms = 1 + call % 3};
}

// Experts, top-k, hidden, type and tokens change with every high-throughput call.
TEST_P(Alternation, HighThroughputShapes) {
  Scenario scenario = ranks(4);
  const std::array<DType, 3> types = {DType::kBF16, DType::kF32, DType::kF16};
  for (int call = 0; call < 12; ++call) {
    const auto i = static_cast<unsigned>(call);
    const int experts = std::array{8, 5, 33, 256}[i % 4];
    const int top_k = std::array{2, 5, 1, 8}[i % 4];
    const int handle = scenario.then(
        RouteStep{.choices = random_choices(201 + i, {experts, top_k, ragged(4, 1 + 9 * (call % 5))})}, late(call, 4));
    const std::int64_t hidden = std::array{8, 7168, 264}[i % 3];
    scenario.then(DispatchStep{.handle = handle, .dtype = types[i % 3], .hidden = hidden}, late(call + 1, 4));
    scenario.then(
        CombineStep{.handle = handle, .dtype = types[(i + 1) % 3], .hidden = std::array{520, 16, 2048}[i % 3]},
        late(call + 2, 4));
  }
  expect(scenario);
}

// M, hidden, experts, top-k and wire change with every low-latency call.
TEST_P(Alternation, LowLatencyShapes) {
  Scenario scenario = ranks(4);
  for (int call = 0; call < 16; ++call) {
    const auto i = static_cast<unsigned>(call);
    const int experts = std::array{8, 5, 64, 3}[i % 4];
    const int top_k = std::array{2, 5, 8, 1}[i % 4];
    const std::int64_t most = std::array{4, 128, 1, 17, 40}[i % 5];
    const Wire wire = std::array{Wire::kBF16, Wire::kFP8, Wire::kUE8M0}[i % 3];
    const int dispatch =
        scenario.then(LowLatencyDispatchStep{.choices = random_choices(221 + i, {experts, top_k, ragged(4, most)}),
                                             .hidden = std::array{128, 2048, 16, 512, 1040}[(i + 1) % 5],
                                             .max_tokens = most,
                                             .wire = wire,
                                             .round_scale = wire == Wire::kUE8M0},
                      late(call, 4));
    scenario.then(LowLatencyCombineStep{.dispatch = dispatch, .hidden = std::array{256, 0, 1024}[i % 3]},
                  late(call + 1, 4));
  }
  expect(scenario);
}

// Prefill and decode in turns, as a server does it, decode with hooks. Both modes live in one engine.
TEST_P(Alternation, ModesInOneEngine) {
  Scenario scenario = ranks(3);
  for (int call = 0; call < 6; ++call) {
    const auto i = static_cast<unsigned>(call);
    const int handle =
        scenario.then(RouteStep{.choices = random_choices(241 + i, {12, 4, ragged(3, 30)})}, late(call, 3));
    scenario.then(DispatchStep{.handle = handle, .dtype = DType::kF8E4M3, .hidden = 512, .num_scales = 4});
    const int dispatch = scenario.then(
        LowLatencyDispatchStep{
            .choices = random_choices(251 + i, {12, 4, equal(3, 4 + call)}), .hidden = 512, .hook = true},
        late(call + 1, 3));
    scenario.then(CombineStep{.handle = handle, .hidden = 512, .num_biases = 1});
    scenario.then(ReceiveStep{dispatch});
    scenario.then(LowLatencyCombineStep{.dispatch = dispatch}, late(call + 2, 3));
    if (call % 2 == 0) scenario.then(BarrierStep{});
  }
  expect(scenario);
}

// Callers may zero the engine's payload memory between ops, as recovery code does. The protocol does not notice.
TEST_P(Alternation, PayloadMemoryMayBeZeroed) {
  Scenario scenario = ranks(3);
  scenario.rows_bytes = 1 << 20;
  for (unsigned i = 0; i < 4; ++i) {
    const int handle = scenario.then(RouteStep{.choices = random_choices(261 + i, {7, 2, ragged(3, 9)})});
    const int dispatch =
        scenario.then(LowLatencyDispatchStep{.choices = random_choices(271 + i, {7, 2, ragged(3, 9)})});
    scenario.then(ZeroStep{});
    scenario.then(DispatchStep{.handle = handle});
    scenario.then(LowLatencyCombineStep{.dispatch = dispatch});
    scenario.then(ZeroStep{});
    scenario.then(CombineStep{.handle = handle});
  }
  expect(scenario);
}

// Sixty small pairs in a row, with high-throughput ops between. Turns wrap around their regions many times.
TEST_P(Alternation, ManyTurns) {
  Scenario scenario = ranks(2);
  for (int call = 0; call < 60; ++call) {
    const auto i = static_cast<unsigned>(call);
    const int dispatch =
        scenario.then(LowLatencyDispatchStep{.choices = random_choices(301 + i, {4, 2, {call % 4, 3 - call % 4}}),
                                             .hidden = 16,
                                             .max_tokens = 1 + call % 3 + 2});
    scenario.then(LowLatencyCombineStep{.dispatch = dispatch});
    if (call % 3 != 0) continue;
    const int handle = scenario.then(RouteStep{.choices = random_choices(401 + i, {4, 2, {call % 5, 2}})});
    scenario.then(DispatchStep{.handle = handle, .hidden = 8});
    scenario.then(CombineStep{.handle = handle, .hidden = 8});
  }
  expect(scenario);
}

ANYEP_IN_EVERY_WORLD(Alternation);

}  // namespace
}  // namespace anyep::test
