#include "workload/gate.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/check.h"

namespace anyep::workload {
namespace {

/// Inserts `id` where it belongs among the `best.size()` best of `values`, best first. Called with ascending ids, so an
/// equal value stays behind. `filled` = how many places are taken.
void insert_best(std::span<const float> values, std::int64_t id, std::span<std::int64_t> best, std::size_t& filled) {
  const auto value_of = [&](std::int64_t item) { return values[static_cast<std::size_t>(item)]; };
  const float value = value_of(id);
  if (filled == best.size() && !(value > value_of(best[filled - 1]))) return;
  std::size_t place = filled < best.size() ? filled++ : filled - 1;
  for (; place > 0 && value > value_of(best[place - 1]); --place) best[place] = best[place - 1];
  best[place] = id;
}

void check_range(std::string_view op, std::string_view argument, std::int64_t got, std::int64_t least,
                 std::int64_t most) {
  if (got >= least && got <= most) return;
  core::throw_argument(op, argument, fmt::format("{}", got), fmt::format("{}..{}", least, most));
}

}  // namespace

void check_gate(std::string_view op, const Gate& gate) {
  check_range(op, "num_experts", gate.num_experts, 1, 1 << 20);
  check_range(op, "top_k", gate.top_k, 1, std::min(32, gate.num_experts));
  check_range(op, "groups", gate.groups, 1, gate.num_experts);
  if (gate.num_experts % gate.groups != 0) {
    core::throw_argument(op, "groups", fmt::format("{}", gate.groups), fmt::format("divisors of {}", gate.num_experts));
  }
  const int group_size = gate.num_experts / gate.groups;
  check_range(op, "groups_kept", gate.groups_kept, (gate.top_k + group_size - 1) / group_size, gate.groups);
  if (!(gate.scaling > 0) || !std::isfinite(gate.scaling)) {
    core::throw_argument(op, "scaling", fmt::format("{}", gate.scaling), "finite numbers above 0");
  }
}

GateChooser::GateChooser(const Gate& gate, std::span<const float> bias)
    : gate_(gate),
      group_size_(static_cast<std::size_t>(gate.num_experts / gate.groups)),
      bias_(bias.begin(), bias.end()),
      biased_(bias.size()),
      group_scores_(static_cast<std::size_t>(gate.groups)),
      kept_(static_cast<std::size_t>(gate.groups_kept)) {
  ANYEP_CHECK(bias.size() == static_cast<std::size_t>(gate.num_experts), "one bias per expert");
}

float GateChooser::group_score(std::size_t group) const {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  float first = kNone, second = kNone;
  for (std::size_t expert = group * group_size_; expert < (group + 1) * group_size_; ++expert) {
    const float value = biased_[expert];
    second = std::max(second, std::min(first, value));
    first = std::max(first, value);
  }
  return group_size_ == 1 ? first : first + second;
}

void GateChooser::keep_groups() {
  std::size_t filled = 0;
  for (std::size_t group = 0; group < group_scores_.size(); ++group) {
    group_scores_[group] = group_score(group);
    insert_best(group_scores_, static_cast<std::int64_t>(group), kept_, filled);
  }
  std::sort(kept_.begin(), kept_.end());  // so that experts come in ascending order
}

void GateChooser::choose(std::span<const float> scores, std::span<std::int64_t> ids, std::span<float> weights) {
  for (std::size_t expert = 0; expert < biased_.size(); ++expert) biased_[expert] = scores[expert] + bias_[expert];
  if (gate_.groups_kept == gate_.groups) {
    for (std::size_t group = 0; group < kept_.size(); ++group) kept_[group] = static_cast<std::int64_t>(group);
  } else {
    keep_groups();
  }
  std::size_t filled = 0;
  for (const std::int64_t group : kept_) {
    const std::int64_t first = group * static_cast<std::int64_t>(group_size_);
    for (std::int64_t expert = first; expert < first + static_cast<std::int64_t>(group_size_); ++expert) {
      insert_best(biased_, expert, ids, filled);
    }
  }
  double sum = 0;
  for (const std::int64_t id : ids) sum += scores[static_cast<std::size_t>(id)];
  for (std::size_t choice = 0; choice < ids.size(); ++choice) {
    const double score = scores[static_cast<std::size_t>(ids[choice])];
    weights[choice] = static_cast<float>(score / sum * gate_.scaling);
  }
}

}  // namespace anyep::workload
