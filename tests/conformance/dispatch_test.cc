// What rows carry, where they land, which handles serve.
#include "conformance/conformance.h"

namespace anyep::test {
namespace {

class Dispatch : public Conformance {
 protected:
  /// 3 ranks, 9 experts, top-3, 0 to 12 tokens; one route.
  struct Routed {
    Scenario scenario;
    int handle;
  };
  static Routed routed(int num_ranks = 3, std::int64_t most_tokens = 12, Ids ids = Ids::kInt64) {
    Routed made{ranks(num_ranks), 0};
    made.handle = made.scenario.then(
        RouteStep{.choices = random_choices(21, {3 * num_ranks, 3, ragged(num_ranks, most_tokens)}), .ids = ids});
    return made;
  }
};

// The same tokens as rows of every element type, NaN patterns included. Rows are opaque.
TEST_P(Dispatch, EveryElementType) {
  auto [scenario, handle] = routed();
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32, DType::kI8, DType::kU8}) {
    scenario.then(DispatchStep{.handle = handle, .dtype = dtype, .hidden = 48});
  }
  expect(scenario);
}

// FP8 rows with 1, H/128, odd and many scale columns, as float32 and int32. Every column arrives.
TEST_P(Dispatch, FP8WithAnyScaleColumns) {
  auto [scenario, handle] = routed();
  for (const int columns : {1, 3, 5, 7, 56, 224}) {
    for (const DType type : {DType::kF32, DType::kI32}) {
      scenario.then(DispatchStep{
          .handle = handle, .dtype = DType::kF8E4M3, .hidden = 384, .num_scales = columns, .scale_type = type});
    }
  }
  expect(scenario);
}

// Scales that lie transposed, padded, or once for all tokens. Any strides in, dense out.
TEST_P(Dispatch, ScalesWithAnyStrides) {
  auto [scenario, handle] = routed();
  for (const Strides strides : {Strides::kDense, Strides::kColumns, Strides::kPadded, Strides::kBroadcast}) {
    scenario.then(DispatchStep{
        .handle = handle, .dtype = DType::kF8E4M3, .hidden = 640, .num_scales = 5, .scale_strides = strides});
    scenario.then(
        DispatchStep{.handle = handle, .dtype = DType::kI8, .hidden = 16, .num_scales = 1, .scale_strides = strides});
  }
  expect(scenario);
}

// 2 ranks, rows of 16 bytes to 64 KiB. Any multiple of 16 bytes.
TEST_P(Dispatch, HiddenFromEightToSixteenThousand) {
  auto [scenario, handle] = routed(2, 6);
  for (const std::int64_t hidden : {8, 16, 24, 72, 1032, 2880, 7168, 8184, 16384}) {
    scenario.then(DispatchStep{.handle = handle, .hidden = hidden});
  }
  scenario.then(DispatchStep{.handle = handle, .dtype = DType::kF32, .hidden = 16384});
  expect(scenario);
}

// One to three extra payloads of odd widths. They travel with the row.
TEST_P(Dispatch, ExtraPayloads) {
  auto [scenario, handle] = routed();
  scenario.then(DispatchStep{.handle = handle, .extra = {4}});
  scenario.then(DispatchStep{.handle = handle, .extra = {16, 1, 100}, .with_experts = false});
  scenario.then(DispatchStep{.handle = handle, .dtype = DType::kF8E4M3, .num_scales = 3, .extra = {7, 32}});
  expect(scenario);
}

// Ids with and without weights, int32 and int64. Local ids come out, and weights only where they apply.
TEST_P(Dispatch, IdsBecomeLocal) {
  for (const Ids ids : {Ids::kInt32, Ids::kInt64}) {
    auto [scenario, handle] = routed(4, 20, ids);
    scenario.then(DispatchStep{.handle = handle});
    scenario.then(DispatchStep{.handle = handle, .with_weights = false});
    scenario.then(DispatchStep{.handle = handle, .with_experts = false});
    expect(scenario);
  }
}

