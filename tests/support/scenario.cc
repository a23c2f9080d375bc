#include "support/scenario.h"

#include <anyep/plan.h>

#include <algorithm>
#include <array>

namespace anyep::test {

const RouteStep& Scenario::route_of(int handle) const {
  const What& what = steps[static_cast<std::size_t>(handle)].what;
  if (const auto* adopt = std::get_if<AdoptStep>(&what)) return route_of(adopt->handle);
  return std::get<RouteStep>(what);
}

Shape Scenario::shape_of(const LowLatencyDispatchStep& step) const {
  Shape shape;
  shape.num_experts = step.choices.num_experts;
  shape.top_k = step.choices.top_k;
  shape.hidden = step.hidden;
  shape.max_tokens = step.max_tokens > 0 ? step.max_tokens : std::max<std::int64_t>(step.choices.most_tokens(), 1);
  return shape;
}

Shape Scenario::shape_of(const LowLatencyCombineStep& combine) const {
  Shape shape = shape_of(step<LowLatencyDispatchStep>(combine.dispatch));
  if (combine.hidden > 0) shape.hidden = combine.hidden;
  return shape;
}

std::int64_t Scenario::low_latency_bytes() const {
  std::int64_t bytes = 0;
  const auto add = [&](const Shape& shape) { bytes = std::max(bytes, low_latency_bytes_for(shape, num_ranks)); };
  for (const Step& each : steps) {
    if (const auto* dispatch = std::get_if<LowLatencyDispatchStep>(&each.what)) add(shape_of(*dispatch));
    if (const auto* combine = std::get_if<LowLatencyCombineStep>(&each.what)) add(shape_of(*combine));
  }
  return bytes;
}

std::string name_of(const Step& step) {
  constexpr std::array<const char*, std::variant_size_v<What>> kNames = {
      "route", "adopt",   "dispatch", "combine", "low_latency_dispatch", "low_latency_combine", "receive",
      "wait",  "barrier", "zero",     "close"};
  return kNames[step.what.index()];
}

}  // namespace anyep::test
