// Order statistics of repeated measurements. bench/METRICS.md has the formulas.
#pragma once

#include <span>
#include <vector>

namespace anyep::bench {

/// The middle value, or the mean of the two middle ones; 0 for none.
double median(std::span<const double> values);
/// Nearest rank: the smallest value that is not exceeded by `percent` of them; 0 for none.
double percentile(std::span<const double> values, double percent);
/// (largest - smallest) / median, 0 for none.
double spread(std::span<const double> values);
/// result[i] = the largest of ranks[r][i]: the time of the slowest rank. As long as the shortest series.
std::vector<double> slowest(std::span<const std::vector<double>> ranks);

}  // namespace anyep::bench
