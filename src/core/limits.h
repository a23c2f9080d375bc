// Limits that hold whatever the budget.
#pragma once

namespace anyep::core {

/// Most ranks of a group. A process holds up to three descriptors per peer (link, process, window): 1024 ranks stay
/// below 4096, the usual hard limit of descriptors.
inline constexpr int kMaxRanks = 1024;

}  // namespace anyep::core
