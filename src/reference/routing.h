// Where every token goes: all ranks' routing -> what route() tells each of them.
#pragma once

#include <anyep/config.h>
#include <anyep/handle.h>
#include <anyep/types.h>

#include <cstdint>
#include <span>
#include <vector>

namespace anyep::reference {

/// The experts of one rank: global ids first..first+count-1.
struct Block {
  int first = 0, count = 0;
  bool holds(std::int64_t expert) const { return expert >= first && expert < first + count; }
};

/// Contiguous blocks; the first num_experts % num_ranks ranks have one expert more.
Block experts_of(int rank, int num_ranks, int num_experts);

/// The id of one choice; whatever is not an expert is -1. Compared in 64 bits.
std::int64_t choice(const TensorView& experts, std::int64_t token, std::int64_t slot, int num_experts);

std::int64_t num_tokens(const Routing& routing);

/// Does this token go to that rank? The routing's own `ranks` decide where they are given.
bool goes_to(const Routing& routing, std::int64_t token, int rank, int num_ranks, int num_experts);

/// What one rank's routing says, without the others.
Layout layout(int num_ranks, int num_experts, const Routing& routing);

/// What route() tells one rank.
struct Route {
  int rank = 0, num_ranks = 1, num_experts = 0;
  std::int64_t num_tokens = 0, num_rows = 0;
  std::vector<std::int32_t> rows_until;        ///< [num_ranks]
  std::vector<std::int32_t> place;             ///< [num_tokens, num_ranks]
  std::vector<std::int32_t> source;            ///< [num_rows]
  std::vector<std::int32_t> tokens;            ///< [num_ranks]
  std::vector<std::int64_t> pairs_per_expert;  ///< [local experts]
  std::uint64_t ids_out_of_range = 0;          ///< ids of this rank that are neither an expert nor -1

  std::int32_t place_at(std::int64_t token, int at) const {
    return place[static_cast<std::size_t>(token * num_ranks + at)];
  }
};

/// routing[r] is what rank r passes to route(); the answer has one entry per rank.
std::vector<Route> route(int num_experts, std::span<const Routing> routing);

}  // namespace anyep::reference
