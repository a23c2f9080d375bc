// The frame of a low-latency launch: its turn, the marks, the gate between sending and waiting, the heads, the refresh.
//
//   turn     one sequence for both ops; turn mod 4 picks the region. A send half takes the next one
//   mark     in every turn, off the path, one per peer: "I have taken all turns before the last one". A sender of turn n
//            has acquired the peers' marks of turn n-2, hence may write what they took in turn n-4 (four regions:
//            models/low_latency_regions.py). Nothing else gives regions back
//   head     word 0 of a region: {epoch, code of the call (16), number of tokens (16)}; the first thing a receiver wants
//   gate     a block waits for peers only once all blocks of its launch have started, hence will send whatever happens
//            (sending waits for no peer's running launch). If they do not start soon, since others hold the SMs, the
//            block retreats: it ends, and the block that starts last serves in its place. So no launch needs all its
//            blocks resident, and none holds an SM for long in vain
//   refresh  words and packets are compared with their epoch for equality. In four turns out of 2^31 (one per region)
//            rows travel as records and the sender clears every word, packet and flag that it does not write in that
//            turn; so nothing that lies there is ever 2^31 turns old
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
  std::uint32_t turn, launch;
  std::uint32_t dead;              ///< masked ranks, bits, as the block found them
  std::uint32_t present;           ///< sources that take part in this turn
  std::int32_t tokens[kMaxRanks];  ///< of each source; 0 = none, or absent
  Form form[kMaxRanks];            ///< of each source's rows
  std::byte* to[kMaxRanks];        ///< this rank's region at each rank, this turn
  std::byte* from[kMaxRanks];      ///< each rank's region here, this turn
  int ok;                          ///< 0: leave, publish nothing
  int broken;                      ///< a wait of this block has failed: a record tells why
  int gate;                        ///< 0 = nobody knows yet, 1 = open: wait and receive, 2 = this block retreats
  int num_extra;                   ///< blocks that have retreated, in whose place this one serves
  std::uint32_t extra[kMaxBlocks / 32];
};

/// A block looks so often whether the others of its launch have started, some 20 us: many times the skew of a launch on an
/// idle GPU. Not in time: the clock is slow to read.
inline constexpr int kGatePolls = 40;

__device__ __forceinline__ std::uint32_t previous_epoch(std::uint32_t epoch) {
  return epoch == protocol::next_epoch(0xFFFF'FFFFu) ? 0xFFFF'FFFFu : epoch - 1;
}
/// The block that sends heads, counts and marks; where the caller allows it, it has no rows of its own.
__device__ __forceinline__ bool is_clerk_block() {
  return blockIdx.x == gridDim.x - 1;
}
/// One turn per region, twice in 2^32.
__device__ __forceinline__ bool is_refresh(std::uint32_t turn) {
  const std::uint32_t in_half = turn & 0x7FFF'FFFFu;
  return in_half >= 4 && in_half < 4 + kRegions;
}

// ---- addresses -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ std::byte* region_of(const CallParams& call, int holder, int source, std::uint32_t turn) {
  return call.team.window[holder] + call.team.layout.low_latency + call.layout.region(source, turn);
}
__device__ __forceinline__ std::uint64_t& word_in(const CallParams& call, std::byte* region, std::uint64_t index) {
  return reinterpret_cast<std::uint64_t*>(region + call.layout.words)[index];
}
__device__ __forceinline__ std::uint64_t& flag_in(std::byte* region, int chunk) {
  return *reinterpret_cast<std::uint64_t*>(region + chunk * kFlagBytes);
}
__device__ __forceinline__ std::uint64_t mark_of(const CallParams& call, std::uint32_t turn) {
  return protocol::make_mark(call.team.generation, turn, call.team.code);
}
__device__ __forceinline__ Form form_of(const CallParams& call, int tokens, std::uint32_t turn) {
  return call.layout.form(call.cut, tokens, call.hook || is_refresh(turn));
}

/// A number below twice the number of ranks as a rank: steps go around from this rank, so that ranks do not all meet at one.
__device__ __forceinline__ int around(const CallParams& call, int rank) {
  return rank < call.team.num_ranks ? rank : rank - call.team.num_ranks;
}

