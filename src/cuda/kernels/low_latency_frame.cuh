// The frame of a low-latency launch: its turn, the marks, the gate, the heads, the refresh.
//
//   turn     one sequence for both ops; turn mod 4 picks the region. A send half takes the next one
//   mark     in every turn, off the path, one per peer: "I have taken all turns before the last one". Whoever sends in turn
//            n has acquired the peers' marks of turn n-2, hence may write what they took in turn n-4 (four regions:
//            models/low_latency_regions.py). Nothing else gives regions back
//   head     word 0 of a region: {epoch, code of the call (16), form of the rows (3), number of tokens (13)}
//   gate     counts the blocks of a launch that have started; the last one takes the turn. A block that waits for peers
//            while others of its launch find no SM retreats after a while: it ends, and the block that starts last serves
//            in its place. What it has sent stays sent, what it has received is received again, bit for bit. So no launch
//            needs all its blocks resident, none holds an SM for long in vain, and what a block does for itself need not
//            wait for the gate
//   refresh  words and packets are compared with their epoch for equality. In four turns out of 2^31 (one per region)
//            rows travel as records and the sender clears every word, packet and flag that it does not write in that
//            turn; so nothing that lies there is ever 2^31 turns old
//
// At a few tokens an op is as long as its longest chain of trips to L2 and of the instructions in between. Hence: warps of
// different roles find out for themselves what they need, data do not wait for the gate, and what is rarely needed is out
// of line.
#pragma once

#include <cstdint>

#include "cuda/device/warp.cuh"
#include "cuda/device/words.cuh"
#include "cuda/kernels/low_latency.h"
#include "protocol/counts.h"
#include "protocol/ready.h"

