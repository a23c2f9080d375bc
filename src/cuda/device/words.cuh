// The frame of every op: its turn, its waits for words of peers, its end. Words themselves: src/protocol.
//
// A thread whose wait has failed has left a record; it publishes nothing more, drains its bulk copies and goes to the
// end of the op, where its block stops counting. So no word of that turn or a later one follows a failure.
#pragma once

#include <cstdint>

#include "cuda/device/ptx.cuh"
#include "cuda/kernels/team.h"
#include "protocol/wait.h"
#include "protocol/word.h"

namespace anyep::cuda {

/// One op as its blocks see it.
struct Turn {
  std::uint32_t number;            ///< of the op's sequence
  std::uint64_t mark;              ///< of its words
  mutable std::uint64_t start_ns;  ///< limits count from here; 0: from the first wait that does not end at once
  bool left;                       ///< an earlier op of this rank has failed: leave at once
};

__device__ inline void read_turn(const Team& team, Sequence sequence, Turn& turn) {
  turn.number = protocol::next_epoch(team.state->turn[sequence]);
  turn.mark = protocol::make_mark(team.generation, turn.number, team.code);
  turn.left = protocol::Shared(team.state->left).load(protocol::kRelaxed) != 0;
}

/// All threads of the block, each its own Turn; a barrier. False: leave at once. Advances nothing: end_turn() does.
[[nodiscard]] __device__ inline bool begin_turn(const Team& team, Sequence sequence, Turn& turn) {
  read_turn(team, sequence, turn);
  turn.start_ns = protocol::now_ns();
  return __syncthreads_or(threadIdx.x == 0 && turn.left ? 1 : 0) == 0;
}

/// All threads of the block, for a Turn in shared memory, where it costs no registers: the last thread fills it. A barrier
/// must follow before anybody looks; then, if `left`, leave at once.
__device__ inline void open_turn(const Team& team, Sequence sequence, Turn& turn) {
  if (threadIdx.x != blockDim.x - 1) return;
  turn.start_ns = 0;  // the clock is slow to read, and most ops wait for nothing
  read_turn(team, sequence, turn);
}

/// The word of the pair (holder, index) in `holder`'s window.
__device__ __forceinline__ std::uint64_t& word_of(const Team& team, int holder, std::uint64_t array, int index) {
  return *reinterpret_cast<std::uint64_t*>(team.window[holder] + team.layout.word(array, index));
}

__device__ inline protocol::Waiter make_waiter(const Team& team, std::uint64_t start_ns) {
  protocol::Waiter waiter;
  waiter.abort = team.abort;
  waiter.left = &team.state->left;
  waiter.record = team.record;
  waiter.op = team.op;
  waiter.start_ns = start_ns;
  waiter.limit_ns = team.limit_ns;
  waiter.announced = team.announced;
  waiter.announced_stride = team.announced_stride;
  waiter.announcement = team.announcement;
  waiter.gone = team.gone;
  waiter.masked = team.masked;
  return waiter;
}

/// When the op started to wait. `turn` in shared memory, or with a start.
static __device__ __noinline__ std::uint64_t start_of(const Turn& turn) {
  if (turn.start_ns != 0) return turn.start_ns;
  const unsigned long long now = protocol::now_ns();
  const unsigned long long before = atomicCAS(reinterpret_cast<unsigned long long*>(&turn.start_ns), 0ull, now);
  return before != 0 ? before : now;
}

/// Out of line: what a wait looks at must not take registers from the loops around it.
static __device__ __noinline__ bool wait_in_turn(const Team& team, const protocol::Who who, const Turn& turn,
                                                 std::uint64_t* word, std::uint64_t mark) {
  return protocol::wait(make_waiter(team, start_of(turn)), who, *word, mark) == protocol::Ended::kReached;
}

/// One thread waits until a peer's word has reached `mark`. False: leave, a record tells why.
[[nodiscard]] __device__ __forceinline__ bool reach(const Team& team, const Turn& turn, int peer, WaitPhase phase,
                                                    std::uint64_t& word, std::uint64_t mark) {
  const std::uint64_t seen = protocol::Shared(word).load(protocol::kAcquire);  // mostly there: one acquire (pattern B)
  if (protocol::reached(seen, mark) && !protocol::contradicts(seen, mark)) return true;
  return wait_in_turn(team, {peer, phase}, turn, &word, mark);
}

/// One thread says that `mark` holds. What its block did before is covered when a barrier of all that did it came before
/// (patterns A, F, I', D').
__device__ __forceinline__ void publish(std::uint64_t& word, std::uint64_t mark) {
  protocol::Shared(word).store(mark, protocol::kRelease);
}

/// Leaves a record about a value that no correct peer, or no correct call, can have given. Always false.
static __device__ __noinline__ bool give_up_on(const Team& team, const protocol::Who who, const Turn& turn,
                                               std::uint64_t most, std::uint64_t seen) {
  protocol::give_up(make_waiter(team, start_of(turn)), who, most, seen, protocol::Ended::kTooMany);
  return false;
}

/// One thread of a kernel that was launched early: waits until the notify of number `wanted`, before its end, has made this op's
/// places.
[[nodiscard]] static __device__ __noinline__ bool wait_for_places(const Team& team, const Turn& turn,
                                                                  std::uint64_t wanted) {
  State& state = *team.state;
  const auto there = [wanted](std::uint64_t seen) { return seen >= wanted; };
  return protocol::wait_until(make_waiter(team, start_of(turn)), {team.rank, kWaitBeforeSend}, state.places_made,
                              wanted, there) == protocol::Ended::kReached;
}

/// One thread of a launch that takes several turns: waits until its other blocks have ended this one.
[[nodiscard]] static __device__ __noinline__ bool wait_for_further_turn(const Team& team, std::uint64_t wanted) {
  const auto there = [wanted](std::uint64_t seen) { return seen >= wanted; };
  return protocol::wait_until(make_waiter(team, protocol::now_ns()), {team.rank, kWaitAfterFlag},
                              team.state->further_turns, wanted, there) == protocol::Ended::kReached;
}

/// All threads of the block, at the end. True in the block that comes last, if no thread of this op has failed: all that
/// any block did lies before (pattern D, litmus last-arriver).
[[nodiscard]] __device__ inline bool last_to_finish(const Team& team, Sequence sequence, bool failed) {
  __shared__ bool last;
  if (__syncthreads_or(failed ? 1 : 0) != 0) return false;
  if (threadIdx.x == 0) {
    last = ptx::atom_add_acq_rel_gpu(&team.state->finished[sequence], 1) == gridDim.x - 1;
  }
  __syncthreads();  // the acquire above covers the block's threads too
  return last;
}

/// One thread of the last block: the next op may draw tickets. notify draws none, and leaves them alone: the dispatch behind
/// it may have begun to draw.
__device__ inline void leave_turn(const Team& team, Sequence sequence) {
  State& state = *team.state;
  for (std::uint32_t& ticket : state.ticket) {
    if (sequence != kSeqNotify) ticket = 0;
  }
  state.finished[sequence] = 0;
}

/// One thread of the last block: the op is over.
__device__ inline void end_turn(const Team& team, Sequence sequence, const Turn& turn) {
  leave_turn(team, sequence);
  team.state->turn[sequence] = turn.number;
}

/// Ascending, each number once. Relaxed, since a ticket orders nothing.
__device__ __forceinline__ std::uint32_t draw_ticket(const Team& team, int pile, std::uint32_t count = 1) {
  return atomicAdd(&team.state->ticket[pile], count);
}

/// A warp's tickets, drawn one step before they are needed. A number at or beyond the end of the work means that there is
/// no more.
class Tickets {
 public:
  __device__ Tickets(const Team& team, int pile) : team_(team), pile_(pile) {}

  /// The first draw. `count` numbers at once, since nothing hides its latency: next() gives the first of them.
  __device__ void start(std::uint32_t count) {
    if (threadIdx.x % 32 == 0) drawn_ = draw_ticket(team_, pile_, count);
  }

  /// All lanes.
  __device__ std::uint32_t next() {
    const std::uint32_t ticket = __shfl_sync(0xFFFF'FFFFu, drawn_, 0);
    start(1);
    return ticket;
  }

 private:
  const Team& team_;
  const int pile_;
  std::uint32_t drawn_ = 0;
};

}  // namespace anyep::cuda
