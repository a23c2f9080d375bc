#include "workload/sampler.h"

#include <algorithm>
#include <utility>

namespace anyep::workload {
namespace {

// A draw that hits taken experts this often is made among the rest alone: same distribution, bounded time.
constexpr int kMostRejections = 16;

bool contains(std::span<const std::int64_t> row, std::int64_t id) {
  return std::find(row.begin(), row.end(), id) != row.end();
}

}  // namespace

Sampler::Sampler(std::vector<double> popularity) : popularity_(std::move(popularity)) {
  until_.reserve(popularity_.size());
  double sum = 0;
  for (const double value : popularity_) until_.push_back(sum += value);
}

std::int64_t Sampler::draw(Stream& stream) const {
  const double target = stream.uniform() * until_.back();
  const auto found = std::upper_bound(until_.begin(), until_.end(), target);
  return std::min(found - until_.begin(), static_cast<std::ptrdiff_t>(until_.size()) - 1);
}

void Sampler::draw_distinct(Stream& stream, std::span<std::int64_t> row, std::size_t filled) const {
  for (; filled < row.size(); ++filled) {
    const auto taken = row.first(filled);
    std::int64_t id = draw(stream);
    for (int rejections = 0; contains(taken, id); id = draw(stream)) {
      if (++rejections == kMostRejections) {
        id = draw_among_rest(stream, taken);
        break;
      }
    }
    row[filled] = id;
  }
}

std::int64_t Sampler::draw_among_rest(Stream& stream, std::span<const std::int64_t> taken) const {
  double total = 0;
  for (std::size_t expert = 0; expert < size(); ++expert) {
    if (!contains(taken, static_cast<std::int64_t>(expert))) total += popularity_[expert];
  }
  double target = stream.uniform() * total;
  std::int64_t last = -1;
  for (std::size_t expert = 0; expert < size(); ++expert) {
    if (contains(taken, static_cast<std::int64_t>(expert))) continue;
    last = static_cast<std::int64_t>(expert);
    target -= popularity_[expert];
    if (target < 0) break;
  }
  return last;
}

}  // namespace anyep::workload
