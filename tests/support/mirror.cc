#include "support/mirror.h"

#include <cstring>

namespace anyep::test {

std::vector<std::byte> Mirror::fetch(const TensorView& theirs) const {
  const auto bytes = static_cast<std::size_t>(theirs.num_elements()) * size_of(theirs.dtype);
  return {theirs.as<std::byte>(), theirs.as<std::byte>() + bytes};
}

void Mirror::zero(const TensorView& theirs) {
  std::memset(theirs.data, 0, static_cast<std::size_t>(theirs.num_elements()) * size_of(theirs.dtype));
}

Routing Mirror::at(const Routing& routing) const {
  return {at(routing.experts), at(routing.ranks), at(routing.pairs_per_expert), at(routing.weights)};
}

Rows Mirror::at(const Rows& rows) const {
  Rows there{at(rows.x), at(rows.scales), at(rows.experts), at(rows.weights), {}};
  for (const TensorView& extra : rows.extra) there.extra.push_back(at(extra));
  return there;
}

CombineInput Mirror::at(const CombineInput& in) const {
  return {at(in.x), at(in.weights), {at(in.bias[0]), at(in.bias[1])}};
}

ExpertSlabs Mirror::at(const ExpertSlabs& slabs) const {
  return {at(slabs.x), at(slabs.scales), at(slabs.counts), at(slabs.source), at(slabs.range), at(slabs.rows)};
}

}  // namespace anyep::test
