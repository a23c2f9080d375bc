// The choice of a gate: scores and bias to experts and weights. Contract: Gate in anyep/workload.h.
#pragma once

#include <anyep/workload.h>

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace anyep::workload {

/// @throws Error kArgument with `op`: groups that do not divide the experts, kept groups too small for top_k, ...
void check_gate(std::string_view op, const Gate& gate);

/// Has scratch memory: one per thread.
class GateChooser {
 public:
  /// `bias` per expert; the gate is checked.
  GateChooser(const Gate& gate, std::span<const float> bias);

  /// Best first; equal values go to the lower expert. Scores are positive, one per expert; ids and weights hold top_k.
  void choose(std::span<const float> scores, std::span<std::int64_t> ids, std::span<float> weights);

 private:
  void keep_groups();
  float group_score(std::size_t group) const;

  Gate gate_;
  std::size_t group_size_;
  std::vector<float> bias_;
  std::vector<float> biased_;  ///< score + bias
  std::vector<float> group_scores_;
  std::vector<std::int64_t> kept_;  ///< groups
};

}  // namespace anyep::workload
