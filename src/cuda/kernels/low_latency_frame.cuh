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
//            needs all its blocks resident, and none holds an SM for long in vain
//   refresh  words and packets are compared with their epoch for equality. In four turns out of 2^31 (one per region)
//            rows travel as records and the sender clears every word, packet and flag that it does not write in that
//            turn; so nothing that lies there is ever 2^31 turns old
//
// At a few tokens an op is as long as its longest chain of instructions, most of them fetched for the first time. Hence:
// warps of different roles find out for themselves what they need, data do not wait for the gate, and what is rarely
// needed is out of line.
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

/// The block that sends heads, counts and marks; where the caller allows it, it has no rows of its own.
__device__ __forceinline__ bool is_clerk_block() {
  return blockIdx.x == gridDim.x - 1;
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
  return *reinterpret_cast<std::uint64_t*>(region + call.at.words + std::uint64_t{index} * 8);
}
__device__ __forceinline__ std::uint64_t& flag_in(std::byte* region, int chunk) {
  return *reinterpret_cast<std::uint64_t*>(region + chunk * kFlagBytes);
}
__device__ __forceinline__ std::uint64_t mark_of(const CallParams& call, const Turn& turn) {
  return protocol::make_mark(call.team.generation, turn.number, call.team.code);
}
/// Of this rank's own rows, going out or coming home.
__device__ __forceinline__ Form own_form(const CallParams& call, const Turn& turn) {
  return is_refresh(turn.number) ? Form::kRecords : call.own_form;
}

/// A number below twice the number of ranks as a rank: steps go around from this rank, so that ranks do not all meet at one.
__device__ __forceinline__ int around(const CallParams& call, int rank) {
  return rank < call.team.num_ranks ? rank : rank - call.team.num_ranks;
}

// ---- routing -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ std::int64_t raw_id(const CallParams& call, int token, int choice) {
  const int at = token * call.top_k + choice;
  return call.routing.wide_ids ? static_cast<const std::int64_t*>(call.routing.experts)[at]
                               : static_cast<const std::int32_t*>(call.routing.experts)[at];
}
__device__ __forceinline__ int checked_id(const CallParams& call, std::int64_t raw) {
  return raw >= 0 && raw < call.num_experts ? static_cast<int>(raw) : -1;
}
/// The expert that this lane's choice of a token names, or -1.
__device__ __forceinline__ int id_of_lane(const CallParams& call, int token) {
  return lane_index() < call.top_k ? checked_id(call, raw_id(call, token, lane_index())) : -1;
}
/// The rank of an expert.
__device__ __forceinline__ int rank_of(const CallParams& call, int expert) {
  const int beyond = expert - call.larger_experts;
  return beyond < 0
             ? static_cast<int>(static_cast<unsigned>(expert) * call.larger_reciprocal >> kExpertBits)
             : call.larger_ranks + static_cast<int>(static_cast<unsigned>(beyond) * call.smaller_reciprocal >> kExpertBits);
}

/// Choices of several tokens or sources in the lanes of a warp: lane i holds choice i % top_k of number i / top_k.
struct LaneOfChoices {
  int number, choice;

