// Checks of many rows, on the cores that a rank has while nothing is timed.
#pragma once

#include <cstdint>
#include <functional>

namespace anyep::bench {

/// The sum of `part(begin, end)` over [0, count), cut over this rank's share of the cores. `part` throws nothing.
std::int64_t parallel_sum(std::int64_t count, int num_ranks,
                          const std::function<std::int64_t(std::int64_t, std::int64_t)>& part);

}  // namespace anyep::bench