namespace anyep::cuda::low_latency {

/// What the warps of a block share.
struct Block {
  std::uint32_t dead;              ///< masked ranks, bits, as the block found them
  std::uint32_t present;           ///< sources that take part in this turn
  std::int32_t tokens[kMaxRanks];  ///< of each source; 0 = none, or absent
  Form form[kMaxRanks];            ///< of each source's rows
  unsigned touched;                ///< what touch() returned
  int broken;                      ///< a wait of this block has failed: a record tells why, nothing more is published
  int gate;                        ///< 0 = nobody knows yet, 1 = all blocks have started, 2 = this block retreats
  int received;                    ///< 1 = this block needs no gate any more
  int num_extra;                   ///< blocks that have retreated, in whose place this one serves
  std::uint32_t extra[kMaxBlocks / 32];
};

/// A block looks so often whether the others of its launch have started, some 20 us: many times the skew of a launch on an
/// idle GPU. Not in time: the clock is slow to read.
inline constexpr int kGatePolls = 40;

/// A launch's turn, as each warp finds it: asking another warp would take longer than the load.
struct Turn {
  std::uint32_t number;
  std::uint64_t phase;  ///< offset of its regions
};

/// Which part of the work is this block's. The last one is the clerk block's, of which all others hear: it is the block that starts
/// first.
__device__ __forceinline__ int this_share() {
  return static_cast<int>(gridDim.x - 1 - blockIdx.x);
}
/// The block that sends heads, counts and marks; where the caller allows it, it has no rows of its own.
__device__ __forceinline__ bool is_clerk_block() {
  return blockIdx.x == 0;
}
/// One turn per region, twice in 2^32.
__device__ __forceinline__ bool is_refresh(std::uint32_t turn) {
  const std::uint32_t in_half = turn & 0x7FFF'FFFFu;
  return in_half >= 4 && in_half < 4 + kRegions;
}
/// Form and number of tokens in a head.
inline constexpr int kTokenBits = 13;
static_assert(kMaxTokens < 1 << kTokenBits);
__device__ __forceinline__ int tokens_of(std::uint64_t head) {
  return static_cast<int>(head & ((1u << kTokenBits) - 1));
}

__device__ __forceinline__ Form form_of(std::uint64_t head) {
  return static_cast<Form>(head >> kTokenBits & 7);
}

/// Of a barrier that all warps of the block come to.
__device__ __forceinline__ int all_threads() {
  return static_cast<int>(blockDim.x);
}

/// A value that warps of a block look at without a barrier.
__device__ __forceinline__ int look_at(const int& shared) {
  return *static_cast<const volatile int*>(&shared);
}
__device__ __forceinline__ void tell(int& shared, int value) {
  *static_cast<volatile int*>(&shared) = value;
}
__device__ __forceinline__ bool retreats(const Block& block) {
  return look_at(block.gate) == 2;
}
/// The same answer for all lanes.
__device__ __forceinline__ bool any_lane(bool value) {
  return __any_sync(kAllLanes, value) != 0;
}

// ---- addresses -----------------------------------------------------------------------------------------------------

/// Offset of a word in a region.
__device__ __forceinline__ std::uint64_t word_at(const CallParams& call, std::uint32_t index) {
  return call.at.words + std::uint64_t{index} * 8;
}
/// This rank's region at `rank`.
__device__ __forceinline__ std::byte* region_to(const CallParams& call, const Turn& turn, int rank) {
  return call.at.to[rank] + turn.phase;
}
/// The region of `source` here.
__device__ __forceinline__ std::byte* region_from(const CallParams& call, const Turn& turn, int source) {
  return call.at.from + turn.phase + static_cast<unsigned>(source) * call.at.source_bytes;
}
__device__ __forceinline__ std::uint64_t& word_in(const CallParams& call, std::byte* region, std::uint32_t index) {
  return *reinterpret_cast<std::uint64_t*>(region + word_at(call, index));
}
__device__ __forceinline__ std::uint64_t& flag_in(std::byte* region, int chunk) {
  return *reinterpret_cast<std::uint64_t*>(region + chunk * kFlagBytes);
}
__device__ __forceinline__ std::uint64_t mark_of(const CallParams& call, const Turn& turn) {
  return protocol::make_mark(call.team.generation, turn.number, call.team.code);
}
/// The mark with which a peer gives back what it took in turn n-4: who sends in turn n waits for it.
__device__ __forceinline__ std::uint64_t wanted_mark(const CallParams& call, std::uint32_t turn) {
  return protocol::make_mark(call.team.generation, protocol::previous_epoch(protocol::previous_epoch(turn)), 0);
}
/// Of this rank's own rows, going out or coming home.
__device__ __forceinline__ Form own_form(const CallParams& call, const Turn& turn) {
  return is_refresh(turn.number) ? Form::kRecords : call.own_form;
}

/// This rank's head, without its epoch.
__device__ __forceinline__ std::uint32_t own_head(const CallParams& call, const Turn& turn) {
  return static_cast<std::uint32_t>(call.team.code) << 16 |
         static_cast<std::uint32_t>(own_form(call, turn)) << kTokenBits |
         static_cast<std::uint32_t>(call.routing.num_tokens);
}

/// A number below twice the number of ranks as a rank.
__device__ __forceinline__ int around(const CallParams& call, int rank) {
  return rank < call.team.num_ranks ? rank : rank - call.team.num_ranks;
}
/// Steps go around from this rank, so that ranks do not all meet at one: it sends upwards, and what comes first comes from the
/// rank below.
__device__ __forceinline__ int rank_above(const CallParams& call, int step) {
  return around(call, call.team.rank + step);
}
__device__ __forceinline__ int rank_below(const CallParams& call, int step) {
  return around(call, call.team.rank + call.team.num_ranks - step);
}
/// Steps whose peers a group of warps serves, bits: every call.groups-th from 1 + group on.
__device__ __forceinline__ unsigned steps_of(const CallParams& call, int group) {
  return call.first_steps << group & ((1u << call.team.num_ranks) - 1);
}

// ---- routing -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ std::int64_t raw_id(const void* experts, bool wide, int at) {
  return wide ? static_cast<const std::int64_t*>(experts)[at] : static_cast<const std::int32_t*>(experts)[at];
}
__device__ __forceinline__ std::int64_t raw_id(const CallParams& call, int token, int choice) {
  return raw_id(call.routing.experts, call.routing.wide_ids, token * call.top_k + choice);
}
__device__ __forceinline__ int checked_id(int num_experts, std::int64_t raw) {
  return static_cast<std::uint64_t>(raw) < static_cast<unsigned>(num_experts) ? static_cast<int>(raw) : -1;
}
__device__ __forceinline__ int checked_id(const CallParams& call, std::int64_t raw) {
  return checked_id(call.num_experts, raw);
}
/// The expert that this lane's choice of a token names, or -1.
__device__ __forceinline__ int id_of_lane(const CallParams& call, int token) {
  return lane_index() < call.top_k ? checked_id(call, raw_id(call, token, lane_index())) : -1;
}
/// The rank of an expert.
__device__ __forceinline__ int rank_of(const CallParams& call, int expert) {
  const int beyond = expert - call.larger_experts;
  return beyond < 0 ? static_cast<int>(static_cast<unsigned>(expert) * call.larger_reciprocal >> kExpertBits)
                    : call.larger_ranks +
                          static_cast<int>(static_cast<unsigned>(beyond) * call.smaller_reciprocal >> kExpertBits);
}

