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

/// Counters of one rank in its own GPU memory, zero at the start; beside State, whose turn[kSeqLowLatency] counts turns.
/// Used by one launch at a time.
struct Progress {
  std::uint32_t launches;  ///< launches with a send half so far
  std::uint32_t gate[2];   ///< by launches mod 2: blocks that have started (16), that retreated (16)
  std::uint32_t retreated[2][kMaxBlocks / 32];  ///< their bits
  std::uint32_t code[kRegions];                 ///< of this rank's marks, by turn mod 4
  std::uint64_t verdict[kMaxRanks];             ///< with masks: {turn, 1 = present, 2 = absent} of a source
};

/// Halves of an op; both in one launch when nobody waits between them.
enum Half : int { kSend = 1, kReceive = 2 };

/// This rank's routing, as the caller has it; out-of-range ids count as -1.
struct RoutingParams {
  const void* experts = nullptr;  ///< [num_tokens, top_k] int32 or int64
  bool wide_ids = true;
  std::int64_t token_stride = 0, choice_stride = 0;  ///< in elements
  const float* weights = nullptr;                    ///< combine: [num_tokens, top_k]
  std::int64_t weight_token_stride = 0, weight_choice_stride = 0;
  int num_tokens = 0;
};

/// The part of Params that both ops have.
struct CallParams {
  Team team;
  Progress* progress = nullptr;
  Layout layout;  ///< Layout::make(team.layout.low_latency_bytes, num_ranks)
  int halves = kSend | kReceive;
  /// Receive half alone: sends of this rank that were put into the stream behind the one that it belongs to, 0 or 1.
  int turns_back = 0;
  /// Rows travel as records whatever the batch (equal on every rank): a hook's send half, whose data nobody waits for yet.
  bool hook = false;
  int num_experts = 0, top_k = 0;
  std::int64_t hidden = 0;
  int max_tokens = 0;
  RoutingParams routing;
  unsigned long long* waited = nullptr;  ///< [ranks] nanoseconds waited for each source are added; or null
  // Filled by the launch functions.
  Cut cut;
  int first_expert[kMaxRanks + 1] = {};  ///< of each rank's block
  int num_local_experts = 0;             ///< of this rank
  int warps = 1;                         ///< that share a row, per role
  int pieces = 1;                        ///< units of `warps` strips in a row
  std::uint32_t piece_reciprocal = 0;    ///< 2^32 / pieces, rounded up
  int tokens_per_warp = 1;               ///< whose choices fit the lanes of a warp
};

/// Fills what every launch derives; returns the number of blocks.
int complete(CallParams& call, int num_sms, int least_warps, int most_warps);

}  // namespace anyep::cuda::low_latency
