#include "cuda/kernels/low_latency.h"

#include <algorithm>
#include <climits>

#include "cuda/runtime/launch.h"

namespace anyep::cuda::low_latency {
namespace {

/// Blocks for peers that bring more tokens than this rank: nobody knows their number when the launch is made.
constexpr int kBlocksForPeers = 32;

}  // namespace

int complete(CallParams& call, int num_sms, int least_warps, int most_warps) {
  const int ranks = call.team.num_ranks;
  for (int rank = 0; rank <= kMaxRanks; ++rank) {
    call.first_expert[rank] = rank <= ranks ? core::expert_block(call.num_experts, ranks, rank).first : INT_MAX;
  }
  call.first_expert[ranks] = call.num_experts;
  call.num_local_experts = core::expert_block(call.num_experts, ranks, call.team.rank).count;
  call.tokens_per_warp = 32 / call.top_k;
  const int most_blocks = std::clamp(num_sms > 0 ? num_sms : device_traits().num_sms, 1, kMaxBlocks);
  const int tokens = call.routing.num_tokens, strips = call.cut.strips;
  // Small batches: a row is cut so that every block has one unit. Records belong to one block each, for their flag.
  const bool whole_rows = call.hook || tokens > kMostPacketTokens;
  const int pieces = whole_rows ? 1 : std::clamp(most_blocks / std::max(tokens, 1), 1, strips);
  call.warps = std::clamp((strips + pieces - 1) / pieces, std::min(least_warps, strips), most_warps);
  call.pieces = (strips + call.warps - 1) / call.warps;
  call.piece_reciprocal = static_cast<std::uint32_t>((std::uint64_t{1} << 32) / static_cast<unsigned>(call.pieces) + 1);
  const int units = whole_rows ? num_chunks(tokens) : tokens * call.pieces;
  return std::clamp(std::max(units, std::min(call.max_tokens, kBlocksForPeers)) + 1, 1,
                    most_blocks);  // and the clerk's
}

}  // namespace anyep::cuda::low_latency