/// The first expert of a rank: what core::expert_block() says, without a look at a table.
__device__ __forceinline__ int first_expert(const CallParams& call, int rank) {
  return rank * call.smaller_experts + min(rank, call.larger_ranks);
}

/// Choices of several tokens or sources in the lanes of a warp: lane i holds choice i % top_k of number i / top_k.
struct LaneOfChoices {
  int number, choice;

  __device__ LaneOfChoices(std::uint32_t choice_reciprocal, int top_k)
      : number(static_cast<int>(static_cast<unsigned>(lane_index()) * choice_reciprocal >> kLaneBits)),
        choice(lane_index() - number * top_k) {}
  __device__ explicit LaneOfChoices(const CallParams& call) : LaneOfChoices(call.choice_reciprocal, call.top_k) {}
};

/// What the lanes of a warp ask about at once, top_k lanes each: `each` tokens in a row at every one of some steps.
struct Span {
  int step, token, count, each;
  std::uint32_t reciprocal;  ///< 2^16 / each or a little more: exact for numbers of lanes

  static __device__ __forceinline__ Span chunks(int step, int steps, int first, int each) {
    return {step, first, steps * each, each, (1u << 16) / static_cast<unsigned>(each) + 1};
  }
  /// A token at several steps.
  static __device__ __forceinline__ Span steps(int first, int end, int token) {
    return chunks(first, end - first, token, 1);
  }
  /// Tokens at one step.
  static __device__ __forceinline__ Span tokens(int step, int first, int end) {
    return {step, first, end - first, kLanes, (1u << 16) / kLanes};
  }
  /// Which of the steps, from 0, a number is at.
  __device__ __forceinline__ int place_of(int number) const {
    return static_cast<int>(static_cast<unsigned>(number) * reciprocal >> 16);
  }
  __device__ __forceinline__ int step_of(int number) const { return step + place_of(number); }
  __device__ __forceinline__ int token_of(int number) const { return token + number - place_of(number) * each; }
};

/// Of a unit of work: token = unit / pieces, by the host's reciprocal; exact, since unit * pieces < 2^32.
struct Unit {
  int token, piece;
};
__device__ __forceinline__ Unit unit_of(const CallParams& call, int unit) {
  if (call.pieces == 1) return {unit, 0};
  const auto token = static_cast<int>(__umulhi(static_cast<unsigned>(unit), call.piece_reciprocal));
  return {token, unit - token * call.pieces};
}
/// What a block does at a time: as words and packets a piece of one token's row, as records a chunk of whole rows.
struct Item {
  int first, end;              ///< tokens
  int first_strip, end_strip;  ///< in steps of call.warps from first_strip + the warp's number
};
__device__ __forceinline__ int num_items(const CallParams& call, bool in_records, int tokens) {
  return in_records ? num_chunks(tokens) : tokens * call.pieces;
}
__device__ __forceinline__ Item item_of(const CallParams& call, bool in_records, int tokens, int index) {
  if (in_records) {
    const int each = chunk_tokens(tokens);
    return {index * each, min((index + 1) * each, tokens), 0, call.cut.strips};
  }
  const Unit unit = unit_of(call, index);
  const int first_strip = unit.piece * call.piece_strips;
  return {unit.token, unit.token + 1, first_strip, min(first_strip + call.piece_strips, call.cut.strips)};
}

/// The share's first item while it is not known who has how many tokens.
__device__ __forceinline__ Item first_item(const CallParams& call) {
  return item_of(call, false, 0, this_share());
}

// ---- waits ---------------------------------------------------------------------------------------------------------

/// The slow side of every wait here: shall it go on? Masks a silent peer where masks are allowed, else leaves a record.
static __device__ __noinline__ bool look(const CallParams& call, Block& block, std::uint32_t turn, int peer,
                                         WaitPhase phase, std::uint64_t& start_ns) {
  if (look_at(block.broken) != 0) return false;
  if (start_ns == 0) start_ns = protocol::now_ns();
  const protocol::Who who{peer, phase};
  const protocol::Waiter waiter = make_waiter(call.team, start_ns);
  const std::uint64_t mine = protocol::make_mark(call.team.generation, turn, call.team.code);
  const bool masks = call.team.masked != nullptr && peer != call.team.rank;
  protocol::Ended ended = protocol::look_around(waiter, who);
  const std::uint64_t seen =
      protocol::Shared(word_of(call.team, call.team.rank, call.team.layout.low_latency_mark, peer))
          .load(protocol::kRelaxed);
  if (ended == protocol::Ended::kReached && protocol::contradicts(seen, mine)) ended = protocol::Ended::kMismatch;
  if (ended == protocol::Ended::kReached) return true;
  if (ended == protocol::Ended::kMasked) return false;
  if (masks && (ended == protocol::Ended::kTimeout || ended == protocol::Ended::kPeerGone)) {
    protocol::Shared(call.team.masked[peer]).store(1, protocol::kRelaxed);
    return false;
  }
  tell(block.broken, 1);
  protocol::give_up(waiter, who, mine, seen, ended);
  return false;
}

