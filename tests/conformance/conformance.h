// Every test of this folder plays a scenario in each world and compares it with the oracle (support/world.h).
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include "support/world.h"

namespace anyep::test {

class Conformance : public testing::TestWithParam<World> {
 protected:
  static void expect(const Scenario& scenario) { expect_conforms(GetParam(), scenario); }
};

inline std::string world_name(const testing::TestParamInfo<World>& info) {
  return name_of(info.param);
}

/// A scenario with so many ranks; every test has a seed of its own by the call's position.
inline Scenario ranks(int num_ranks, std::uint64_t seed = 1) {
  Scenario scenario;
  scenario.num_ranks = num_ranks;
  scenario.seed = seed;
  return scenario;
}

/// How much longer than usual the long tests run.
inline double soak_factor() {
  const char* text = std::getenv("ANYEP_SOAK");
  return text == nullptr ? 1 : std::stod(text);
}

}  // namespace anyep::test

/// Runs the tests of a fixture in every world; the world's name ends the test's name.
#define ANYEP_IN_EVERY_WORLD(Fixture) \
  INSTANTIATE_TEST_SUITE_P(, Fixture, testing::ValuesIn(::anyep::test::worlds()), ::anyep::test::world_name)
