// A low-latency launch: the gate, the heads, the refresh. What they are: low_latency_frame.cuh.
#pragma once

#include <cstdint>

#include "cuda/kernels/low_latency_frame.cuh"

namespace anyep::cuda::low_latency {

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

__device__ __forceinline__ bool is_gate_open(const CallParams& call, const Turn& turn) {
  return (*static_cast<const volatile std::uint32_t*>(&call.progress->gate[turn.number & 1]) & 0xFFFF) == gridDim.x;
}

/// The same thread, soon: the block that starts last opens the gate, another one may find it open. `before`: what
/// enter_gate() said.
[[nodiscard]] __device__ inline bool finds_gate_open(const CallParams& call, Block& block, const Turn& turn,
                                                     std::uint32_t before) {
  if ((before & 0xFFFF) + 1 != gridDim.x) return is_gate_open(call, turn);
  take_turn(call, block, turn, before >> 16);
  return true;
}

/// The same thread, later, if it was not open. False: this block retreats.
[[nodiscard]] __device__ inline bool pass_gate(const CallParams& call, const Block& block, const Turn& turn) {
  if ((call.halves & kReceive) == 0) return true;
  const std::uint32_t parity = turn.number & 1;
  for (int polls = 0; !is_gate_open(call, turn) && look_at(block.received) == 0; ++polls) {
    if (polls < kGatePolls) continue;
    // The last one may not have counted this one: then it stays.
    if ((atomicAdd(&call.progress->gate[parity], 1u << 16) & 0xFFFF) == gridDim.x) break;
    atomicOr(&call.progress->retreated[parity][this_share() / 32], 1u << this_share() % 32);
    return false;
  }
  return true;
}

/// One warp tells the block how the gate is.
__device__ __forceinline__ void tell_gate(Block& block, bool open) {
  ptx::fence_block();  // num_extra first
  tell(block.gate, open ? 1 : 2);
}
/// Another warp, before it asks for whom else its block serves; all lanes get one answer. The gate's own wait has a limit.
[[nodiscard]] __device__ __forceinline__ bool gate_opens(const Block& block) {
  int gate = 0;
  while (gate == 0) gate = from_lane(look_at(block.gate), 0);
  ptx::fence_block();  // num_extra was there first
  return gate == 1;
}

/// Is this block's own share all that it serves? Mostly known at once: the gate has long opened. All lanes get one answer:
/// lanes that looked at different times would go different ways, and a barrier would count them as two warps.
[[nodiscard]] __device__ __forceinline__ bool serves_alone(const Block& block) {
  const int gate = look_at(block.gate);
  ptx::fence_block();  // num_extra was there first
  return from_lane(gate == 1 && look_at(block.num_extra) == 0 ? 1 : 0, 0) != 0;
}
/// Calls serve(share) for the shares of blocks that have retreated; the gate has opened. `own`: for this block's own share before,
/// for which it need not have. One call site: what is inlined there is large.
template <class Serve>
__device__ __forceinline__ void for_each_share(const Block& block, bool own, Serve&& serve) {
  const auto all = [&] { return block.num_extra == 0 ? 0 : static_cast<int>(gridDim.x); };
  int others = own ? 0 : all();
#pragma unroll 1
  for (int i = own ? -1 : 0; i < others; ++i) {
    if (i < 0 || (block.extra[i / 32] >> (i % 32) & 1) != 0) serve(i < 0 ? this_share() : i);
    if (i < 0 && !serves_alone(block) && gate_opens(block)) others = all();
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

__device__ __forceinline__ Head head_of(std::uint64_t seen) {
  const std::uint32_t value = protocol::count_value(seen);
  return {true, tokens_of(value), form_of(value)};
}

/// read_head() where masks are allowed, or something is wrong.
static __device__ __noinline__ Head judge_head(const CallParams& call, Block& block, const Turn turn, int source,
                                               bool came, std::uint64_t seen) {
  const bool masks = call.team.masked != nullptr && source != call.team.rank;
  if (masks && look_at(block.broken) == 0 && !retreats(block)) {
    came = agree_on(call, turn.number, source, came) && see_head(call, turn, source, seen);
  }
  if (!came) return {};
  const auto code = static_cast<std::uint16_t>(protocol::count_value(seen) >> 16);
  const Head head = head_of(seen);
  if (code != call.team.code) {
    refuse(call, block, source, mark_of(call, turn), protocol::make_mark(call.team.generation, turn.number, code),
           protocol::Ended::kMismatch);
    return {};
  }
  if (head.tokens > call.max_tokens) {
    refuse(call, block, source, static_cast<std::uint64_t>(call.max_tokens), static_cast<std::uint64_t>(head.tokens),
           protocol::Ended::kTooMany);
    return {};
  }
  return head;
}

/// What a head means that a lane has waited for. `came`: it is there.
__device__ __forceinline__ Head read_head(const CallParams& call, Block& block, const Turn& turn, int source, bool came,
                                          std::uint64_t seen) {
  const Head head = head_of(seen);
  const bool plain = came & (call.team.masked == nullptr) & (head.tokens <= call.max_tokens) &
                     (protocol::count_value(seen) >> 16 == call.team.code);
  if (plain) [[likely]]
    return head;
  return judge_head(call, block, turn, source, came, seen);
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

/// Waits for the head of a source so many steps below this rank; a lane each.
__device__ __forceinline__ Head await_head(const CallParams& call, Block& block, const Turn& turn, int step) {
  const int source = rank_below(call, step);
  if (source == call.team.rank) return {true, call.routing.num_tokens, own_form(call, turn)};
  std::uint64_t seen = 0;
  bool came = (block.dead >> source & 1) == 0;
  if (came) {
    came = await(call, block, turn, source, kWaitInReceive,
                 [&] { return see_head(call, turn, source, seen) || retreats(block); }) &&
           protocol::count_epoch(seen) == turn.number;
  }
  return read_head(call, block, turn, source, came, seen);
}

/// One warp waits for the heads of the sources from `first` steps below this rank on; leaves them in `block`.
__device__ inline void await_heads(const CallParams& call, Block& block, const Turn& turn, int first) {
  const int step = lane_index();
  const bool mine = step >= first && step < call.team.num_ranks;
  Head head;
  if (mine) head = await_head(call, block, turn, step);
  __syncwarp();
  keep_head(block, mine, mine ? rank_below(call, step) : 0, head);
}

/// The clerk block's clerk, where somebody asks how long this rank waits for each of the others: waits for the heads.
static __device__ __noinline__ void time_heads(const CallParams& call, Block& block, const Turn turn) {
  const int source = lane_index();
  if (source < call.team.num_ranks && source != call.team.rank && (block.dead >> source & 1) == 0) {
    const std::uint64_t from_ns = protocol::now_ns();
    std::uint64_t seen = 0;
    (void)await(call, block, turn, source, kWaitInReceive,
                [&] { return see_head(call, turn, source, seen) || retreats(block); });
    call.waited[source] += protocol::now_ns() - from_ns;
  }
  __syncwarp();
}

// ---- refresh -------------------------------------------------------------------------------------------------------

/// In a refresh turn, by all of `workers` threads: clears, at `ranks`, the flags that this rank does not write in this turn.
/// chunks(peer): flags in use there.
template <class Chunks>
__device__ __noinline__ void refresh_flags(const CallParams& call, const Turn& turn, unsigned ranks, Chunks chunks,
                                           std::uint32_t worker, std::uint32_t workers) {
#pragma unroll 1
  for (int peer = 0; peer < call.team.num_ranks; ++peer) {
    if ((ranks >> peer & 1) == 0) continue;
    std::byte* const region = region_to(call, turn, peer);
    for (std::uint32_t i = static_cast<std::uint32_t>(chunks(peer)) + worker; i < kMaxChunks; i += workers) {
      protocol::Shared(flag_in(region, static_cast<int>(i))).store(0, protocol::kRelaxed);
    }
  }
}

/// Likewise words and packets. `first_word`: the first one beyond head, counts and table.
static __device__ __noinline__ void refresh(const CallParams& call, const Turn& turn, unsigned ranks,
                                            std::uint32_t first_word, std::uint32_t worker, std::uint32_t workers) {
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
  }
}

}  // namespace anyep::cuda::low_latency
