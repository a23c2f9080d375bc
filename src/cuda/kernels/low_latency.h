// What low-latency dispatch and combine share: counters, the part of Params that both need.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/gpu_low_latency.h"
#include "core/routing.h"
#include "cuda/kernels/team.h"

namespace anyep::cuda::low_latency {

/// Most blocks of a launch, whatever the caller allows.
inline constexpr int kMaxBlocks = 256;
/// Pieces of a row, mostly: more of them take longer (decision 0016).
inline constexpr int kMostPieces = 5;
/// Blocks for peers that bring more tokens than this rank: nobody knows their number when the launch is made.
inline constexpr int kBlocksForPeers = 32;

/// Where a row lies among a rank's slabs, as combine wants it: {local expert, row of its slab}; -1 = nowhere. A table of them
/// has top_k entries for every token of every rank, in any order.
inline constexpr int kRowBits = 16;
static_assert(kMaxTokens * kMaxRanks <= 1 << kRowBits && kMaxExperts << kRowBits > 0);

/// Counters of one rank in its own GPU memory, zero at the start; beside State, whose turn[kSeqLowLatency] counts turns.
/// Used by one launch at a time.
struct Progress {
  std::uint32_t gate[2];                        ///< by turn mod 2: blocks that have started (16), that retreated (16)
  std::uint32_t retreated[2][kMaxBlocks / 32];  ///< their bits
  std::uint64_t verdict[kMaxRanks];             ///< with masks: {turn, 1 = present, 2 = absent} of a source
};

/// Halves of an op; both in one launch when nobody waits between them.
enum Half : int { kSend = 1, kReceive = 2 };

/// This rank's routing, dense, as the caller has it; out-of-range ids count as -1.
struct RoutingParams {
  const void* experts = nullptr;   ///< [num_tokens, top_k] int32 or int64
  const float* weights = nullptr;  ///< combine: [num_tokens, top_k]
  bool wide_ids = true;
  int num_tokens = 0;
};

/// Where regions and the frame's words lie, ready to be used: on the way of every row.
struct Addresses {
  std::byte* to[kMaxRanks] = {};                         ///< this rank's region at each rank, of turns 0 mod 4
  std::byte* from = nullptr;                             ///< source 0's region here, likewise
  std::uint64_t source_bytes = 0, turn_bytes = 0;        ///< from one source's region to the next, from one turn's
  std::uint64_t words = 0, packets = 0, records = 0;     ///< offsets in a region
  const std::uint32_t *turn = nullptr, *left = nullptr;  ///< of State
  std::byte* marks = nullptr;                            ///< of the peers, kWordBytes apart
};

/// Divisions in kernels are multiplications by these many bits: of a lane by top_k, of an expert by a block's size.
inline constexpr int kLanesOfWarp = 32, kLaneBits = 16, kExpertBits = 20;

/// The part of Params that both ops have. What every row needs comes first: a line of the constant bank that nobody has
/// touched yet costs a trip to L2.
struct CallParams {
  Addresses at;  ///< filled by the launch functions
  int halves = kSend | kReceive;
  int num_experts = 0, top_k = 0;
  int max_tokens = 0;
  std::int64_t hidden = 0;
  RoutingParams routing;
  // Filled by the launch functions.
  Cut cut;
  Form own_form = Form::kWords;                                 ///< of this rank's rows, but for a refresh
  int warps = 1;                                                ///< that share a row, per role
  int groups = 1;                                               ///< of such warps, among which peers are divided
  bool split = false;                                           ///< the own rows have warps of their own
  int pieces = 1;                                               ///< units that a row is cut into
  int piece_strips = 0;                                         ///< strips of one
  unsigned first_steps = 0;                                     ///< steps of the first group, bits; see steps_of()
  std::uint32_t piece_reciprocal = 0;                           ///< 2^32 / pieces, rounded up
  std::uint32_t choice_reciprocal = 0;                          ///< 2^kLaneBits / top_k, rounded up
  int tokens_per_warp = 1;                                      ///< whose choices fit the lanes of a warp
  int larger_experts = 0;                                       ///< experts of ranks that host one more than the others
  int larger_ranks = 0;                                         ///< those ranks
  int smaller_experts = 0;                                      ///< experts of each of the others
  std::uint32_t larger_reciprocal = 0, smaller_reciprocal = 0;  ///< 2^kExpertBits / experts of such a rank
  int num_local_experts = 0;                                    ///< of this rank
  std::uint32_t count_reciprocal = 0;                           ///< 2^kExpertBits / pairs of counts of a source
  Team team;
  Progress* progress = nullptr;
  Layout layout;  ///< Layout::make(team.layout.low_latency_bytes, num_ranks)
  /// Receive half alone: sends of this rank that were put into the stream behind the one that it belongs to, 0 or 1.
  int turns_back = 0;
  /// Rows travel as records whatever the batch (equal on every rank): a hook's send half, whose data nobody waits for yet.
  bool hook = false;
  unsigned long long* waited = nullptr;  ///< [ranks] nanoseconds waited for each source are added; or null
};

/// Fills what every launch derives; returns the number of blocks. A row has at most `most_warps`, all groups and the own rows'
/// warps together at most `all_warps`, but one group and `own_apart`, where the own rows must have warps of their own.
/// `units_for_peers`: what peers may give it to do.
int complete(CallParams& call, int num_sms, int most_warps, int all_warps, bool own_apart, int units_for_peers);

}  // namespace anyep::cuda::low_latency
