// Dispatches that do not wait for the number of their rows: each rank in its own way, and nobody can tell.
#include <algorithm>
#include <array>

#include "conformance/conformance.h"

namespace anyep::test {
namespace {

constexpr std::array kWays = {Ahead::kOwnRows,     Ahead::kNo,     Ahead::kGivenRows,
                              Ahead::kBehindRoute, Ahead::kNoRoom, Ahead::kBehindNoRoom};

class DispatchAhead : public Conformance {
 protected:
  static std::vector<Ahead> everywhere(int num_ranks, Ahead way) {
    return std::vector<Ahead>(static_cast<std::size_t>(num_ranks), way);
  }
  /// Rank r in the way of number r + first.
  static std::vector<Ahead> mixed(int num_ranks, int first) {
    std::vector<Ahead> ways;
    for (int rank = 0; rank < num_ranks; ++rank)
      ways.push_back(kWays[static_cast<std::size_t>(rank + first) % kWays.size()]);
    return ways;
  }
  /// A route, its dispatch, and a combine of what came.
  static void exchange(Scenario& scenario, RouteStep route, DispatchStep dispatch, const Pace& pace = {}) {
    route.finish = Finish::kLater;
    const int handle = scenario.then(route, pace);
    dispatch.handle = handle;
    dispatch.fill = Fill::kFinite;
    const int received = scenario.then(dispatch);
    scenario.then(WaitStep{handle});
    if (dispatch.dtype != DType::kBF16) return;
    scenario.then(CombineStep{.handle = handle, .hidden = dispatch.hidden, .rows_of = received});
  }
  static RouteStep route(std::uint64_t seed, int num_ranks, std::vector<std::int64_t> tokens) {
    return {.choices = random_choices(seed, {3 * num_ranks, 3, std::move(tokens)})};
  }
};

TEST_P(DispatchAhead, EveryWayOnAllRanks) {
  Scenario scenario = ranks(3);
  std::uint64_t seed = 300;
  for (const Ahead way : kWays) {
    exchange(scenario, route(++seed, 3, ragged(3, 20)), {.hidden = 264, .ahead = everywhere(3, way)});
  }
  expect(scenario);
}

// One with the host between its calls, another without, a third that finds no room: any rank beside any other, one late.
TEST_P(DispatchAhead, EachRankInItsOwnWay) {
  for (const int num_ranks : {2, 4}) {
    Scenario scenario = ranks(num_ranks);
    for (int call = 0; call < 12; ++call) {
      const auto seed = static_cast<std::uint64_t>(320 + call);
      exchange(scenario, route(seed, num_ranks, ragged(num_ranks, 1 + 7 * (call % 4))),
               {.hidden = std::array{8, 7168, 520}[seed % 3], .ahead = mixed(num_ranks, call)},
               {.delayed = call % num_ranks, .delay_ms = 1 + call % 2});
    }
    expect(scenario);
  }
}

// A rank with few tokens guesses from them, or from the last call, and is wrong: the others have many.
TEST_P(DispatchAhead, TokensThatNoGuessForesees) {
  Scenario scenario = ranks(3);
  std::uint64_t seed = 340;
  for (const std::vector<std::int64_t>& tokens :
       {std::vector<std::int64_t>{1, 1, 1}, {1, 40, 40}, {0, 60, 1}, {0, 0, 0}, {0, 0, 9}, {70, 0, 0}, {2, 2, 2}}) {
    RouteStep all = route(++seed, 3, tokens);
    if (seed % 2 == 0) all.choices = all_to(0, {9, 3, tokens});
    exchange(scenario, all, {.hidden = 32, .ahead = everywhere(3, Ahead::kOwnRows)});
    exchange(scenario, all, {.hidden = 32, .ahead = mixed(3, static_cast<int>(seed))});
  }
  expect(scenario);
}

// Scales, ids of both widths, extra payloads, into tensors outside the window and inside it.
TEST_P(DispatchAhead, EveryField) {
  Scenario scenario = ranks(2);
  std::uint64_t seed = 360;
  for (const Ahead way : kWays) {
    for (const Memory memory : {Memory::kTensor, Memory::kWindow}) {
      DispatchStep step{.dtype = DType::kF8E4M3, .hidden = 384, .num_scales = 3};
      step.scale_type = memory == Memory::kTensor ? DType::kI32 : DType::kF32;
      step.scale_strides = Strides::kColumns;
      step.out = {memory, memory};
      if (way != Ahead::kOwnRows) step.extra = {12};
      step.ahead = {way, way};
      RouteStep routed = route(++seed, 2, ragged(2, 30));
      routed.ids = memory == Memory::kTensor ? Ids::kInt64 : Ids::kInt32;
      exchange(scenario, routed, step);
      step.with_experts = false;
      exchange(scenario, routed, step);
    }
  }
  expect(scenario);
}

// A handle whose first dispatch found no room serves as any other.
TEST_P(DispatchAhead, HandlesServeAgain) {
  Scenario scenario = ranks(3);
  for (const Ahead way : {Ahead::kNoRoom, Ahead::kOwnRows}) {
    RouteStep routed = route(380, 3, ragged(3, 25));
    routed.finish = Finish::kLater;
    const int handle = scenario.then(routed);
    scenario.then(DispatchStep{.handle = handle, .ahead = everywhere(3, way)});
    scenario.then(WaitStep{handle});
    scenario.then(DispatchStep{.handle = handle, .with_experts = false});
    const int adopted = scenario.then(AdoptStep{handle});
    scenario.then(DispatchStep{.handle = adopted, .with_experts = false});
    scenario.then(CombineStep{.handle = adopted, .weights = 3});
  }
  expect(scenario);
}

ANYEP_IN_EVERY_WORLD(DispatchAhead);

}  // namespace
}  // namespace anyep::test
