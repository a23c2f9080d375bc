// What must hold of any answer, computed from the scenario alone: so the oracle is checked too.
#pragma once

#include <string>

#include "support/outputs.h"
#include "support/scenario.h"

namespace anyep::test {

/// Empty, or the first property that the answer lacks:
/// - rows of a rank are exactly the tokens that choose it, by (source rank, token), each once, and `place` points to
/// them;
/// - every received row is the function of its source that the scenario says, bit for bit (FP8: within half a unit);
/// - sums agree with double precision within what the format allows.
std::string broken_property(const Scenario& scenario, const Outputs& outputs);

}  // namespace anyep::test
