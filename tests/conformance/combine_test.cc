// What comes back: sums in a fixed order.
#include "conformance/conformance.h"

namespace anyep::test {
namespace {

class Combine : public Conformance {
 protected:
  struct Routed {
    Scenario scenario;
    int handle;
  };
  static Routed routed(int num_ranks = 4, std::int64_t most_tokens = 16) {
    Routed made{ranks(num_ranks), 0};
    made.handle = made.scenario.then(
        RouteStep{.choices = random_choices(61, {3 * num_ranks, 5, ragged(num_ranks, most_tokens)}, {.unused = 30})});
    return made;
  }
};

// BF16, FP16 and FP32 rows. Float32 sums, ranks ascending, one rounding.
TEST_P(Combine, EveryElementType) {
  auto [scenario, handle] = routed();
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
    for (const std::int64_t hidden : {8, 72, 1000}) {
      scenario.then(CombineStep{.handle = handle, .dtype = dtype, .hidden = hidden});
    }
  }
  expect(scenario);
}

// No, one, two biases, and only the second. A token sent nowhere gives the bias or zeros.
TEST_P(Combine, Biases) {
  auto [scenario, handle] = routed();
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
    for (const int biases : {0, 1, 2}) {
      scenario.then(CombineStep{.handle = handle, .dtype = dtype, .num_biases = biases});
    }
    scenario.then(CombineStep{.handle = handle, .dtype = dtype, .only_second_bias = true});
  }
  expect(scenario);
}

// 1, 5 and 32 weight columns, also other than top-k. Summed like rows.
TEST_P(Combine, Weights) {
  auto [scenario, handle] = routed();
  for (const std::int64_t columns : {1, 5, 32}) scenario.then(CombineStep{.handle = handle, .weights = columns});
  expect(scenario);
}

// x in window rows on all ranks, then on some. The sum does not depend on where rows lie.
TEST_P(Combine, FromWindowRows) {
  auto [scenario, handle] = routed(3);
  const Memory w = Memory::kWindow, t = Memory::kTensor;
  for (const std::vector<Memory>& in : {std::vector{w, w, w}, std::vector{w, t, t}, std::vector{t, w, w}}) {
    scenario.then(CombineStep{.handle = handle, .in = in});
    scenario.then(
        CombineStep{.handle = handle, .dtype = DType::kF32, .hidden = 520, .num_biases = 1, .weights = 5, .in = in});
    scenario.then(CombineStep{.handle = handle, .dtype = DType::kF16, .in = in, .surplus_rows = 3});
  }
  expect(scenario);
}

// What dispatch received, combined where it lies: window rows and tensors.
TEST_P(Combine, ReceivedRowsWhereTheyLie) {
  auto [scenario, handle] = routed();
  for (const Memory memory : {Memory::kWindow, Memory::kTensor}) {
    DispatchStep dispatch{.handle = handle, .hidden = 264, .fill = Fill::kFinite};
    dispatch.out.assign(4, memory);
    const int received = scenario.then(dispatch);
    scenario.then(CombineStep{.handle = handle, .hidden = 264, .rows_of = received});
    scenario.then(CombineStep{.handle = handle, .hidden = 264, .num_biases = 2, .rows_of = received});
  }
  expect(scenario);
}

// x has more rows than the handle names, all NaN. They change nothing.
TEST_P(Combine, SurplusRowsAreIgnored) {
  auto [scenario, handle] = routed();
  scenario.then(CombineStep{.handle = handle, .weights = 2, .surplus_rows = 9});
  expect(scenario);
}

// 2 ranks, rows up to 16384 elements.
TEST_P(Combine, WideRows) {
  auto [scenario, handle] = routed(2, 5);
  for (const std::int64_t hidden : {2880, 7168, 16384}) {
    scenario.then(CombineStep{.handle = handle, .hidden = hidden, .num_biases = 1});
    scenario.then(CombineStep{.handle = handle, .hidden = hidden, .in = {Memory::kWindow, Memory::kWindow}});
  }
  expect(scenario);
}

// Turns of one to a few rows for hundreds of rows. The same sums.
TEST_P(Combine, SmallBudgetTakesTurns) {
  Scenario scenario = ranks(4);
  scenario.rows_bytes = 1 << 20;
  const int handle = scenario.then(RouteStep{.choices = random_choices(62, {8, 4, {60, 1, 0, 100}})});
  scenario.then(CombineStep{.handle = handle, .hidden = 1024, .num_biases = 1, .weights = 4});
  scenario.then(CombineStep{.handle = handle, .dtype = DType::kF32, .hidden = 1024});
  scenario.then(CombineStep{.handle = handle, .hidden = 8});
  expect(scenario);
}

ANYEP_IN_EVERY_WORLD(Combine);

}  // namespace
}  // namespace anyep::test