// ---- routing -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ std::int64_t raw_id(const CallParams& call, int token, int choice) {
  const RoutingParams& routing = call.routing;
  const std::int64_t at = token * routing.token_stride + choice * routing.choice_stride;
  return routing.wide_ids ? static_cast<const std::int64_t*>(routing.experts)[at]
                          : static_cast<const std::int32_t*>(routing.experts)[at];
}
__device__ __forceinline__ int checked_id(const CallParams& call, std::int64_t raw) {
  return raw >= 0 && raw < call.num_experts ? static_cast<int>(raw) : -1;
}
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
  int first_strip, end_strip;  ///< of the warp with number `warp`, in steps of call.warps
};
__device__ __forceinline__ int num_items(const CallParams& call, bool in_records, int tokens) {
  return in_records ? num_chunks(tokens) : tokens * call.pieces;
}
__device__ __forceinline__ Item item_of(const CallParams& call, bool in_records, int tokens, int index, int warp) {
  if (in_records) {
    const int each = chunk_tokens(tokens);
    return {index * each, min((index + 1) * each, tokens), warp, call.cut.strips};
  }
  const Unit unit = unit_of(call, index);
  const int first_strip = unit.piece * call.warps;
  return {unit.token, unit.token + 1, first_strip + warp, min(first_strip + call.warps, call.cut.strips)};
}

/// The rank of an expert, without a division.
__device__ __forceinline__ int rank_of(const CallParams& call, int expert) {
  int rank = 0;
#pragma unroll
  for (int i = 1; i < kMaxRanks; ++i) rank += expert >= call.first_expert[i];
  return rank;
}

// ---- waits ---------------------------------------------------------------------------------------------------------

/// The slow side of every wait here: shall it go on? Masks a silent peer where masks are allowed, else leaves a record.
static __device__ __noinline__ bool look(const CallParams& call, Block& block, int peer, WaitPhase phase,
                                         std::uint64_t& start_ns) {
  if (*static_cast<volatile int*>(&block.broken) != 0) return false;
  if (start_ns == 0) start_ns = protocol::now_ns();
  const protocol::Who who{peer, phase};
  const protocol::Waiter waiter = make_waiter(call.team, start_ns);
  const std::uint64_t mine = mark_of(call, block.turn);
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
  *static_cast<volatile int*>(&block.broken) = 1;
  protocol::give_up(waiter, who, mine, seen, ended);
  return false;
}

/// One thread waits until ready() holds. False: the peer is masked, or the block is broken. ready() may change `peer`.
template <class Ready>
[[nodiscard]] __device__ __forceinline__ bool await(const CallParams& call, Block& block, const int& peer,
                                                    WaitPhase phase, Ready&& ready) {
  std::uint64_t start_ns = 0;
  return protocol::wait_ready(ready, [&] { return look(call, block, peer, phase, start_ns); });
}

/// One thread waits for a flag of this turn. Compared for equality: four regions cannot be ahead. Pattern B'.
[[nodiscard]] __device__ __forceinline__ bool await_flag(const CallParams& call, Block& block, int source, int chunk) {
  std::uint64_t& flag = flag_in(block.from[source], chunk);
  const std::uint64_t wanted = mark_of(call, block.turn);
  return await(call, block, source, kWaitInReceive,
               [&] { return protocol::Shared(flag).load(protocol::kAcquire) == wanted; });
}

static __device__ __noinline__ void refuse(const CallParams& call, Block& block, int peer, std::uint64_t expected,
                                           std::uint64_t seen, protocol::Ended ended) {
  *static_cast<volatile int*>(&block.broken) = 1;
  protocol::give_up(make_waiter(call.team, protocol::now_ns()), {peer, kWaitInReceive}, expected, seen, ended);
}

// ---- start ---------------------------------------------------------------------------------------------------------

