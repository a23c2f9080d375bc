// What every kernel knows of its rank's group. By value in each kernel's Params.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/window.h"
#include "protocol/fault.h"

namespace anyep::cuda {

/// Sequences of turns; each op advances its own, on the device, so that a replayed graph goes on counting.
enum Sequence : int { kSeqNotify, kSeqDispatch, kSeqCombine, kSeqLowLatency, kSeqBarrier, kNumSequences };

/// Where in an op a wait stands, for fault records; the numbers of host::Phase.
enum WaitPhase : std::uint32_t { kWaitBeforeSend, kWaitMidSend, kWaitAfterFlag, kWaitInReceive };

/// Counters of one rank in its own GPU memory. Only its own kernels touch them; ops of one rank follow each other in stream
/// order. Zero but for `turn`, which starts at protocol::kFirstEpoch.
struct State {
  std::uint32_t turn[kNumSequences];  ///< last turn taken; advanced by the last block of an op
  std::uint32_t
      finished[kNumSequences];  ///< blocks of the running op that are through (pattern D); the last one resets it
  std::uint32_t ticket[8];      ///< work drawn from the running op; the last block resets them
  std::uint32_t left;           ///< 1 = a thread of this rank has given up: all leave. Never reset
  unsigned long long ids_out_of_range;  ///< so far
  /// Routes so far that a dispatch may have been launched behind. What tells such a dispatch that its places are there, although
  /// notify has not ended; it knows the number of its route.
  std::uint64_t places_made;
  std::uint64_t further_turns;  ///< ended, of launches that take several
};

struct Team {
  std::byte* window[kMaxRanks] = {};  ///< every rank's window as this GPU addresses it, own included
  WindowLayout layout;
  int rank = 0, num_ranks = 1;
  std::uint16_t generation = 0;
  std::uint16_t code = 0;  ///< of the marks: kind and digest of the call, equal on every rank
  State* state = nullptr;
  // Pinned host memory that kernels may read and write (pattern Q).
  std::uint64_t* abort = nullptr;           ///< nonzero = leave
  std::uint32_t* gone = nullptr;            ///< [ranks]
  std::uint32_t* masked = nullptr;          ///< [ranks]; low latency and barrier only; null = no masks
  protocol::FaultRecord* record = nullptr;  ///< of the engine: the first thread that gives up fills it, and all leave
  std::uint32_t op = 0;                     ///< as the record names this op
  std::uint64_t* announced = nullptr;       ///< as protocol::Waiter has them; null while a graph is captured
  std::uint64_t announced_stride = 0, announcement = 0;
  std::uint64_t limit_ns = 0;
};

}  // namespace anyep::cuda
