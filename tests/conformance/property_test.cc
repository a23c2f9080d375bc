// Random scenarios against the oracle, for some seconds a world; ANYEP_SOAK=<seconds> for long runs, ANYEP_SEED=<n> to
// begin with one that failed.
#include <chrono>
#include <cstdlib>
#include <iostream>
#include <random>
#include <string>

#include "conformance/conformance.h"
#include "conformance/random_scenario.h"

namespace anyep::test {
namespace {

std::uint64_t number_from(const char* variable, std::uint64_t fallback) {
  const char* text = std::getenv(variable);
  return text == nullptr ? fallback : std::stoull(text);
}

class Property : public Conformance {};

// Whatever a seed draws, every world answers as the oracle does, and the oracle's answer has the properties.
TEST_P(Property, RandomScenarios) {
  const auto soak = number_from("ANYEP_SOAK", 0);
  const std::chrono::seconds limit(soak > 1 ? soak : soak == 1 ? 300 : GetParam() == World::kOracle ? 3 : 6);
  const std::uint64_t first = number_from("ANYEP_SEED", std::random_device()());
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