// More output rows than arrive, the route not waited for. Ids past the last row are -1, the first rows exact.
TEST_P(Dispatch, MoreRowsThanNeeded) {
  for (const Memory memory : {Memory::kTensor, Memory::kWindow}) {
    Scenario scenario = ranks(3);
    const int handle =
        scenario.then(RouteStep{.choices = random_choices(22, {9, 3, {5, 0, 9}}), .finish = Finish::kLater});
    DispatchStep step{
        .handle = handle, .dtype = DType::kF8E4M3, .num_scales = 2, .extra = {8}, .out_rows = {14, 14, 40}};
    step.out.assign(3, memory);
    scenario.then(step);
    scenario.then(WaitStep{handle});
    scenario.then(CombineStep{.handle = handle, .surplus_rows = 5});
    expect(scenario);
  }
}

// Two ranks have room for fewer rows than come. Nothing is written past the end, kCapacity says need and have.
TEST_P(Dispatch, FewerRowsThanNeeded) {
  for (const Memory memory : {Memory::kTensor, Memory::kWindow}) {
    Scenario scenario = ranks(3);
    const int handle = scenario.then(RouteStep{.choices = all_to(0, {3, 3, equal(3, 8)})});
    DispatchStep step{
        .handle = handle, .dtype = DType::kI8, .hidden = 144, .num_scales = 3, .extra = {8}, .out_rows = {24, 7, 20}};
    step.out.assign(3, memory);
    scenario.then(step);
    step.finish = Finish::kEvent;
    scenario.then(step);
    scenario.then(DispatchStep{.handle = handle});  // the engine goes on
    scenario.then(CombineStep{.handle = handle});
    expect(scenario);
  }
}

// No room at all on one rank.
TEST_P(Dispatch, NoRowsWhereSomeAreNeeded) {
  Scenario scenario = ranks(2);
  const int handle = scenario.then(RouteStep{.choices = all_to(0, {2, 2, equal(2, 3)})});
  scenario.then(DispatchStep{.handle = handle, .out_rows = {0, 6}});
  scenario.then(DispatchStep{.handle = handle});
  expect(scenario);
}

// Into window rows on every rank: FP8 with scales, BF16, wide rows.
TEST_P(Dispatch, IntoWindowRows) {
  auto [scenario, handle] = routed(4, 16);
  const std::vector<Memory> window(4, Memory::kWindow);
  scenario.then(DispatchStep{.handle = handle, .out = window});
  scenario.then(DispatchStep{.handle = handle, .dtype = DType::kF8E4M3, .hidden = 896, .num_scales = 7, .out = window});
  scenario.then(DispatchStep{.handle = handle, .hidden = 4096, .with_experts = false, .out = window});
  scenario.then(DispatchStep{.handle = handle, .extra = {12}, .out = window});
  expect(scenario);
}

// Some ranks receive into window rows, the others into tensors, changing call by call. Each call is right.
TEST_P(Dispatch, MemoryDiffersBetweenRanks) {
  auto [scenario, handle] = routed(3, 16);
  const Memory w = Memory::kWindow, t = Memory::kTensor;
  for (const std::vector<Memory>& out :
       {std::vector{w, t, t}, std::vector{t, w, w}, std::vector{t, t, t}, std::vector{w, t, w}}) {
    scenario.then(DispatchStep{.handle = handle, .dtype = DType::kF8E4M3, .hidden = 256, .num_scales = 2, .out = out});
    scenario.then(CombineStep{.handle = handle, .in = out});
  }
  expect(scenario);
}

// Rows that begin 8, 2 and 1 bytes past a boundary. They are copied all the same.
TEST_P(Dispatch, TensorsNeedNoAlignment) {
  auto [scenario, handle] = routed();
  for (const std::size_t misaligned : {8, 2}) {
    scenario.then(DispatchStep{.handle = handle, .hidden = 136, .misaligned = misaligned});
    scenario.then(CombineStep{.handle = handle, .hidden = 136, .misaligned = misaligned});
  }
  scenario.then(DispatchStep{.handle = handle, .dtype = DType::kU8, .hidden = 144, .misaligned = 1});
  expect(scenario);
}

