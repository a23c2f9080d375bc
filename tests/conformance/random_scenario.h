// Scenarios drawn from a seed: any shape, type, mode and timing that is legal.
#pragma once

#include <cstdint>

#include "support/scenario.h"

namespace anyep::test {

/// The same seed gives the same scenario.
Scenario random_scenario(std::uint64_t seed);

}  // namespace anyep::test
