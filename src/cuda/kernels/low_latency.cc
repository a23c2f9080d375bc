#include "cuda/kernels/low_latency.h"

#include <algorithm>

#include "cuda/runtime/launch.h"

namespace anyep::cuda::low_latency {
namespace {

/// n / divisor == n * reciprocal >> bits for n * divisor < 2^bits.
constexpr std::uint32_t reciprocal(unsigned divisor, int bits) {
  return divisor == 0 ? 0 : static_cast<std::uint32_t>((std::uint64_t{1} << bits) / divisor + 1);
}
static_assert(kMaxExperts * kMaxExperts <= 1 << kExpertBits && kLanesOfWarp * kMaxTopK <= 1 << kLaneBits);

}  // namespace

int complete(CallParams& call, int num_sms, int most_warps, int all_warps, bool own_apart, int units_for_peers) {
  const Team& team = call.team;
  const int ranks = team.num_ranks;
  Addresses& at = call.at;
  at.source_bytes = call.layout.region_bytes;
  at.turn_bytes = call.layout.region_bytes * static_cast<unsigned>(ranks);
  at.from = team.window[team.rank] + team.layout.low_latency;
  for (int rank = 0; rank < ranks; ++rank) {
    at.to[rank] = team.window[rank] + team.layout.low_latency + call.layout.region(team.rank, 0);
  }
  at.words = call.layout.words;
  at.packets = call.layout.packets;
  at.records = call.layout.records;
  at.turn = &team.state->turn[kSeqLowLatency];
  at.left = &team.state->left;
  at.marks = team.window[team.rank] + team.layout.low_latency_mark;

  call.num_local_experts = core::expert_block(call.num_experts, ranks, team.rank).count;
  call.count_reciprocal = reciprocal(static_cast<unsigned>((call.num_local_experts + 1) / 2), kExpertBits);
  call.smaller_experts = call.num_experts / ranks;
  const unsigned smaller = static_cast<unsigned>(call.smaller_experts);
  call.larger_ranks = call.num_experts % ranks;
  call.larger_experts = call.larger_ranks * static_cast<int>(smaller + 1);
  call.larger_reciprocal = reciprocal(smaller + 1, kExpertBits);
  call.smaller_reciprocal = reciprocal(smaller, kExpertBits);
  call.tokens_per_warp = kLanesOfWarp / call.top_k;
  call.choice_reciprocal = reciprocal(static_cast<unsigned>(call.top_k), kLaneBits);

  const int most_blocks = std::clamp(num_sms > 0 ? num_sms : device_traits().num_sms, 1, kMaxBlocks);
  const int tokens = call.routing.num_tokens, strips = call.cut.strips;
  // Small batches: a row is cut so that every block has one unit. Records belong to one block each, for their flag.
  call.own_form = call.layout.form(call.cut, tokens, call.hook);
  const bool whole_rows = call.own_form == Form::kRecords;
  // Few pieces, but so many that a block has warps for all peers: launches next to each other find SMs of their own.
  const int side_by_side = std::max(all_warps / ranks, 1);
  const int most_pieces = std::min(strips, std::max(kMostPieces, (strips + side_by_side - 1) / side_by_side));
  const int pieces = whole_rows ? 1 : std::clamp(most_blocks / std::max(tokens, 1), 1, most_pieces);
  call.piece_strips = (strips + pieces - 1) / pieces;
  call.pieces = (strips + call.piece_strips - 1) / call.piece_strips;
  call.warps = std::min(call.piece_strips, most_warps);
  // Peers one after the other cost a wait and a row each: where there are warps enough, they are served side by side.
  call.groups = std::clamp(all_warps / call.warps - 1, 1, std::max(ranks - 1, 1));
  call.split = own_apart || 2 * call.warps <= all_warps;
  for (int step = 1; step < ranks; step += call.groups) call.first_steps |= 1u << step;
  call.piece_reciprocal = reciprocal(static_cast<unsigned>(call.pieces), 32);
  const int units = whole_rows ? num_chunks(tokens) : tokens * call.pieces;
  return std::clamp(std::max(units, units_for_peers) + 1, 1, most_blocks);  // and the clerk's
}

}  // namespace anyep::cuda::low_latency
