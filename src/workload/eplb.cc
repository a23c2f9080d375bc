#include "workload/eplb.h"

#include <algorithm>
#include <cstddef>
#include <queue>
#include <utility>

#include "core/routing.h"

namespace anyep::workload {
namespace {

struct Replica {
  int expert = 0;
  double load = 0;
};

/// Every further slot goes to the expert whose replicas carry most; the lower expert wins a tie. Heaviest first.
std::vector<Replica> replicate(std::span<const double> load, int num_slots) {
  std::vector<int> copies(load.size(), 1);
  std::priority_queue<std::pair<double, int>> heaviest;  // load per copy, -expert
  for (std::size_t expert = 0; expert < load.size(); ++expert)
    heaviest.emplace(load[expert], -static_cast<int>(expert));
  for (auto slot = static_cast<int>(load.size()); slot < num_slots; ++slot) {
    const int negated = heaviest.top().second;
    heaviest.pop();
    const auto expert = static_cast<std::size_t>(-negated);
    heaviest.emplace(load[expert] / ++copies[expert], negated);
  }
  std::vector<Replica> replicas;
  for (std::size_t expert = 0; expert < load.size(); ++expert) {
    const Replica replica{static_cast<int>(expert), load[expert] / copies[expert]};
    replicas.insert(replicas.end(), static_cast<std::size_t>(copies[expert]), replica);
  }
  std::stable_sort(replicas.begin(), replicas.end(),
                   [](const Replica& a, const Replica& b) { return a.load > b.load; });
  return replicas;
}

}  // namespace

std::vector<std::vector<int>> place_replicas(std::span<const double> load, const EplbShape& shape) {
  struct RankState {
    double load = 0;
    int used = 0;
  };
  std::vector<RankState> ranks(static_cast<std::size_t>(shape.num_ranks));
  std::vector<std::vector<int>> slots(load.size());
  for (const Replica& replica : replicate(load, shape.num_slots)) {
    int lightest = -1;
    for (int rank = 0; rank < shape.num_ranks; ++rank) {
      const RankState& state = ranks[static_cast<std::size_t>(rank)];
      if (state.used == core::expert_block(shape.num_slots, shape.num_ranks, rank).count) continue;
      if (lightest < 0 || state.load < ranks[static_cast<std::size_t>(lightest)].load) lightest = rank;
    }
    RankState& chosen = ranks[static_cast<std::size_t>(lightest)];
    const int first = core::expert_block(shape.num_slots, shape.num_ranks, lightest).first;
    slots[static_cast<std::size_t>(replica.expert)].push_back(first + chosen.used++);
    chosen.load += replica.load;
  }
  for (std::vector<int>& of_expert : slots) std::sort(of_expert.begin(), of_expert.end());
  return slots;
}

}  // namespace anyep::workload