/// One warp finds the turn and, before it is sent in, the marks that allow it. Others read `block` behind a barrier.
__device__ inline void start(const CallParams& call, Block& block) {
  const Team& team = call.team;
  const int lane = lane_index();
  const bool is_peer = lane < team.num_ranks && lane != team.rank;
  const bool sends = (call.halves & kSend) != 0;
  // All loads are on their way before the first is needed.
  std::uint32_t turn = team.state->turn[kSeqLowLatency];
  const std::uint32_t launch = call.progress->launches;
  const std::uint32_t left = protocol::Shared(team.state->left).load(protocol::kRelaxed);
  const std::uint32_t code = call.progress->code[lane % kRegions];
  std::uint64_t& word = word_of(team, team.rank, team.layout.low_latency_mark, is_peer ? lane : team.rank);
  const std::uint64_t mark = protocol::Shared(word).load(protocol::kAcquire);  // pattern F, litmus slot-reuse-cta
  const bool dead =
      is_peer && team.masked != nullptr && protocol::Shared(team.masked[lane]).load(protocol::kRelaxed) != 0;
  if (sends) {
    turn = protocol::next_epoch(turn);
  } else if (call.turns_back != 0) {
    turn = previous_epoch(turn);
  }
  if (lane < team.num_ranks) {
    block.to[lane] = region_of(call, lane, team.rank, turn);
    block.from[lane] = region_of(call, team.rank, lane, turn);
  }
  if (lane == 0) {
    block.turn = turn;
    block.launch = launch;
    block.broken = 0;
    block.num_extra = 0;
    block.present = 0;
    block.gate = 0;
  }
  __syncwarp();
  bool ok = left == 0, masked_now = dead;
  const std::uint32_t before_last = previous_epoch(previous_epoch(turn));
  const std::uint32_t its_code = __shfl_sync(kAllLanes, code, static_cast<int>(before_last % kRegions));
  if (sends && launch >= 2 && ok && is_peer && !dead) {
    const std::uint64_t wanted =
        protocol::make_mark(team.generation, before_last, static_cast<std::uint16_t>(its_code));
    std::uint64_t seen = mark;
    if (!protocol::reached(seen, wanted)) {
      const bool came = await(call, block, lane, kWaitBeforeSend, [&] {
        seen = protocol::Shared(word).load(protocol::kAcquire);
        return protocol::reached(seen, wanted);
      });
      masked_now = !came;
      ok = came || *static_cast<volatile int*>(&block.broken) == 0;
    }
    if (ok && !masked_now && protocol::contradicts(seen, wanted)) {
      refuse(call, block, lane, wanted, seen, protocol::Ended::kMismatch);
      ok = false;
    }
  }
  ok = __all_sync(kAllLanes, ok);
  const unsigned dead_bits = __ballot_sync(kAllLanes, masked_now);
  if (lane == 0) {
    block.ok = ok ? 1 : 0;
    block.dead = dead_bits;
  }
  __syncwarp();
}

/// One warp of one block, in every turn, before or beside the rows: what this rank's kernels have read in earlier turns
/// lies before it in stream order.
__device__ inline void release_marks(const CallParams& call, const Block& block) {
  const int lane = lane_index();
  if (block.ok == 0 || lane >= call.team.num_ranks || lane == call.team.rank || (block.dead >> lane & 1) != 0) return;
  publish(word_of(call.team, lane, call.team.layout.low_latency_mark, call.team.rank),
          mark_of(call, block.turn));  // pattern F
}

/// The comm warp of one block, as soon as the turn is known: tells every peer that it has begun. Pattern G.
__device__ __forceinline__ void send_heads(const CallParams& call, const Block& block) {
  const int peer = lane_index();
  if (block.ok == 0 || peer >= call.team.num_ranks || peer == call.team.rank || (block.dead >> peer & 1) != 0) return;
  const auto tokens = static_cast<std::uint32_t>(call.routing.num_tokens);
  protocol::put_count(word_in(call, block.to[peer], 0), block.turn,
                      static_cast<std::uint32_t>(call.team.code) << 16 | tokens);
}

// ---- gate ----------------------------------------------------------------------------------------------------------

