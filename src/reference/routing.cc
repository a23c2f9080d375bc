#include "reference/routing.h"

#include "reference/views.h"

namespace anyep::reference {

Block experts_of(int rank, int num_ranks, int num_experts) {
  const int base = num_experts / num_ranks;
  const int rest = num_experts % num_ranks;
  return rank < rest ? Block{rank * (base + 1), base + 1} : Block{rank * base + rest, base};
}

std::int64_t choice(const TensorView& experts, std::int64_t token, std::int64_t slot, int num_experts) {
  const std::int64_t id = id_at(experts, token, slot);
  return id >= 0 && id < num_experts ? id : -1;
}

std::int64_t num_tokens(const Routing& routing) {
  return routing.experts.given() ? routing.experts.shape[0] : routing.ranks.shape[0];
}

bool goes_to(const Routing& routing, std::int64_t token, int rank, int num_ranks, int num_experts) {
  if (routing.ranks.given()) return *element(routing.ranks, token, rank) != std::byte{0};
  const Block block = experts_of(rank, num_ranks, num_experts);
  for (std::int64_t slot = 0; slot < routing.experts.shape[1]; ++slot) {
    if (block.holds(choice(routing.experts, token, slot, num_experts))) return true;
  }
  return false;
}

Layout layout(int num_ranks, int num_experts, const Routing& routing) {
  Layout answer;
  answer.tokens_per_rank.assign(static_cast<std::size_t>(num_ranks), 0);
  answer.pairs_per_expert.assign(static_cast<std::size_t>(num_experts), 0);
  for (std::int64_t token = 0; token < num_tokens(routing); ++token) {
    for (int rank = 0; rank < num_ranks; ++rank) {
      const bool goes = goes_to(routing, token, rank, num_ranks, num_experts);
      answer.token_in_rank.push_back(goes ? 1 : 0);
      if (goes) ++answer.tokens_per_rank[static_cast<std::size_t>(rank)];
    }
    for (std::int64_t slot = 0; routing.experts.given() && slot < routing.experts.shape[1]; ++slot) {
      const std::int64_t expert = choice(routing.experts, token, slot, num_experts);
      if (expert >= 0) ++answer.pairs_per_expert[static_cast<std::size_t>(expert)];
    }
  }
  return answer;
}

namespace {

std::uint64_t count_out_of_range(const TensorView& experts, int num_experts) {
  std::uint64_t count = 0;
  for (std::int64_t token = 0; experts.given() && token < experts.shape[0]; ++token) {
    for (std::int64_t slot = 0; slot < experts.shape[1]; ++slot) {
      const std::int64_t id = id_at(experts, token, slot);
      if (id < -1 || id >= num_experts) ++count;
    }
  }
  return count;
}

/// The (token, choice) pairs of one expert on one rank: as told, else counted.
std::int64_t pairs_of(const Routing& routing, int expert, int num_experts) {
  if (routing.pairs_per_expert.given()) {
    return routing.pairs_per_expert.as<std::int32_t>()[expert];
  }
  std::int64_t pairs = 0;
  for (std::int64_t token = 0; routing.experts.given() && token < routing.experts.shape[0]; ++token) {
    for (std::int64_t slot = 0; slot < routing.experts.shape[1]; ++slot) {
      if (choice(routing.experts, token, slot, num_experts) == expert) ++pairs;
    }
  }
  return pairs;
}

}  // namespace

std::vector<Route> route(int num_experts, std::span<const Routing> routing) {
  const int num_ranks = static_cast<int>(routing.size());
  std::vector<Route> routes(routing.size());

  for (int rank = 0; rank < num_ranks; ++rank) {
    Route& here = routes[static_cast<std::size_t>(rank)];
    const Routing& mine = routing[static_cast<std::size_t>(rank)];
    here.rank = rank;
    here.num_ranks = num_ranks;
    here.num_experts = num_experts;
    here.num_tokens = num_tokens(mine);
    here.place.assign(static_cast<std::size_t>(here.num_tokens * num_ranks), -1);
    here.ids_out_of_range = count_out_of_range(mine.experts, num_experts);
    for (const Routing& each : routing) here.tokens.push_back(static_cast<std::int32_t>(num_tokens(each)));
  }

  for (int at = 0; at < num_ranks; ++at) {  // rows of rank `at`, in their order
    Route& there = routes[static_cast<std::size_t>(at)];
    for (int from = 0; from < num_ranks; ++from) {
      const Routing& theirs = routing[static_cast<std::size_t>(from)];
      for (std::int64_t token = 0; token < num_tokens(theirs); ++token) {
        if (!goes_to(theirs, token, at, num_ranks, num_experts)) continue;
        routes[static_cast<std::size_t>(from)].place[static_cast<std::size_t>(token * num_ranks + at)] =
            static_cast<std::int32_t>(there.num_rows++);
        there.source.push_back(static_cast<std::int32_t>(token));
      }
      there.rows_until.push_back(static_cast<std::int32_t>(there.num_rows));
    }
    const Block block = experts_of(at, num_ranks, num_experts);
    for (int expert = block.first; expert < block.first + block.count; ++expert) {
      std::int64_t pairs = 0;
      for (const Routing& theirs : routing) pairs += pairs_of(theirs, expert, num_experts);
      there.pairs_per_expert.push_back(pairs);
    }
  }
  return routes;
}

}  // namespace anyep::reference
