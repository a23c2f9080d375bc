// One maker per mechanism: turns a global token id into experts and weights.
#pragma once

#include <anyep/workload.h>

#include <cstdint>
#include <memory>
#include <span>

#include "workload/popularity.h"

namespace anyep::workload {

class RowMaker {
 public:
  virtual ~RowMaker() = default;
  /// Called with ascending token ids from 0 on, none left out.
  virtual void make(std::uint64_t token, std::span<std::int64_t> ids, std::span<float> weights) = 0;
};

/// The request's numbers are in range. @throws Error kArgument: the profile does not fit the experts and ranks.
std::unique_ptr<RowMaker> make_row_maker(const Request& request, const Keys& keys);

/// Weights of the ids that are not -1: positive, larger ones first, sum about 1; 0 for the others.
void draw_weights(std::uint64_t key, std::uint64_t token, std::span<const std::int64_t> ids, std::span<float> weights);

}  // namespace anyep::workload