// One handle, other payloads each time: without ids, with another type and hidden. Same rows in the same order.
TEST_P(Dispatch, HandleServesAgain) {
  auto [scenario, handle] = routed(4, 16);
  scenario.then(DispatchStep{.handle = handle});
  scenario.then(CombineStep{.handle = handle});
  scenario.then(DispatchStep{.handle = handle, .hidden = 128, .with_experts = false});
  scenario.then(DispatchStep{.handle = handle, .dtype = DType::kF32, .hidden = 8, .with_experts = false});
  scenario.then(CombineStep{.handle = handle, .dtype = DType::kF32, .hidden = 16});
  expect(scenario);
}

// A handle built from copies of another one's arrays, as frameworks keep them. It serves dispatch and combine.
TEST_P(Dispatch, HandleFromArrays) {
  auto [scenario, handle] = routed(4, 16);
  scenario.then(DispatchStep{.handle = handle});
  const int adopted = scenario.then(AdoptStep{handle});
  scenario.then(DispatchStep{.handle = adopted, .with_experts = false});
  scenario.then(CombineStep{.handle = adopted, .num_biases = 1, .weights = 3});
  expect(scenario);
}

// A handle routed by one engine, used by another, then again after the first has closed. A handle is values.
TEST_P(Dispatch, HandleOfAnotherEngine) {
  auto [scenario, handle] = routed(3, 16);
  scenario.num_engines = 2;
  scenario.then(DispatchStep{.handle = handle}, {}, 1);
  scenario.then(CombineStep{.handle = handle}, {}, 1);
  scenario.then(CloseStep{}, {}, 0);
  scenario.then(DispatchStep{.handle = handle}, {}, 1);
  scenario.then(CombineStep{.handle = handle}, {}, 1);
  expect(scenario);
}

// Two engines in the same processes, used in turns.
TEST_P(Dispatch, TwoEnginesTakeTurns) {
  Scenario scenario = ranks(3);
  scenario.num_engines = 2;
  for (int turn = 0; turn < 4; ++turn) {
    const int engine = turn % 2;
    const int handle = scenario.then(
        RouteStep{.choices = random_choices(30 + static_cast<unsigned>(turn), {8, 2, ragged(3, 9)})}, {}, engine);
    scenario.then(DispatchStep{.handle = handle}, {}, engine);
    scenario.then(CombineStep{.handle = handle}, {}, engine);
  }
  expect(scenario);
}

// Four handles alive, dispatched forwards, combined backwards, one of them twice.
TEST_P(Dispatch, HandlesAreIndependent) {
  Scenario scenario = ranks(3);
  std::vector<int> handles;
  for (unsigned i = 0; i < 4; ++i) {
    handles.push_back(scenario.then(RouteStep{.choices = random_choices(40 + i, {7, 2, ragged(3, 6 + 3 * i)})}));
  }
  for (const int handle : handles) scenario.then(DispatchStep{.handle = handle});
  for (const int i : {3, 1, 2, 0, 1})
    scenario.then(CombineStep{.handle = handles[static_cast<std::size_t>(i)], .num_biases = 1});
  expect(scenario);
}

// Turns of a few rows for hundreds of rows, into tensors. Budgets limit no tokens.
TEST_P(Dispatch, SmallBudgetTakesTurns) {
  Scenario scenario = ranks(3);
  scenario.rows_bytes = 3 << 19;
  const int handle = scenario.then(RouteStep{.choices = random_choices(50, {6, 2, {150, 0, 90}})});
  scenario.then(DispatchStep{.handle = handle, .hidden = 2048});
  scenario.then(
      DispatchStep{.handle = handle, .dtype = DType::kF8E4M3, .hidden = 4096, .num_scales = 32, .extra = {40}});
  scenario.then(CombineStep{.handle = handle, .hidden = 2048, .weights = 2});
  scenario.then(DispatchStep{.handle = handle, .hidden = 8});
  scenario.then(CombineStep{.handle = handle, .dtype = DType::kF32, .hidden = 2048, .num_biases = 2});
  expect(scenario);
}

ANYEP_IN_EVERY_WORLD(Dispatch);

}  // namespace
}  // namespace anyep::test
