// Sums on the way back: one definition, whatever form rows travel in.
#include "conformance/conformance.h"

namespace anyep::test {
namespace {

class LowLatencyCombine : public Conformance {
 protected:
  struct Dispatched {
    Scenario scenario;
    int dispatch;
  };
  /// 3 ranks, 8 experts, top-5 with holes and duplicates, 0 to 12 tokens; received.
  static Dispatched dispatched(int num_ranks = 3) {
    Dispatched made{ranks(num_ranks), 0};
    made.dispatch = made.scenario.then(LowLatencyDispatchStep{
        .choices = random_choices(121, {8, 5, ragged(num_ranks, 12)}, {.unused = 15, .duplicate = 15}),
        .hidden = 1024});
    return made;
  }
};

// With and without hook, zero copy or not, asynchronous or not. The same bits.
TEST_P(LowLatencyCombine, BitsDoNotDependOnTheMode) {
  auto [scenario, dispatch] = dispatched();
  for (const bool zero_copy : {false, true}) {
    for (const Finish finish : {Finish::kWait, Finish::kEvent, Finish::kPoll}) {
      scenario.then(LowLatencyCombineStep{.dispatch = dispatch, .zero_copy = zero_copy, .finish = finish});
    }
    const int combine =
        scenario.then(LowLatencyCombineStep{.dispatch = dispatch, .zero_copy = zero_copy, .hook = true});
    scenario.then(ReceiveStep{combine});
  }
  expect(scenario);
  // Equal rows, equal bits: the two hooks against the six others is what the oracle's one answer says.
}

// The same in an engine that rounds once.
TEST_P(LowLatencyCombine, ExactModeRoundsOnce) {
  auto [scenario, dispatch] = dispatched(4);
  scenario.exact_combine = true;
  scenario.then(LowLatencyCombineStep{.dispatch = dispatch});
  scenario.then(LowLatencyCombineStep{.dispatch = dispatch, .zero_copy = true});
  scenario.then(LowLatencyCombineStep{.dispatch = dispatch, .wire = Wire::kLogFMT});
  const int combine = scenario.then(LowLatencyCombineStep{.dispatch = dispatch, .hook = true});
  scenario.then(ReceiveStep{combine});
  expect(scenario);
}

// LogFMT with rows that qualify, rows that do not, and both in one row; hook or not.
TEST_P(LowLatencyCombine, LogFMT) {
  auto [scenario, dispatch] = dispatched();
  for (const std::int64_t hidden : {128, 384, 512, 1024, 1536, 2048, 7168}) {
    scenario.then(LowLatencyCombineStep{.dispatch = dispatch, .hidden = hidden, .wire = Wire::kLogFMT});
  }
  const int combine = scenario.then(LowLatencyCombineStep{.dispatch = dispatch, .wire = Wire::kLogFMT, .hook = true});
  scenario.then(ReceiveStep{combine});
  expect(scenario);
}

// Rows of another hidden than those of dispatch, 8 to 16384.
TEST_P(LowLatencyCombine, HiddenMayDifferFromDispatch) {
  auto [scenario, dispatch] = dispatched(2);
  for (const std::int64_t hidden : {8, 72, 2880, 16384}) {
    scenario.then(LowLatencyCombineStep{.dispatch = dispatch, .hidden = hidden});
  }
  expect(scenario);
}

// One dispatch, combined three times, with other calls between.
TEST_P(LowLatencyCombine, OneDispatchServesSeveral) {
  auto [scenario, dispatch] = dispatched();
  scenario.then(LowLatencyCombineStep{.dispatch = dispatch});
  const int other = scenario.then(LowLatencyDispatchStep{.choices = random_choices(122, {5, 2, equal(3, 4)})});
  scenario.then(LowLatencyCombineStep{.dispatch = dispatch});
  scenario.then(LowLatencyCombineStep{.dispatch = other});
  scenario.then(LowLatencyCombineStep{.dispatch = dispatch, .hidden = 64});
  expect(scenario);
}

// Zero-copy rows of changing shapes in the one buffer.
TEST_P(LowLatencyCombine, ZeroCopyBufferServesEveryShape) {
  Scenario scenario = ranks(3);
  for (const std::int64_t hidden : {1024, 8, 7168, 128}) {
    const int dispatch = scenario.then(LowLatencyDispatchStep{
        .choices = random_choices(123, {7, 3, ragged(3, 9)}), .hidden = hidden, .max_tokens = 16});
    scenario.then(LowLatencyCombineStep{.dispatch = dispatch, .zero_copy = true});
  }
  expect(scenario);
}

ANYEP_IN_EVERY_WORLD(LowLatencyCombine);

}  // namespace
}  // namespace anyep::test
