// Worlds that can play a scenario. The oracle needs no engine; the others are groups of ranks.
#pragma once

#include <ostream>
#include <string>
#include <vector>

#include "support/outputs.h"
#include "support/scenario.h"

namespace anyep::test {

enum class World { kOracle, kThreads, kProcesses, kGpus };
/// The list that parameterised tests run over: a new backend is one more entry. GPUs where there are any: ranks are threads,
/// which share the GPUs in turn.
std::vector<World> worlds();
std::vector<World> engine_worlds();

/// Groups of more are refused there.
inline constexpr int kMostRanksOnGpus = 8;

/// "Oracle", "Threads", "Processes", "Gpus".
const char* name_of(World world);
/// How GoogleTest prints it.
inline void PrintTo(World world, std::ostream* out) {
  *out << name_of(world);
}

/// Plays the scenario; one entry per rank. A rank that ended in an exception has a field "failed" with its text.
Outputs run(World world, const Scenario& scenario);

/// The oracle's answer to the scenario.
Outputs oracle_outputs(const Scenario& scenario);

/// Fails the current test unless this world gives what the oracle gives; in the oracle's own world, unless its answer
/// has the properties that are computed without it (properties.h).
void expect_conforms(World world, const Scenario& scenario);

}  // namespace anyep::test