/// One thread waits until ready() holds. False: the peer is masked, or the block is broken. ready() may change `peer`.
///
/// A warp whose lanes have waited each for itself is not together behind this: lanes that are through with a loop need not wait for
/// those that still poll. __syncwarp() comes next, or a vote, before any branch, even one that all lanes take: the compiler opens the
/// branch's convergence barrier for whichever lanes come to it, takes the warp for together behind the first barrier inside, and lets
/// it fall apart where the branch ends. Lanes then vote by themselves, and a block may wait for ever (decision 0019).
template <class Ready>
[[nodiscard]] __device__ __forceinline__ bool await(const CallParams& call, Block& block, const Turn& turn,
                                                    const int& peer, WaitPhase phase, Ready&& ready) {
  std::uint64_t start_ns = 0;
  return protocol::wait_ready(ready, [&] { return look(call, block, turn.number, peer, phase, start_ns); });
}

/// A warp waits until ready(), in which all lanes take part and which says the same in all, holds. Otherwise as await().
template <class Ready>
[[nodiscard]] __device__ __forceinline__ bool await_together(const CallParams& call, Block& block, const Turn& turn,
                                                             int peer, WaitPhase phase, Ready&& ready) {
  std::uint64_t start_ns = 0;
  return protocol::wait_ready(ready, [&] {
    const bool goes_on = lane_index() != 0 || look(call, block, turn.number, peer, phase, start_ns);
    return __all_sync(kAllLanes, goes_on) != 0;
  });
}

/// One thread waits for a flag of this turn, unless its block retreats. Compared for equality: four regions cannot be ahead. Pattern
/// B'.
[[nodiscard]] __device__ __forceinline__ bool await_flag(const CallParams& call, Block& block, const Turn& turn,
                                                         int source, int chunk) {
  std::uint64_t& flag = flag_in(region_from(call, turn, source), chunk);
  const std::uint64_t wanted = mark_of(call, turn);
  bool there = false;
  (void)await(call, block, turn, source, kWaitInReceive, [&] {
    there = protocol::Shared(flag).load(protocol::kAcquire) == wanted;
    return there || retreats(block);
  });
  return there;
}

static __device__ __noinline__ void refuse(const CallParams& call, Block& block, int peer, std::uint64_t expected,
                                           std::uint64_t seen, protocol::Ended ended) {
  tell(block.broken, 1);
  protocol::give_up(make_waiter(call.team, protocol::now_ns()), {peer, kWaitInReceive}, expected, seen, ended);
}

// ---- start ---------------------------------------------------------------------------------------------------------

/// All threads, before anything of an earlier launch is looked at; a barrier must follow.
__device__ __forceinline__ void clear(Block& block) {
  if (threadIdx.x != 0) return;
  block.dead = block.present = 0;
  block.broken = block.gate = block.received = block.num_extra = 0;
}

/// One warp, before enter(): fetches the launch's parameters. A line of the constant bank that nobody has touched yet costs whoever
/// needs it a trip to L2; here nobody waits for it. What it returns has to go somewhere, or the compiler leaves the loads out.
template <class Params>
__device__ __forceinline__ unsigned touch(const Params& params) {
  constexpr unsigned kLine = 64 / sizeof(unsigned);
  const auto* const words = reinterpret_cast<const unsigned*>(&params);
  unsigned all = 0;
#pragma unroll
  for (unsigned i = 0; i < sizeof(Params) / sizeof(unsigned); i += kLine) all ^= words[i];
  return all;
}

/// With masks: who is masked; one warp looks at the host's memory for all.
static __device__ __noinline__ void find_dead(const CallParams& call, Block& block) {
  if (warp_index() == 0) {
    const int lane = lane_index();
    const bool dead = lane < call.team.num_ranks && lane != call.team.rank &&
                      protocol::Shared(call.team.masked[lane]).load(protocol::kRelaxed) != 0;
    const unsigned bits = __ballot_sync(kAllLanes, dead);
    if (lane == 0) block.dead = bits;
  }
  __syncthreads();
}

