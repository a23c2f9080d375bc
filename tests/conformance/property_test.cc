// Random scenarios against the oracle, for some seconds a world. ANYEP_SOAK multiplies them; ANYEP_SEED=<n> begins with
// a scenario that failed.
#include <chrono>
#include <cstdlib>
#include <iostream>
#include <random>
#include <string>

#include "conformance/conformance.h"
#include "conformance/random_scenario.h"

namespace anyep::test {
namespace {

class Property : public Conformance {};

// Whatever a seed draws, every world answers as the oracle does, and the oracle's answer has the properties.
TEST_P(Property, RandomScenarios) {
  const std::chrono::duration<double> limit((GetParam() == World::kOracle ? 3 : 6) * soak_factor());
  const char* given = std::getenv("ANYEP_SEED");
  const std::uint64_t first = given != nullptr ? std::stoull(given) : std::random_device()();
  std::cout << "seeds from " << first << "\n";
  const auto until = std::chrono::steady_clock::now() + limit;
  std::uint64_t seed = first;
  while (std::chrono::steady_clock::now() < until && !HasFailure()) {
    SCOPED_TRACE("ANYEP_SEED=" + std::to_string(seed));
    expect(random_scenario(seed++));
  }
  std::cout << seed - first << " scenarios\n";
}

ANYEP_IN_EVERY_WORLD(Property);

}  // namespace
}  // namespace anyep::test