/// The block that starts last: the turn is taken, and the next launch finds its counters at zero.
__device__ inline void take_turn(const CallParams& call, Block& block, std::uint32_t num_retreated) {
  Progress& progress = *call.progress;
  const std::uint32_t parity = block.launch & 1;
  progress.gate[parity ^ 1] = 0;
  progress.launches = block.launch + 1 == 0 ? 2 : block.launch + 1;  // below 2 there are no marks yet
  progress.code[block.turn % kRegions] = call.team.code;
  call.team.state->turn[kSeqLowLatency] = block.turn;
  block.num_extra = static_cast<int>(num_retreated);
  if (num_retreated == 0) return;
  for (int i = 0; i < kMaxBlocks / 32; ++i) block.extra[i] = 0;
  for (std::uint32_t seen = 0; seen < num_retreated;) {  // they are about to leave their bits
    for (int i = 0; i < kMaxBlocks / 32; ++i) {
      const std::uint32_t bits = atomicExch(&progress.retreated[parity][i], 0);
      block.extra[i] |= bits;
      seen += static_cast<std::uint32_t>(__popc(bits));
    }
  }
}

/// One thread, after start(). False: this block retreats.
__device__ inline bool pass_gate(const CallParams& call, Block& block) {
  if (block.ok == 0) return false;
  if ((call.halves & kSend) == 0) {  // what this launch waits for was sent by launches that wait for nobody
    return true;
  }
  const std::uint32_t parity = block.launch & 1;
  std::uint32_t* const gate = &call.progress->gate[parity];
  // Relaxed: nothing is published here. The block has read the counters that the last one overwrites, since the barrier in
  // front of this carried what it read. (An acquire-release waits for the rows that the block is just storing.)
  const std::uint32_t before = atomicAdd(gate, 1);
  if ((before & 0xFFFF) + 1 == gridDim.x) {
    take_turn(call, block, before >> 16);
    return true;
  }
  if ((call.halves & kReceive) == 0) return true;
  const auto is_open = [&] { return (*static_cast<volatile std::uint32_t*>(gate) & 0xFFFF) == gridDim.x; };
  for (int polls = 0; !is_open(); ++polls) {
    if (polls < kGatePolls) continue;
    if ((atomicAdd(gate, 1u << 16) & 0xFFFF) == gridDim.x) break;  // the last one has not counted this one: it stays
    atomicOr(&call.progress->retreated[parity][blockIdx.x / 32], 1u << blockIdx.x % 32);
    return false;
  }
  return true;
}

/// The comm warp, after start(): passes the gate and tells the block.
__device__ inline void open_gate(const CallParams& call, Block& block) {
  if (lane_index() == 0) {
    const bool open = pass_gate(call, block);
    __threadfence_block();  // num_extra first
    *static_cast<volatile int*>(&block.gate) = open ? 1 : 2;
  }
  __syncwarp();
}
__device__ __forceinline__ int gate_of(const Block& block) {
  return *static_cast<const volatile int*>(&block.gate);
}
/// Another warp, after what it does meanwhile. The gate's own wait has a limit.
__device__ __forceinline__ bool gate_opens(const Block& block) {
  while (gate_of(block) == 0) {
  }
  __syncwarp();
  return gate_of(block) == 1;
}

/// Calls serve(share) for this block's share of the receiving, then for those of blocks that have retreated. One call site:
/// what is inlined there is large.
template <class Serve>
__device__ __forceinline__ void for_each_share(const Block& block, Serve&& serve) {
  const int others = block.num_extra == 0 ? 0 : static_cast<int>(gridDim.x);
#pragma unroll 1
  for (int i = -1; i < others; ++i) {
    const int share = i < 0 ? static_cast<int>(blockIdx.x) : i;
    if (i < 0 || (block.extra[i / 32] >> (i % 32) & 1) != 0) serve(share);
  }
}

// ---- heads ---------------------------------------------------------------------------------------------------------

/// With masks, blocks must not differ in whether a source takes part: the first one to know decides.
__device__ inline bool agree_on(const CallParams& call, const Block& block, int source, bool present) {
  auto* const at = reinterpret_cast<unsigned long long*>(&call.progress->verdict[source]);
  const unsigned long long mine = static_cast<unsigned long long>(block.turn) << 32 | (present ? 1u : 2u);
  for (unsigned long long seen = *static_cast<volatile unsigned long long*>(at);;) {
    if (static_cast<std::uint32_t>(seen >> 32) == block.turn) return (seen & 1) != 0;
    const unsigned long long before = atomicCAS(at, seen, mine);
    if (before == seen) return present;
    seen = before;
  }
}