/// Every thread, when its warp has computed what follows from the parameters alone (where launches overlap, that costs
/// nothing): until the launches in front of this one are over.
__device__ __forceinline__ void enter(const CallParams& call, Block& block) {
  ptx::grid_dependency_wait();
  if (call.team.masked != nullptr) [[unlikely]]
    find_dead(call, block);
}

/// One warp of a block, behind enter(), so that at most one launch waits ahead, and when this launch's rows are on their way, which
/// the next one's start would hold up.
__device__ __forceinline__ void let_next_start() {
  ptx::grid_dependents_launch();
}

__device__ __forceinline__ Turn turn_after(const CallParams& call, std::uint32_t last) {
  std::uint32_t number = last;
  if ((call.halves & kSend) != 0) {
    number = protocol::next_epoch(last);
  } else if (call.turns_back != 0) {
    number = protocol::previous_epoch(last);
  }
  return {number, number % kRegions * call.at.turn_bytes};
}

/// All lanes. For warps that send nothing.
__device__ __forceinline__ Turn find_turn(const CallParams& call) {
  // Loaded, not only asked for, when this returns: whoever comes to a barrier behind it has read it.
  return turn_after(call, from_lane(*call.at.turn, 0));
}

/// The slow side of start(). In the first two turns there are no marks yet.
static __device__ __noinline__ bool await_mark(const CallParams& call, Block& block, std::uint32_t turn, int peer) {
  std::uint64_t& word = *reinterpret_cast<std::uint64_t*>(call.at.marks + peer * kWordBytes);
  if (turn - protocol::kFirstEpoch <= 2 && protocol::Shared(word).load(protocol::kRelaxed) == 0) return true;
  const std::uint64_t wanted = wanted_mark(call, turn);
  return await(call, block, {turn, 0}, peer, kWaitBeforeSend,
               [&] { return protocol::reached(protocol::Shared(word).load(protocol::kAcquire), wanted); });
}

/// What a warp that sends must know, on its way: nothing waits before start(). Acquires the marks, hence comes behind loads
/// that shall not wait for them.
struct Signs {
  std::uint32_t last_turn, left;
  std::uint64_t mark = 0;

  __device__ __forceinline__ Signs(const CallParams& call, const Block& block) {
    const int lane = lane_index();
    last_turn = *call.at.turn;
    left = protocol::Shared(*const_cast<std::uint32_t*>(call.at.left)).load(protocol::kRelaxed);
    if (lane < call.team.num_ranks && lane != call.team.rank && (block.dead >> lane & 1) == 0) {
      mark = protocol::Shared(*reinterpret_cast<std::uint64_t*>(call.at.marks + lane * kWordBytes))
                 .load(protocol::kAcquire);  // pattern F, litmus slot-reuse-cta
    }
  }
};

/// A warp that sends finds its turn and, bits, the ranks that it may send to, this one included: none after a failure. All
/// lanes.
__device__ __forceinline__ Turn start(const CallParams& call, Block& block, const Signs& signs, unsigned& ranks) {
  const int lane = lane_index();
  const Turn turn = turn_after(call, from_lane(signs.last_turn, 0));
  bool may = lane < call.team.num_ranks && (block.dead >> lane & 1) == 0;
  const std::uint64_t wanted = wanted_mark(call, turn.number);
  if (may && lane != call.team.rank && !protocol::reached(signs.mark, wanted)) {
    may = await_mark(call, block, turn.number, lane);
  }
  ranks = __ballot_sync(kAllLanes, may && signs.left == 0);
  if (any_lane(look_at(block.broken) != 0)) ranks = 0;
  return turn;
}

/// One warp of one block, in every turn, before or beside the rows: what this rank's kernels have read in earlier turns
/// lies before it in stream order.
__device__ __forceinline__ void release_marks(const CallParams& call, const Turn& turn, unsigned ranks) {
  const int lane = lane_index();
  if (lane == call.team.rank || (ranks >> lane & 1) == 0) return;
  publish(word_of(call.team, lane, call.team.layout.low_latency_mark, call.team.rank),
          mark_of(call, turn));  // pattern F
}

/// One warp of one block, as soon as the turn is known: tells every peer that it has begun. Pattern G.
__device__ __forceinline__ void send_heads(const CallParams& call, const Turn& turn, unsigned ranks) {
  const int peer = lane_index();
  if (peer == call.team.rank || (ranks >> peer & 1) == 0) return;
  protocol::put_count(word_in(call, region_to(call, turn, peer), 0), turn.number, own_head(call, turn));
}

}  // namespace anyep::cuda::low_latency
