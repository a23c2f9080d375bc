// Where tokens go, what handles and counts say.
#include "conformance/conformance.h"

namespace anyep::test {
namespace {

using Given = RouteStep::Given;

class Routes : public Conformance {
 protected:
  static RouteStep route(Choices choices, Ids ids = Ids::kInt64, Given given = Given::kExperts) {
    RouteStep step;
    step.choices = std::move(choices);
    step.ids = ids;
    step.given = given;
    return step;
  }
};

// 1 to 8 ranks, 8 experts, top-2. Everything follows from the rank count alone.
TEST_P(Routes, EveryRankCount) {
  for (int num_ranks = 1; num_ranks <= 8; ++num_ranks) {
    Scenario scenario = ranks(num_ranks);
    const int handle = scenario.then(route(random_choices(1, {8, 2, equal(num_ranks, 9)})));
    scenario.then(DispatchStep{.handle = handle});
    scenario.then(CombineStep{.handle = handle});
    expect(scenario);
  }
}

// 13 ranks on a host that has fewer processors, both modes.
TEST_P(Routes, MoreRanksThanProcessors) {
  Scenario scenario = ranks(13);
  const int handle = scenario.then(route(random_choices(15, {30, 4, ragged(13, 13)})));
  scenario.then(DispatchStep{.handle = handle});
  scenario.then(CombineStep{.handle = handle});
  const int dispatch = scenario.then(LowLatencyDispatchStep{.choices = random_choices(16, {30, 4, ragged(13, 13)})});
  scenario.then(LowLatencyCombineStep{.dispatch = dispatch});
  expect(scenario);
}

// 1024 experts, hosted by 1 and by 3 ranks.
TEST_P(Routes, ThousandExperts) {
  for (const int num_ranks : {1, 3}) {
    Scenario scenario = ranks(num_ranks);
    const int handle = scenario.then(route(random_choices(17, {1024, 8, equal(num_ranks, 50)})));
    scenario.then(DispatchStep{.handle = handle});
    const int dispatch = scenario.then(
        LowLatencyDispatchStep{.choices = random_choices(18, {1024, 8, equal(num_ranks, 3)}), .hidden = 16});
    scenario.then(LowLatencyCombineStep{.dispatch = dispatch});
    expect(scenario);
  }
}

// 70000 tokens on one rank, few on the other.
TEST_P(Routes, TensOfThousandsOfTokens) {
  Scenario scenario = ranks(2);
  const int handle = scenario.then(route(random_choices(19, {4, 2, {70000, 300}}, {.unused = 40})));
  scenario.then(DispatchStep{.handle = handle, .hidden = 8});
  scenario.then(CombineStep{.handle = handle, .hidden = 8});
  expect(scenario);
}

// 5 ranks bring 2, 0, 6, 8, 10 tokens. A rank without tokens takes part.
TEST_P(Routes, TokenCountsDiffer) {
  Scenario scenario = ranks(5);
  const int handle = scenario.then(route(random_choices(2, {10, 3, ragged(5, 10)})));
  scenario.then(DispatchStep{.handle = handle});
  scenario.then(CombineStep{.handle = handle, .weights = 3});
  expect(scenario);
}

// 600 handles alive at a time on 2 ranks. The first, one in the middle and the last still say where rows go.
TEST_P(Routes, HundredsOfHandlesAtATime) {
  Scenario scenario = ranks(2);
  std::vector<int> handles;
  for (unsigned i = 0; i < 600; ++i)
    handles.push_back(scenario.then(route(random_choices(20 + i, {4, 2, ragged(2, 6)}))));
  for (const int handle : {handles.front(), handles[300], handles.back()}) {
    scenario.then(DispatchStep{.handle = handle});
    scenario.then(CombineStep{.handle = handle});
  }
  expect(scenario);
}

// Nobody brings a token, then somebody does. Empty is an ordinary size.
TEST_P(Routes, NoTokensAnywhere) {
  Scenario scenario = ranks(3);
  for (const std::int64_t tokens : {0, 4, 0}) {
    const int handle = scenario.then(route(random_choices(3, {6, 2, equal(3, tokens)})));
    scenario.then(DispatchStep{.handle = handle, .dtype = DType::kF8E4M3, .num_scales = 2, .extra = {4}});
    scenario.then(CombineStep{.handle = handle, .num_biases = 1, .weights = 2});
  }
  expect(scenario);
}

// All choices are -1: on every rank, then on one. Tokens that go nowhere are legal.
TEST_P(Routes, TokensWithoutExperts) {
  Scenario scenario = ranks(3);
  Choices none = random_choices(4, {6, 2, equal(3, 5)}, {.unused = 100});
  Choices some = random_choices(5, {6, 2, equal(3, 5)});
  some.ids[1] = none.ids[1];
  for (const Choices& choices : {none, some}) {
    const int handle = scenario.then(route(choices));
    scenario.then(DispatchStep{.handle = handle});
    scenario.then(CombineStep{.handle = handle, .num_biases = 2});
  }
  expect(scenario);
}

// 7 experts on 3 ranks, 10 on 4, 5 on 4. The first ranks host one more.
TEST_P(Routes, ExpertsNotDivisibleByRanks) {
  const std::pair<int, int> cases[] = {{7, 3}, {10, 4}, {5, 4}, {257, 6}};
  for (const auto& [experts, num_ranks] : cases) {
    Scenario scenario = ranks(num_ranks);
    const int handle = scenario.then(route(random_choices(6, {experts, 3, equal(num_ranks, 12)})));
    scenario.then(DispatchStep{.handle = handle});
    scenario.then(CombineStep{.handle = handle});
    expect(scenario);
  }
}

// 3 experts on 5 ranks, 1 on 4. A rank without experts receives nothing and still sends.
TEST_P(Routes, MoreRanksThanExperts) {
  const std::pair<int, int> cases[] = {{3, 5}, {1, 4}};
  for (const auto& [experts, num_ranks] : cases) {
    Scenario scenario = ranks(num_ranks);
    const int handle = scenario.then(route(random_choices(7, {experts, 1, equal(num_ranks, 6)})));
    scenario.then(DispatchStep{.handle = handle});
    scenario.then(CombineStep{.handle = handle});
    expect(scenario);
  }
}

// 3 ranks, 64 experts, top-k up to 32, call by call. A token reaches a rank once, however many choices it has there.
TEST_P(Routes, TopKUpToThirtyTwo) {
  Scenario scenario = ranks(3);
  for (const int top_k : {1, 2, 3, 7, 8, 9, 16, 31, 32}) {
    const int handle = scenario.then(route(random_choices(8, {64, top_k, equal(3, 7)})));
    scenario.then(DispatchStep{.handle = handle});
    scenario.then(CombineStep{.handle = handle, .weights = top_k});
  }
  expect(scenario);
}

// -1 and an expert twice in a row, as int32 and int64. Every pair counts, every row travels once.
TEST_P(Routes, UnusedAndDuplicateIds) {
  Scenario scenario = ranks(3);
  for (const Ids ids : {Ids::kInt32, Ids::kInt64}) {
    const int handle =
        scenario.then(route(random_choices(9, {9, 5, ragged(3, 20)}, {.unused = 20, .duplicate = 40}), ids));
    scenario.then(DispatchStep{.handle = handle});
    scenario.then(CombineStep{.handle = handle});
  }
  expect(scenario);
}

// Ids beyond the experts, negative, and 2^32 + an expert. They count as -1 and are counted.
TEST_P(Routes, StrayIdsAreDroppedAndCounted) {
  for (const Ids ids : {Ids::kInt32, Ids::kInt64}) {
    Scenario scenario = ranks(3);
    scenario.counts_ids = true;
    const Spice spice{.unused = 10, .out_of_range = 40, .fits_32_bits = ids == Ids::kInt32};
    const int handle = scenario.then(route(random_choices(10, {9, 5, ragged(3, 20)}, spice), ids));
    scenario.then(DispatchStep{.handle = handle, .with_experts = false});
    expect(scenario);
  }
}

// The same stray ids as tensors that travel with the rows. They arrive as -1 with weight 0.
TEST_P(Routes, StrayIdsTravelAsUnused) {
  Scenario scenario = ranks(2);
  const int handle = scenario.then(route(random_choices(11, {6, 4, equal(2, 30)}, {.out_of_range = 50})));
  scenario.then(DispatchStep{.handle = handle});
  scenario.then(CombineStep{.handle = handle, .weights = 4});
  expect(scenario);
}

// Ranks and counts given beside the experts from which they follow. They change nothing.
TEST_P(Routes, RanksAndPairsMayBeGiven) {
  Scenario scenario = ranks(4);
  const int handle = scenario.then(route(random_choices(12, {10, 3, ragged(4, 15)}), Ids::kInt64, Given::kAll));
  scenario.then(DispatchStep{.handle = handle});
  scenario.then(CombineStep{.handle = handle});
  expect(scenario);
}

// Ranks given that do not follow from the experts, then without experts at all. They decide where tokens go.
TEST_P(Routes, GivenRanksDecide) {
  for (const Given given : {Given::kOtherRanks, Given::kOnlyRanks}) {
    Scenario scenario = ranks(4);
    const int handle = scenario.then(route(random_choices(13, {10, 3, ragged(4, 15)}), Ids::kInt64, given));
    scenario.then(DispatchStep{.handle = handle, .with_experts = given == Given::kOtherRanks});
    scenario.then(CombineStep{.handle = handle});
    expect(scenario);
  }
}

// Every token of every rank to the expert of one rank; then to all experts of one rank.
TEST_P(Routes, AllTokensToOneExpertOrRank) {
  Scenario scenario = ranks(4);
  for (const int first : {0, 5, 11}) {
    for (const int top_k : {1, 3}) {
      const int handle = scenario.then(route(all_to(first, {12, top_k, ragged(4, 40)})));
      scenario.then(DispatchStep{.handle = handle});
      scenario.then(CombineStep{.handle = handle});
    }
  }
  expect(scenario);
}

// Routes that are waited for, read at once, and read only after the next route. All say the same.
TEST_P(Routes, HandlesAreReadAtAnyTime) {
  Scenario scenario = ranks(3);
  std::vector<int> handles;
  for (const Finish finish : {Finish::kLater, Finish::kWait, Finish::kEvent, Finish::kLater}) {
    RouteStep step = route(random_choices(14 + handles.size(), {9, 4, ragged(3, 12)}));
    step.finish = finish;
    handles.push_back(scenario.then(step));
  }
  scenario.then(WaitStep{handles[3]});
  scenario.then(WaitStep{handles[0]});
  for (const int handle : handles) scenario.then(DispatchStep{.handle = handle});
  expect(scenario);
}

ANYEP_IN_EVERY_WORLD(Routes);

}  // namespace
}  // namespace anyep::test
