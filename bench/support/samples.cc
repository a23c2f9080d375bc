#include "bench/support/samples.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace anyep::bench {
namespace {

std::vector<double> sorted(std::span<const double> values) {
  std::vector<double> copy(values.begin(), values.end());
  std::sort(copy.begin(), copy.end());
  return copy;
}

}  // namespace

double median(std::span<const double> values) {
  if (values.empty()) return 0;
  const std::vector<double> ordered = sorted(values);
  const std::size_t middle = ordered.size() / 2;
  return ordered.size() % 2 == 1 ? ordered[middle] : (ordered[middle - 1] + ordered[middle]) / 2;
}

double percentile(std::span<const double> values, double percent) {
  if (values.empty()) return 0;
  const std::vector<double> ordered = sorted(values);
  const double position = std::ceil(percent / 100 * static_cast<double>(ordered.size()));
  const double last = static_cast<double>(ordered.size());
  return ordered[static_cast<std::size_t>(std::clamp(position, 1.0, last)) - 1];
}

double spread(std::span<const double> values) {
  if (values.empty()) return 0;
  const auto [least, most] = std::minmax_element(values.begin(), values.end());
  const double middle = median(values);
  return middle > 0 ? (*most - *least) / middle : 0;
}

std::vector<double> slowest(std::span<const std::vector<double>> ranks) {
  std::vector<double> worst;
  if (ranks.empty()) return worst;
  worst = ranks[0];
  for (const std::vector<double>& series : ranks) {
    worst.resize(std::min(worst.size(), series.size()));
    for (std::size_t i = 0; i < worst.size(); ++i) worst[i] = std::max(worst[i], series[i]);
  }
  return worst;
}

}  // namespace anyep::bench
