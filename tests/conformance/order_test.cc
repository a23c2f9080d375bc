// Who waits for whom: asynchronous calls, hooks, events, several operations in flight.
#include "conformance/conformance.h"

namespace anyep::test {
namespace {

class Order : public Conformance {
 protected:
  static RouteStep route(std::uint64_t seed) {
    RouteStep step;
    step.choices = random_choices(seed, {6, 3, ragged(3, 12)});
    return step;
  }
  static LowLatencyDispatchStep low_latency(std::uint64_t seed, bool hook) {
    LowLatencyDispatchStep step;
    step.choices = random_choices(seed, {6, 3, ragged(3, 12)});
    step.hook = hook;
    return step;
  }
  static constexpr Pace kLastWaitsForFirst{.held = 2, .until = 0};
  static constexpr Pace kFirstWaitsForLast{.held = 0, .until = 2};
};

// A rank begins each op only when another one's call of it has returned; nobody waits for events, they only look.
// Calls return before peers come, and ops end while callers compute.
TEST_P(Order, CallsReturnWhileAPeerIsHeldBack) {
  for (const Pace& pace : {kLastWaitsForFirst, kFirstWaitsForLast}) {
    Scenario scenario = ranks(3);
    RouteStep step = route(131);
    const int first = scenario.then(step);
    step.finish = Finish::kLater;
    const int handle = scenario.then(step, pace);
    scenario.then(WaitStep{handle});
    scenario.then(DispatchStep{.handle = first, .finish = Finish::kPoll}, pace);
    scenario.then(CombineStep{.handle = handle, .finish = Finish::kPoll}, pace);
    const int dispatch = scenario.then(low_latency(132, false));
    LowLatencyDispatchStep again = low_latency(133, false);
    again.finish = Finish::kPoll;
    scenario.then(again, pace);
    scenario.then(LowLatencyCombineStep{.dispatch = dispatch, .finish = Finish::kPoll}, pace);
    expect(scenario);
  }
}

// The same for the send half of hooks: it waits for no peer's call.
TEST_P(Order, SendHalvesReturnWhileAPeerIsHeldBack) {
  for (const Pace& pace : {kLastWaitsForFirst, kFirstWaitsForLast}) {
    Scenario scenario = ranks(3);
    const int dispatch = scenario.then(low_latency(134, true), pace);
    scenario.then(ReceiveStep{dispatch});
    const int combine = scenario.then(LowLatencyCombineStep{.dispatch = dispatch, .hook = true}, pace);
    scenario.then(ReceiveStep{combine});
    const int fp8 = [&] {
      LowLatencyDispatchStep step = low_latency(135, true);
      step.wire = Wire::kFP8;
      return scenario.then(step, pace);
    }();
    scenario.then(ReceiveStep{fp8});
    expect(scenario);
  }
}

// Ops ordered after an event that the caller completes once the call has returned. They do not begin before it.
TEST_P(Order, OpsAwaitEvents) {
  Scenario scenario = ranks(3);
  const Pace gated{.after_manual = true};
  const int handle = scenario.then(route(136));
  scenario.then(DispatchStep{.handle = handle, .finish = Finish::kEvent}, gated);
  scenario.then(CombineStep{.handle = handle, .finish = Finish::kPoll}, gated);
  LowLatencyDispatchStep step = low_latency(137, false);
  step.finish = Finish::kEvent;
  const int dispatch = scenario.then(step, gated);
  scenario.then(LowLatencyCombineStep{.dispatch = dispatch, .finish = Finish::kEvent}, gated);
  expect(scenario);
}

// Ops of one engine ordered after ops of another, both ways round.
TEST_P(Order, OpsAwaitOpsOfAnotherEngine) {
  Scenario scenario = ranks(3);
  scenario.num_engines = 2;
  const int handle = scenario.then(route(145));
  int last = scenario.then(DispatchStep{.handle = handle, .finish = Finish::kLater}, {.delayed = 1, .delay_ms = 5});
  std::vector<int> later = {last};
  for (int i = 1; i <= 4; ++i) {
    last = scenario.then(CombineStep{.handle = handle, .finish = Finish::kLater}, {.after_step = last}, i % 2);
    later.push_back(last);
  }
  for (auto step = later.rbegin(); step != later.rend(); ++step) scenario.then(WaitStep{*step});
  expect(scenario);
}

// Six asynchronous ops queued before the first is waited for, events taken backwards.
TEST_P(Order, OpsQueueUp) {
  Scenario scenario = ranks(3);
  const int a = scenario.then(route(138));
  const int b = scenario.then(route(139));
  std::vector<int> later;
  for (const int handle : {a, b, a}) {
    later.push_back(scenario.then(DispatchStep{.handle = handle, .finish = Finish::kLater}));
    later.push_back(scenario.then(CombineStep{.handle = handle, .num_biases = 1, .finish = Finish::kLater},
                                  {.delayed = 1, .delay_ms = 3}));
  }
  for (auto step = later.rbegin(); step != later.rend(); ++step) scenario.then(WaitStep{*step});
  expect(scenario);
}

// Asynchronous ops of both modes in one queue.
TEST_P(Order, ModesShareTheQueue) {
  Scenario scenario = ranks(3);
  const int handle = scenario.then(route(140));
  LowLatencyDispatchStep step = low_latency(141, false);
  step.finish = Finish::kLater;
  std::vector<int> later;
  for (int round = 0; round < 3; ++round) {
    later.push_back(scenario.then(DispatchStep{.handle = handle, .finish = Finish::kLater}));
    later.push_back(scenario.then(step));
    later.push_back(scenario.then(CombineStep{.handle = handle, .finish = Finish::kLater}));
  }
  for (const int index : later) scenario.then(WaitStep{index});
  scenario.then(LowLatencyCombineStep{.dispatch = later[1]});
  expect(scenario);
}

// Two hooks open at a time, again and again: dispatch + dispatch, combine + dispatch, combine + combine.
TEST_P(Order, TwoOperationsInFlight) {
  Scenario scenario = ranks(3);
  const int a = scenario.then(low_latency(142, true));
  const int b = scenario.then(low_latency(143, true));
  scenario.then(ReceiveStep{a}, {.delayed = 0, .delay_ms = 3});
  const int combine_a = scenario.then(LowLatencyCombineStep{.dispatch = a, .hook = true});
  scenario.then(ReceiveStep{b});
  const int c = scenario.then(low_latency(144, true));
  scenario.then(ReceiveStep{combine_a}, {.delayed = 2, .delay_ms = 3});
  scenario.then(ReceiveStep{c});
  const int combine_b = scenario.then(LowLatencyCombineStep{.dispatch = b, .hook = true});
  const int combine_c = scenario.then(LowLatencyCombineStep{.dispatch = c, .hidden = 64, .hook = true});
  scenario.then(ReceiveStep{combine_b});
  scenario.then(ReceiveStep{combine_c});
  expect(scenario);
}

// A long pipeline with two hooks always open and one rank always late. Regions are not overwritten.
TEST_P(Order, PipelineWithALateRank) {
  Scenario scenario = ranks(3);
  int open = scenario.then(low_latency(150, true));
  for (unsigned i = 1; i < 24; ++i) {
    const int next = scenario.then(low_latency(150 + i, true), {.delayed = static_cast<int>(i % 3), .delay_ms = 1});
    scenario.then(ReceiveStep{open});
    open = next;
  }
  scenario.then(ReceiveStep{open});
  expect(scenario);
}

// Dispatch after dispatch without any combine, with and without hooks.
TEST_P(Order, DispatchAfterDispatch) {
  Scenario scenario = ranks(3);
  for (unsigned i = 0; i < 9; ++i) {
    const int step = scenario.then(low_latency(180 + i, i % 2 == 0));
    if (i % 2 == 0) scenario.then(ReceiveStep{step});
  }
  expect(scenario);
}

// Hooks open while high-throughput ops run.
TEST_P(Order, HooksStayOpenAcrossOtherOps) {
  Scenario scenario = ranks(3);
  const int hook = scenario.then(low_latency(190, true));
  const int handle = scenario.then(route(191));
  scenario.then(DispatchStep{.handle = handle});
  scenario.then(ReceiveStep{hook});
  const int combine = scenario.then(LowLatencyCombineStep{.dispatch = hook, .hook = true});
  scenario.then(CombineStep{.handle = handle});
  scenario.then(BarrierStep{});
  scenario.then(ReceiveStep{combine});
  expect(scenario);
}

ANYEP_IN_EVERY_WORLD(Order);

}  // namespace
}  // namespace anyep::test