/// One warp: every source's number of tokens, its form and whether it takes part, for the block. Looks while the gate is
/// still shut, and leaves when the block retreats: then nobody uses what is found.
__device__ inline void await_heads(const CallParams& call, Block& block) {
  const int source = lane_index();
  const Team& team = call.team;
  bool present = false;
  std::uint32_t tokens = 0;
  if (source == team.rank) {
    present = true;
    tokens = static_cast<std::uint32_t>(call.routing.num_tokens);
  } else if (source < team.num_ranks) {
    const bool counts_time = call.waited != nullptr && is_clerk_block();
    const std::uint64_t from_ns = counts_time ? protocol::now_ns() : 0;
    std::uint64_t& word = word_in(call, block.from[source], 0);
    std::uint64_t seen = 0;
    const auto there = [&] {
      seen = protocol::Shared(word).load(protocol::kRelaxed);
      return protocol::count_epoch(seen) == block.turn;
    };
    if ((block.dead >> source & 1) == 0) {
      present = await(call, block, source, kWaitInReceive, [&] { return there() || gate_of(block) == 2; }) &&
                gate_of(block) != 2;
    }
    if (gate_of(block) != 2 && team.masked != nullptr && *static_cast<volatile int*>(&block.broken) == 0) {
      present = agree_on(call, block, source, present) && there();
    }
    if (present) {
      const std::uint32_t value = protocol::count_value(seen);
      tokens = value & 0xFFFF;
      if (value >> 16 != team.code) {
        refuse(call, block, source, mark_of(call, block.turn),
               protocol::make_mark(team.generation, block.turn, static_cast<std::uint16_t>(value >> 16)),
               protocol::Ended::kMismatch);
        present = false;
      } else if (tokens > static_cast<std::uint32_t>(call.max_tokens)) {
        refuse(call, block, source, static_cast<std::uint64_t>(call.max_tokens), tokens, protocol::Ended::kTooMany);
        present = false;
      }
    }
    if (!present) tokens = 0;
    if (counts_time) call.waited[source] += protocol::now_ns() - from_ns;
  }
  if (source < kMaxRanks) {
    block.tokens[source] = static_cast<std::int32_t>(tokens);
    block.form[source] = form_of(call, static_cast<int>(tokens), block.turn);
  }
  const unsigned all = __ballot_sync(kAllLanes, present);
  if (source == 0) block.present = all;
  __syncwarp();
}

/// A lane's look ahead at what `source` says about `token`, while the gate is still shut: waits until the head is there and,
/// if the source has that token, word_is_there() too. False: it has not, is masked, or this block retreats.
template <class WordIsThere>
__device__ __forceinline__ bool look_ahead(const CallParams& call, Block& block, int source, int token,
                                           WordIsThere&& word_is_there) {
  if ((block.dead >> source & 1) != 0) return false;
  bool found = false;
  std::uint64_t& head = word_in(call, block.from[source], 0);
  const bool came = await(call, block, source, kWaitInReceive, [&] {
    int tokens = call.routing.num_tokens;
    if (source != call.team.rank) {
      const std::uint64_t seen = protocol::Shared(head).load(protocol::kRelaxed);
      if (protocol::count_epoch(seen) != block.turn) return gate_of(block) == 2;
      tokens = static_cast<int>(protocol::count_value(seen) & 0xFFFF);
    }
    if (token >= tokens) return true;
    found = word_is_there();
    return found || gate_of(block) == 2;
  });
  return came && found;
}

// ---- refresh -------------------------------------------------------------------------------------------------------

/// In a refresh turn, by all of `workers` threads: clears, at every rank, what this rank does not write in this turn.
/// `first_word`: the first word beyond head, counts and table; chunks(peer): flags in use there.
template <class Chunks>
__device__ inline void refresh(const CallParams& call, const Block& block, std::uint64_t first_word, Chunks&& chunks,
                               std::uint32_t worker, std::uint32_t workers) {
  if (block.ok == 0) return;
#pragma unroll 1
  for (int peer = 0; peer < call.team.num_ranks; ++peer) {
    if ((block.dead >> peer & 1) != 0) continue;
    std::byte* const region = block.to[peer];
    for (std::uint64_t i = first_word + worker; i < call.layout.num_words; i += workers) {
      protocol::Shared(word_in(call, region, i)).store(0, protocol::kRelaxed);
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
