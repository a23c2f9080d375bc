// Plays one scenario of tests/protocol and says whether it held. The mutation harness builds it against changed
// headers.
//
//   stress NAME SEED LIMIT_S      exit status 0 = held, 1 = a fault was found, 2 = no such scenario
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "protocol/exchanges.h"
#include "protocol/handoffs.h"
#include "protocol/wait_rules.h"

namespace anyep::test {
namespace {

/// Short: a harness runs dozens of these. The wrap comes after 50 turns.
Load small(std::uint64_t seed, std::uint64_t limit_ns) {
  Load load;
  load.seed = seed;
  load.ops = 400;
  load.first_epoch = 0xFFFF'FFFFu - 50;
  load.limit_ns = limit_ns;
  return load;
}

std::string handoffs(Load load, Rows rows, int roles) {
  Team team(load);
  Handoffs scenario(team, rows);
  if (roles == 2) {
    scenario.play_side_by_side();
  } else {
    scenario.play();
  }
  return team.fault();
}

template <class Scenario>
std::string exchange(const Load& load) {
  Team team(load);
  Scenario scenario(team);
  scenario.play();
  return team.fault();
}

/// Several short plays: the wrap comes once in each.
std::string regions(Load load) {
  load.regions = 4;
  load.ops = 80;
  load.delay_one_in = 6;
  std::string fault;
  for (int repeat = 0; repeat < 8 && fault.empty(); ++repeat, ++load.seed) fault = exchange<RegionExchange>(load);
  return fault;
}

std::string play(const char* name, std::uint64_t seed, std::uint64_t limit_ns) {
  Load load = small(seed, limit_ns);
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
  for (const WaitRule& rule : kWaitRules) {
    if (is(rule.name)) return rule.check();
  }
  if (is("ring")) return handoffs(load, Rows::kRing, 1);
  if (is("ring-of-one")) return load.regions = 1, handoffs(load, Rows::kRing, 1);
  if (is("ring-side-by-side")) return handoffs(load, Rows::kRing, 2);
  if (is("single-turns")) return load.turns = 1, handoffs(load, Rows::kRing, 1);
  if (is("moving")) return load.turns = 3, handoffs(load, Rows::kMoving, 1);
  if (is("offered")) return handoffs(load, Rows::kOffered, 1);
  if (is("counts")) return exchange<CountExchange>(load);
  if (is("barrier")) return exchange<BarrierRounds>(load);
  if (is("regions")) return regions(load);
  if (is("sleepers")) return load.ops = 3000, exchange<Sleepers>(load);
  if (is("pace")) {  // nobody is delayed, so no wait may last
    load.delay_one_in = 0;
    load.slow_ns = kSecond;
    load.ops = 3000;
    return handoffs(load, Rows::kRing, 2);
  }
  std::fprintf(stderr, "no such scenario: %s\n", name);
  std::exit(2);
}

}  // namespace
}  // namespace anyep::test

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s NAME SEED LIMIT_S\n", argv[0]);
    return 2;
  }
  const std::string fault = anyep::test::play(argv[1], std::strtoull(argv[2], nullptr, 0),
                                              std::strtoull(argv[3], nullptr, 0) * anyep::test::kSecond);
  if (!fault.empty()) std::fprintf(stderr, "%s\n", fault.c_str());
  std::fflush(nullptr);
  // A mutant may have left threads behind that never end.
  _exit(fault.empty() ? 0 : 1);
}
