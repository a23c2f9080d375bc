// Packed slabs per expert: which rows, in which order, cast how.
#include "conformance/conformance.h"

namespace anyep::test {
namespace {

class LowLatencyDispatch : public Conformance {
 protected:
  /// Rows there, then sums back.
  static void pair(Scenario& scenario, const LowLatencyDispatchStep& step) {
    const int dispatch = scenario.then(step);
    scenario.then(LowLatencyCombineStep{.dispatch = dispatch});
  }
};

// 1 to 8 ranks, 8 experts, top-2, 9 tokens each.
TEST_P(LowLatencyDispatch, EveryRankCount) {
  for (int num_ranks = 1; num_ranks <= 8; ++num_ranks) {
    Scenario scenario = ranks(num_ranks);
    pair(scenario, {.choices = random_choices(101, {8, 2, equal(num_ranks, 9)})});
    expect(scenario);
  }
}

// Ranks bring 0 to 11 tokens, then none at all, where 16 are allowed.
TEST_P(LowLatencyDispatch, FewerTokensThanTheMost) {
  Scenario scenario = ranks(4);
  pair(scenario, {.choices = random_choices(102, {8, 3, ragged(4, 11)}), .max_tokens = 16});
  pair(scenario, {.choices = random_choices(102, {8, 3, equal(4, 0)}), .max_tokens = 16});
  pair(scenario, {.choices = random_choices(102, {8, 3, equal(4, 16)}), .max_tokens = 16});
  expect(scenario);
}

// 7 experts on 3 ranks, 5 on 4, 2 on 5, 1 on 3. Blocks differ by one; a rank may host none.
TEST_P(LowLatencyDispatch, ExpertsNotDivisibleByRanks) {
  const std::pair<int, int> cases[] = {{7, 3}, {5, 4}, {2, 5}, {1, 3}};
  for (const auto& [experts, num_ranks] : cases) {
    Scenario scenario = ranks(num_ranks);
    pair(scenario,
         {.choices = random_choices(103, {experts, std::min(experts, 2), equal(num_ranks, 7)}), .statistics = true});
    expect(scenario);
  }
}

// 2 ranks, 64 experts, top-k up to 32, call by call.
TEST_P(LowLatencyDispatch, TopKUpToThirtyTwo) {
  Scenario scenario = ranks(2);
  for (const int top_k : {1, 2, 3, 8, 11, 16, 32}) {
    pair(scenario, {.choices = random_choices(104, {64, top_k, ragged(2, 9)}, {.unused = 10})});
  }
  expect(scenario);
}

// -1, an expert twice in a row, int32 and int64. One row per token and expert; combine applies every weight.
TEST_P(LowLatencyDispatch, UnusedAndDuplicateIds) {
  Scenario scenario = ranks(3);
  for (const Ids ids : {Ids::kInt32, Ids::kInt64}) {
    pair(scenario,
         {.choices = random_choices(105, {7, 6, ragged(3, 15)}, {.unused = 15, .duplicate = 50}), .ids = ids});
  }
  expect(scenario);
}

// One expert in all 8 slots of every token.
TEST_P(LowLatencyDispatch, OneExpertInEverySlot) {
  Scenario scenario = ranks(2);
  Choices choices{8, 8, {}};
  choices.ids = {std::vector<std::int64_t>(5 * 8, 6), std::vector<std::int64_t>(7 * 8, 0)};
  pair(scenario, {.choices = choices});
  expect(scenario);
}

// Ids beyond the experts, negative, and 2^32 + an expert: as if they were -1, never out of bounds.
TEST_P(LowLatencyDispatch, StrayIdsAreDropped) {
  Scenario scenario = ranks(3);
  for (const Ids ids : {Ids::kInt32, Ids::kInt64}) {
    const Spice spice{.unused = 5, .duplicate = 10, .out_of_range = 50, .fits_32_bits = ids == Ids::kInt32};
    pair(scenario, {.choices = random_choices(106, {7, 5, ragged(3, 15)}, spice), .ids = ids});
  }
  expect(scenario);
}

// No token chooses anything.
TEST_P(LowLatencyDispatch, TokensWithoutExperts) {
  Scenario scenario = ranks(3);
  pair(scenario, {.choices = random_choices(107, {6, 2, equal(3, 5)}, {.unused = 100}), .statistics = true});
  expect(scenario);
}

// Every token of every rank to one expert, then to all experts of one rank.
TEST_P(LowLatencyDispatch, AllTokensToOneExpertOrRank) {
  Scenario scenario = ranks(4);
  for (const int first : {0, 11}) pair(scenario, {.choices = all_to(first, {12, 1, equal(4, 20)})});
  pair(scenario, {.choices = all_to(3, {12, 3, equal(4, 20)})});
  expect(scenario);
}

// BF16 rows of any bits, 16 bytes to 32 KiB. They are moved, not computed.
TEST_P(LowLatencyDispatch, HiddenFromEightToSixteenThousand) {
  Scenario scenario = ranks(2);
  for (const std::int64_t hidden : {8, 16, 136, 1000, 2880, 7168, 16384}) {
    scenario.then(
        LowLatencyDispatchStep{.choices = random_choices(108, {4, 2, {3, 5}}), .hidden = hidden, .fill = Fill::kBits});
  }
  expect(scenario);
}

// FP8 with exact and with rounded scales, whole and partial blocks of 128.
TEST_P(LowLatencyDispatch, FP8) {
  Scenario scenario = ranks(3);
  for (const std::int64_t hidden : {16, 128, 144, 512, 1040, 7168}) {
    for (const bool round_scale : {false, true}) {
      pair(scenario, {.choices = random_choices(109, {6, 3, {6, 2, 7}}),
                      .hidden = hidden,
                      .wire = Wire::kFP8,
                      .round_scale = round_scale});
    }
  }
  expect(scenario);
}

// Scales as packed exponents: 1 to 5 words per row, unused bytes zero.
TEST_P(LowLatencyDispatch, UE8M0) {
  Scenario scenario = ranks(3);
  for (const std::int64_t hidden : {16, 128, 272, 512, 640, 2048, 2064}) {
    pair(scenario, {.choices = random_choices(110, {6, 3, {6, 2, 7}}),
                    .hidden = hidden,
                    .wire = Wire::kUE8M0,
                    .round_scale = true});
  }
  expect(scenario);
}

// FP8 of any bits: NaNs, infinities, denormals, all of them in one block. The cast is defined for each.
TEST_P(LowLatencyDispatch, FP8OfAnyBits) {
  Scenario scenario = ranks(2);
  for (const Wire wire : {Wire::kFP8, Wire::kUE8M0}) {
    for (const std::int64_t hidden : {16, 256, 1024}) {
      scenario.then(LowLatencyDispatchStep{.choices = random_choices(111, {4, 2, {9, 5}}),
                                           .hidden = hidden,
                                           .fill = Fill::kBits,
                                           .wire = wire,
                                           .round_scale = wire == Wire::kUE8M0});
    }
  }
  expect(scenario);
}

// Counts and waiting times are added to what the tensors hold.
TEST_P(LowLatencyDispatch, StatisticsAdd) {
  Scenario scenario = ranks(3);
  for (const bool hook : {false, true}) {
    const int dispatch = scenario.then(
        LowLatencyDispatchStep{.choices = random_choices(112, {8, 2, ragged(3, 9)}), .hook = hook, .statistics = true});
    if (hook) scenario.then(ReceiveStep{dispatch});
    const int combine = scenario.then(LowLatencyCombineStep{.dispatch = dispatch, .hook = hook, .statistics = true});
    if (hook) scenario.then(ReceiveStep{combine});
  }
  expect(scenario);
}

// 1, 8, 64, 200 tokens a rank: every form in which rows may travel.
TEST_P(LowLatencyDispatch, BatchesOfEverySize) {
  Scenario scenario = ranks(3);
  for (const Wire wire : {Wire::kBF16, Wire::kFP8}) {
    for (const std::int64_t tokens : {1, 8, 32, 64, 65, 128, 200}) {
      pair(scenario,
           {.choices = random_choices(113, {12, 4, {tokens, tokens / 2, tokens}}), .hidden = 256, .wire = wire});
    }
  }
  expect(scenario);
}

// Rows that a block has too few warps for, in batches that have several tokens a block.
TEST_P(LowLatencyDispatch, ManyWideRows) {
  Scenario scenario = ranks(2);
  for (const Wire wire : {Wire::kBF16, Wire::kFP8}) {
    for (const std::int64_t tokens : {129, 300}) {
      pair(scenario, {.choices = random_choices(115, {5, 3, {tokens, 131}}, {.unused = 10, .duplicate = 10}),
                      .hidden = 4096,
                      .wire = wire});
    }
  }
  expect(scenario);
}

// 4096 tokens a rank at most.
TEST_P(LowLatencyDispatch, ThousandsOfTokens) {
  Scenario scenario = ranks(2);
  pair(scenario,
       {.choices = random_choices(114, {3, 2, {4096, 70}}, {.unused = 20}), .hidden = 16, .max_tokens = 4096});
  expect(scenario);
}

ANYEP_IN_EVERY_WORLD(LowLatencyDispatch);

}  // namespace
}  // namespace anyep::test
