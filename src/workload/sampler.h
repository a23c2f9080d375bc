// Experts drawn in proportion to their popularity, with or without replacement.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "workload/random.h"

namespace anyep::workload {

/// Drawing one after another in proportion to what is left is the same distribution as the top-k of log(popularity)
/// plus Gumbel noise, at a cost that does not grow with the number of experts.
class Sampler {
 public:
  /// Popularities are positive, at least one of them.
  explicit Sampler(std::vector<double> popularity);

  std::size_t size() const { return popularity_.size(); }
  double popularity(std::size_t expert) const { return popularity_[expert]; }

  /// With replacement.
  std::int64_t draw(Stream& stream) const;
  /// Fills row[filled..] with ids that differ from each other and from row[0..filled). row.size() <= size().
  void draw_distinct(Stream& stream, std::span<std::int64_t> row, std::size_t filled = 0) const;

 private:
  std::int64_t draw_among_rest(Stream& stream, std::span<const std::int64_t> taken) const;

  std::vector<double> popularity_;
  std::vector<double> until_;  ///< inclusive prefix sums
};

}  // namespace anyep::workload