  __device__ explicit LaneOfChoices(const CallParams& call)
      : number(static_cast<int>(static_cast<unsigned>(lane_index()) * call.choice_reciprocal >> kLaneBits)),
        choice(lane_index() - number * call.top_k) {}
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
  const int first_strip = unit.piece * call.warps;
  return {unit.token, unit.token + 1, first_strip, min(first_strip + call.warps, call.cut.strips)};
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

/// One thread waits for a flag of this turn. Compared for equality: four regions cannot be ahead. Pattern B'.
[[nodiscard]] __device__ __forceinline__ bool await_flag(const CallParams& call, Block& block, const Turn& turn,
                                                         int source, int chunk) {
  std::uint64_t& flag = flag_in(region_from(call, turn, source), chunk);
  const std::uint64_t wanted = mark_of(call, turn);
  return await(call, block, turn, source, kWaitInReceive,
               [&] { return protocol::Shared(flag).load(protocol::kAcquire) == wanted; });
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
  ptx::grid_dependency_wait();  // in this order: at most one launch waits ahead
  ptx::grid_dependents_launch();
  if (call.team.masked != nullptr) [[unlikely]] find_dead(call, block);
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
  const std::uint64_t wanted = protocol::make_mark(
      call.team.generation, protocol::previous_epoch(protocol::previous_epoch(turn)), 0);
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
  const std::uint64_t wanted = protocol::make_mark(
      call.team.generation, protocol::previous_epoch(protocol::previous_epoch(turn.number)), 0);
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
  protocol::put_count(word_in(call, region_to(call, turn, peer), 0), turn.number,
                      static_cast<std::uint32_t>(call.team.code) << 16 |
                          static_cast<std::uint32_t>(own_form(call, turn)) << kTokenBits |
                          static_cast<std::uint32_t>(call.routing.num_tokens));
}

// ---- gate ----------------------------------------------------------------------------------------------------------

/// The block that starts last: the turn is taken, and the next launch finds its counters at zero.
__device__ inline void take_turn(const CallParams& call, Block& block, const Turn& turn, std::uint32_t num_retreated) {
  Progress& progress = *call.progress;
  const std::uint32_t parity = turn.number & 1;
  progress.gate[parity ^ 1] = 0;
  call.team.state->turn[kSeqLowLatency] = turn.number;
  if (num_retreated == 0) return;
  for (int i = 0; i < kMaxBlocks / 32; ++i) block.extra[i] = 0;
  for (std::uint32_t seen = 0; seen < num_retreated;) {  // they are about to leave their bits
    for (int i = 0; i < kMaxBlocks / 32; ++i) {
      const std::uint32_t bits = atomicExch(&progress.retreated[parity][i], 0);
      block.extra[i] |= bits;
      seen += static_cast<std::uint32_t>(__popc(bits));
    }
  }
  block.num_extra = static_cast<int>(num_retreated);
}

/// One thread of a launch that sends, when all warps of its block have read the turn: counts the block. Relaxed: nothing is
/// published here. The block has read the counters that the last one overwrites, since the barrier in front of this carried
/// what it read. (An acquire-release waits for the rows that the block is just storing.)
[[nodiscard]] __device__ __forceinline__ std::uint32_t enter_gate(const CallParams& call, const Turn& turn) {
  return atomicAdd(&call.progress->gate[turn.number & 1], 1);
}

/// The same thread, later. `before`: what enter_gate() said. False: this block retreats.
__device__ inline bool pass_gate(const CallParams& call, Block& block, const Turn& turn, std::uint32_t before) {
  const std::uint32_t parity = turn.number & 1;
  std::uint32_t* const gate = &call.progress->gate[parity];
  if ((before & 0xFFFF) + 1 == gridDim.x) {
    take_turn(call, block, turn, before >> 16);
    return true;
  }
  if ((call.halves & kReceive) == 0) return true;
  const auto is_open = [&] { return (*static_cast<volatile std::uint32_t*>(gate) & 0xFFFF) == gridDim.x; };
  for (int polls = 0; !is_open() && look_at(block.received) == 0; ++polls) {
    if (polls < kGatePolls) continue;
    if ((atomicAdd(gate, 1u << 16) & 0xFFFF) == gridDim.x) break;  // the last one has not counted this one: it stays
    atomicOr(&call.progress->retreated[parity][blockIdx.x / 32], 1u << blockIdx.x % 32);
    return false;
  }
  return true;
}

/// One warp tells the block how the gate is.
__device__ __forceinline__ void tell_gate(Block& block, bool open) {
  __threadfence_block();  // num_extra first
  tell(block.gate, open ? 1 : 2);
}
/// Another warp, before it asks for whom else its block serves; all lanes get one answer. The gate's own wait has a limit.
[[nodiscard]] __device__ __forceinline__ bool gate_opens(const Block& block) {
  int gate = 0;
  while (gate == 0) gate = from_lane(look_at(block.gate), 0);
  __threadfence_block();
  return gate == 1;
}

/// Is this block's own share all that it serves? Mostly known at once: the gate has long opened. All lanes get one answer:
/// lanes that looked at different times would go different ways, and a barrier would count them as two warps.
[[nodiscard]] __device__ __forceinline__ bool serves_alone(const Block& block) {
  const int gate = look_at(block.gate);
  __threadfence_block();  // num_extra was there first
  return from_lane(gate == 1 && look_at(block.num_extra) == 0 ? 1 : 0, 0) != 0;
}
/// Calls serve(share) for the shares of blocks that have retreated, and before for this block's own if `own`. The gate has
/// opened. One call site: what is inlined there is large.
template <class Serve>
__device__ __forceinline__ void for_each_share(const Block& block, bool own, Serve&& serve) {
  const int others = block.num_extra == 0 ? 0 : static_cast<int>(gridDim.x);
#pragma unroll 1
  for (int i = own ? -1 : 0; i < others; ++i) {
    if (i < 0 || (block.extra[i / 32] >> (i % 32) & 1) != 0) serve(i < 0 ? static_cast<int>(blockIdx.x) : i);
  }
}

// ---- heads ---------------------------------------------------------------------------------------------------------

/// With masks, blocks must not differ in whether a source takes part: the first one to know decides.
static __device__ __noinline__ bool agree_on(const CallParams& call, std::uint32_t turn, int source, bool present) {
  auto* const at = reinterpret_cast<unsigned long long*>(&call.progress->verdict[source]);
  const unsigned long long mine = static_cast<unsigned long long>(turn) << 32 | (present ? 1u : 2u);
  for (unsigned long long seen = *static_cast<volatile unsigned long long*>(at);;) {
    if (static_cast<std::uint32_t>(seen >> 32) == turn) return (seen & 1) != 0;
    const unsigned long long before = atomicCAS(at, seen, mine);
    if (before == seen) return present;
    seen = before;
  }
}

/// What a source's head says; it has no tokens where it does not take part.
struct Head {
  bool present = false;
  int tokens = 0;
  Form form = Form::kWords;
};

/// One look at a head: is it there?
__device__ __forceinline__ bool see_head(const CallParams& call, const Turn& turn, int source, std::uint64_t& seen) {
  seen = protocol::Shared(word_in(call, region_from(call, turn, source), 0)).load(protocol::kRelaxed);
  return protocol::count_epoch(seen) == turn.number;
}

/// What a head means that a lane has waited for. `came`: it is there.
__device__ __forceinline__ Head read_head(const CallParams& call, Block& block, const Turn& turn, int source, bool came,
                                          std::uint64_t seen) {
  const bool masks = call.team.masked != nullptr && source != call.team.rank;
  if (masks && look_at(block.broken) == 0 && !retreats(block)) {
    came = agree_on(call, turn.number, source, came) && see_head(call, turn, source, seen);
  }
  if (!came) return {};
  const std::uint32_t value = protocol::count_value(seen);
  if (value >> 16 != call.team.code) {
    refuse(call, block, source, mark_of(call, turn),
           protocol::make_mark(call.team.generation, turn.number, static_cast<std::uint16_t>(value >> 16)),
           protocol::Ended::kMismatch);
    return {};
  }
  const int tokens = tokens_of(value);
  if (tokens > call.max_tokens) {
    refuse(call, block, source, static_cast<std::uint64_t>(call.max_tokens), static_cast<std::uint64_t>(tokens),
           protocol::Ended::kTooMany);
    return {};
  }
  return {true, tokens, static_cast<Form>(value >> kTokenBits & 7)};
}

/// One lane per source: leaves in `block` what is known of it. All lanes; others read it behind a barrier.
__device__ __forceinline__ void keep_head(Block& block, bool mine, int source, const Head& head) {
  if (mine) {
    block.tokens[source] = head.tokens;
    block.form[source] = head.form;
  }
  const unsigned bits = __reduce_or_sync(kAllLanes, mine && head.present ? 1u << source : 0);
  if (lane_index() == 0) block.present |= bits;
  __syncwarp();
}

/// One warp waits for the heads of the sources from `first` steps after this rank on; leaves them in `block`.
__device__ inline void await_heads(const CallParams& call, Block& block, const Turn& turn, int first) {
  const int step = lane_index();
  const bool mine = step >= first && step < call.team.num_ranks;
  const int source = mine ? around(call, call.team.rank + step) : 0;
  Head head;
  if (mine && source == call.team.rank) {
    head = {true, call.routing.num_tokens, own_form(call, turn)};
  } else if (mine) {
    std::uint64_t seen = 0;
    bool came = (block.dead >> source & 1) == 0;
    if (came) {
      came = await(call, block, turn, source, kWaitInReceive,
                   [&] { return see_head(call, turn, source, seen) || retreats(block); }) &&
             protocol::count_epoch(seen) == turn.number;
    }
    head = read_head(call, block, turn, source, came, seen);
  }
  __syncwarp();
  keep_head(block, mine, source, head);
}

/// The clerk block's clerk, where somebody asks how long this rank waits for each of the others: waits for the heads.
static __device__ __noinline__ void time_heads(const CallParams& call, Block& block, const Turn turn) {
  const int source = lane_index();
  if (source >= call.team.num_ranks || source == call.team.rank || (block.dead >> source & 1) != 0) return;
  const std::uint64_t from_ns = protocol::now_ns();
  std::uint64_t seen = 0;
  (void)await(call, block, turn, source, kWaitInReceive,
              [&] { return see_head(call, turn, source, seen) || retreats(block); });
  call.waited[source] += protocol::now_ns() - from_ns;
}

// ---- refresh -------------------------------------------------------------------------------------------------------

/// In a refresh turn, by all of `workers` threads: clears, at `ranks`, what this rank does not write in this turn.
/// `first_word`: the first word beyond head, counts and table; chunks(peer): flags in use there.
template <class Chunks>
__device__ __noinline__ void refresh(const CallParams& call, const Turn& turn, unsigned ranks, std::uint32_t first_word,
                                     Chunks chunks, std::uint32_t worker, std::uint32_t workers) {
#pragma unroll 1
  for (int peer = 0; peer < call.team.num_ranks; ++peer) {
    if ((ranks >> peer & 1) == 0) continue;
    std::byte* const region = region_to(call, turn, peer);
    for (std::uint64_t i = first_word + worker; i < call.layout.num_words; i += workers) {
      protocol::Shared(word_in(call, region, static_cast<std::uint32_t>(i))).store(0, protocol::kRelaxed);
    }
    for (std::uint64_t i = worker; i < call.layout.num_packets; i += workers) {
      ptx::store_packet(region + call.layout.packets + i * 16, 0, 0);
    }
    for (std::uint32_t i = static_cast<std::uint32_t>(chunks(peer)) + worker; i < kMaxChunks; i += workers) {
      protocol::Shared(flag_in(region, static_cast<int>(i))).store(0, protocol::kRelaxed);
    }
  }
}

}  // namespace anyep::cuda::low_latency
