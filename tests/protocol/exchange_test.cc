// Handoffs, counts, barriers, low-latency regions and doorbells under threads, with payloads that say whose they are.
// Ranks are late by delays drawn from a seed, which each test prints; ANYEP_TEST_SEED=N replays one.
#include <gtest/gtest.h>

#include <cstdlib>
#include <iostream>
#include <random>
#include <string>

#include "core/buffers.h"
#include "protocol/exchanges.h"
#include "protocol/handoffs.h"

namespace anyep::test {
namespace {

struct Play {
  const char* name;
  int ranks;
  std::uint32_t regions, turns;
};
Load load_of(const Play& play) {
  Load load;
  load.ranks = play.ranks;
  load.regions = play.regions;
  load.turns = play.turns;
  load.ops = (play.ranks > 2 ? 1200 : 2000) / play.turns;  // past the wrap
  const char* const given = std::getenv("ANYEP_TEST_SEED");
  load.seed = given != nullptr ? std::strtoull(given, nullptr, 0) : std::random_device{}();
  if (std::getenv("ANYEP_SOAK") != nullptr) load.ops *= 50;
  std::cout << "seed " << load.seed << "\n";
  return load;
}

std::string play_rows(const Load& load, Rows rows) {
  Team team(load);
  Handoffs(team, rows).play();
  return team.fault();
}
template <class Exchange>
std::string play_exchange(const Load& load) {
  Team team(load);
  Exchange(team).play();
  return team.fault();
}

class Handoff : public testing::TestWithParam<Play> {};

TEST_P(Handoff, DeliversThroughARing) {
  EXPECT_EQ(play_rows(load_of(GetParam()), Rows::kRing), "");
}

TEST_P(Handoff, DeliversToRowsThatMove) {
  EXPECT_EQ(play_rows(load_of(GetParam()), Rows::kMoving), "");
}

TEST_P(Handoff, FetchesOfferedRowsAndGivesThemBack) {
  EXPECT_EQ(play_rows(load_of(GetParam()), Rows::kOffered), "");
}

TEST_P(Handoff, DeliversWhileSendingAndCollectingRunSideBySide) {
  Team team(load_of(GetParam()));
  Handoffs(team, Rows::kRing).play_side_by_side();
  EXPECT_EQ(team.fault(), "");
}

INSTANTIATE_TEST_SUITE_P(Protocol, Handoff,
                         testing::Values(Play{"OneRegionOneTurn", 2, 1, 1}, Play{"TwoRegionsOneTurn", 2, 2, 1},
                                         Play{"TwoRegionsThreeTurns", 2, 2, 3}, Play{"ThreeRanks", 3, 2, 2},
                                         Play{"FourRanksOneRegion", 4, 1, 2}),
                         [](const auto& each) { return each.param.name; });

class Group : public testing::TestWithParam<int> {
 protected:
  Load load() const { return load_of({"", GetParam(), 2, 1}); }
};

TEST_P(Group, ReadsTheCountsOfItsTurn) {
  EXPECT_EQ(play_exchange<CountExchange>(load()), "");
}

TEST_P(Group, SeesBehindABarrierWhatCameBeforeIt) {
  EXPECT_EQ(play_exchange<BarrierRounds>(load()), "");
}

TEST_P(Group, NeedsNoCreditWithTwoTurnsInFlight) {
  Load four = load();
  four.regions = core::kLowLatencyRegions;
  EXPECT_EQ(play_exchange<RegionExchange>(four), "");
}

INSTANTIATE_TEST_SUITE_P(Protocol, Group, testing::Values(2, 3, 4), testing::PrintToStringParamName());

TEST(Doorbell, LosesNoWakeUp) {
  EXPECT_EQ(play_exchange<Sleepers>(load_of({"", 2, 1, 1})), "");
}

// The scenarios have eyes of their own: regions that are too few are found. (ThreadSanitizer would end the program
// here.)
#if !defined(__SANITIZE_THREAD__)
TEST(Team, FindsRegionsThatAreTooFew) {
  Load load = load_of({"", 2, 1, 1});
  load.delay_one_in = 6;
  std::string fault;
  for (int attempt = 0; attempt < 20 && fault.empty(); ++attempt, ++load.seed)
    fault = play_exchange<RegionExchange>(load);
  EXPECT_NE(fault, "");
}
#endif

}  // namespace
}  // namespace anyep::test
