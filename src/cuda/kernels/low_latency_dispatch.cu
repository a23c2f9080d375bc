// Low-latency dispatch.
//
//   after   slab row e, begin + i == the i-th token, in token order, that source s sends to local expert e, cast as asked;
//           begin = earlier sources' counts; range[e][s] = begin << 32 | count
//   roles   by warp: `warps` senders (x, cast, store to peers), `warps` receivers (places, rows to the slab; before that
//           they count), comm (turn, marks, flags), gate, clerk (choices of this block's tokens, counts and ranges)
//   moves   a row once per rank that hosts a choice, as words, packets or records by the source's number of tokens; own
//           rows from x, cast once more
//   syncs   head, counts and choices as words (pattern G) in every form; rows G or G', records by a flag per chunk (A, B)
//   needs   the same shape, wire format and hook on every rank (the marks' code); see low_latency_frame.cuh
#include <anyep/error.h>

#include "cuda/device/fp8.cuh"
#include "cuda/device/packets.cuh"
#include "cuda/kernels/low_latency_dispatch.h"
#include "cuda/kernels/low_latency_positions.cuh"
#include "cuda/runtime/launch.h"

namespace anyep::cuda::low_latency {
namespace {

/// 2 * 14 + 3 warps: a block of 992 threads.
constexpr int kMostWarps = 14;
constexpr int kServiceWarps = 3;

enum Barrier : int { kTeamBarrier = 1, kStoredBarrier, kTurnForSenders, kTurnForTeam, kGateBarrier };

template <bool kFp8>
using RowStrip = Strip<kFp8 ? 1 : 2, kFp8 ? 4 : 0>;

struct Shared {
  Block block;
  std::int32_t histogram[kMaxExperts];           ///< while sending: tokens so far of every expert
  std::int32_t counts[kMaxExperts + kMaxRanks];  ///< while receiving: [local expert][source]
};

/// Who a warp is.
struct Role {
  int warps;  ///< of senders, of receivers
  int warp;   ///< among its kind
  bool sends, receives, comm, gate, clerk;

  __device__ explicit Role(int per_kind) : warps(per_kind) {
    const int index = warp_index();
    sends = index < warps;
    receives = !sends && index < 2 * warps;
    comm = index == 2 * warps;
    gate = index == 2 * warps + 1;
    clerk = index == 2 * warps + 2;
    warp = sends ? index : receives ? index - warps : 0;
  }
  /// Receivers and clerk.
  __device__ int team_threads() const { return (warps + 1) * kLanes; }
  __device__ int team_warp() const { return clerk ? warps : warp; }
  __device__ int team_thread() const { return team_warp() * kLanes + lane_index(); }
};

/// A strip of x as it lies there.
struct RawStrip {
  uint4 vectors[2];
};

template <bool kFp8>
__device__ __forceinline__ int element_of(int strip, int vector) {
  return strip * kStripElements + (kFp8 ? lane_index() * 16 + vector * 8 : (vector * kLanes + lane_index()) * 8);
}

template <bool kFp8>
__device__ __forceinline__ RawStrip load_x(const DispatchParams& p, int token, int strip) {
  RawStrip raw{};
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    const int element = element_of<kFp8>(strip, v);
    if (element < p.call.hidden) {
      raw.vectors[v] = *reinterpret_cast<const uint4*>(p.x + token * p.x_row_stride + element * 2);
    }
  }
  return raw;
}

/// As it travels: scales are float32 bits on the wire, 0 beyond the row.
template <bool kFp8>
__device__ __forceinline__ RowStrip<kFp8> cast(const DispatchParams& p, const RawStrip& raw, int strip) {
  RowStrip<kFp8> row;
  if constexpr (kFp8) {
    const bool powers = p.round_scale || p.wire == Wire::kUE8M0;
    float stored;
    row.data[0] = cast_to_fp8(raw.vectors[0], raw.vectors[1],
                              powers ? core::ScaleRule::kPowerOfTwo : core::ScaleRule::kExact, stored);
    const bool here = strip * kStripElements + lane_index() / 8 * 128 < p.call.hidden;
    row.scale = here ? core::bits_of(stored) : 0;
  } else {
    row.data[0] = raw.vectors[0];
    row.data[1] = raw.vectors[1];
  }
  return row;
}

// ---- send ----------------------------------------------------------------------------------------------------------

/// Ranks that host a choice of the token, this one and masked ones left out. All lanes.
__device__ __forceinline__ unsigned ranks_of_token(const CallParams& call, const Block& block, int id) {
  const unsigned bit = id >= 0 ? 1u << rank_of(call, id) : 0;
  return __reduce_or_sync(kAllLanes, bit) & ~(block.dead | 1u << call.team.rank);
}

template <bool kFp8>
__device__ __forceinline__ void put_strip(const DispatchParams& p, const Block& block, Form form, unsigned ranks,
                                          int token, int strip, const RowStrip<kFp8>& row) {
  const CallParams& call = p.call;
  for (int step = 1; step < call.team.num_ranks; ++step) {
    const int rank = (call.team.rank + step) % call.team.num_ranks;
    if ((ranks >> rank & 1) == 0) continue;
    std::byte* const region = region_of(call, rank, call.team.rank, block.turn);
    if (form == Form::kWords) {
      store_words(region + call.layout.words + call.cut.row_word(token, strip) * 8, row, block.turn);
    } else if (form == Form::kPackets) {
      store_packets(region + call.layout.packets + call.cut.packet(token, strip) * 16, row, block.turn);
    } else {
      std::byte* const record = region + call.layout.records + call.cut.record(token, 0);
      constexpr int kVectors = kFp8 ? 1 : 2;
      auto* const to = reinterpret_cast<uint4*>(record) + strip * (kVectors * kLanes) + lane_index();
#pragma unroll
      for (int v = 0; v < kVectors; ++v) to[v * kLanes] = row.data[v];
      if (kFp8 && lane_index() % 8 == 0) {
        reinterpret_cast<std::uint32_t*>(record + call.cut.strips * 512)[strip * 4 + lane_index() / 8] = row.scale;
      }
    }
  }
}

__device__ __forceinline__ int id_of_lane(const CallParams& call, int token) {
  return lane_index() < call.top_k ? checked_id(call, raw_id(call, token, lane_index())) : -1;
}

template <bool kFp8>
__device__ inline void send_rows(const DispatchParams& p, const Block& block, const Role& role) {
  const CallParams& call = p.call;
  const int tokens = call.routing.num_tokens, blocks = static_cast<int>(gridDim.x);
  const int index = static_cast<int>(blockIdx.x), strips = call.cut.strips;
  const int chunk = chunk_tokens(tokens);
  // The first strip is on its way before the turn is known. In records a block's first unit is its first chunk.
  const bool in_records = call.layout.form(call.cut, tokens, call.hook) == Form::kRecords;
  const int first_token = in_records ? index * chunk : index / call.pieces;
  const int first_strip = in_records ? role.warp : index % call.pieces * role.warps + role.warp;
  RawStrip raw{};
  int id = -1;
  if (first_token < tokens) {
    id = id_of_lane(call, first_token);
    if (first_strip < strips) raw = load_x<kFp8>(p, first_token, first_strip);
  }
  ptx::barrier_sync(kTurnForSenders, (role.warps + 1) * kLanes);
  if (block.ok == 0) return;
  if (role.warp == 0) STAMP(call, 13);
  const Form form = form_of(call, tokens, block.turn);
  if (form != Form::kRecords) {
    for (int unit = index; unit < tokens * call.pieces; unit += blocks) {
      const int token = unit / call.pieces, strip = unit % call.pieces * role.warps + role.warp;
      if (unit != index) id = id_of_lane(call, token);
      if (strip >= strips) continue;
      if (unit != index) raw = load_x<kFp8>(p, token, strip);
      put_strip<kFp8>(p, block, form, ranks_of_token(call, block, id), token, strip, cast<kFp8>(p, raw, strip));
    }
  } else {
    for (int at = index; at < num_chunks(tokens); at += blocks) {
      for (int token = at * chunk; token < min((at + 1) * chunk, tokens); ++token) {
        const bool ready = in_records && token == first_token;
        if (!ready) id = id_of_lane(call, token);
        const unsigned ranks = ranks_of_token(call, block, id);
        for (int strip = role.warp; strip < strips; strip += role.warps) {
          if (!ready || strip != first_strip) raw = load_x<kFp8>(p, token, strip);
          put_strip<kFp8>(p, block, form, ranks, token, strip, cast<kFp8>(p, raw, strip));
        }
      }
      ptx::barrier_sync(kStoredBarrier, (role.warps + 1) * kLanes);  // pattern A: all stores before comm's release
    }
  }
  if (is_refresh(block.turn)) {
    refresh(
        call, block, call.cut.table_word(static_cast<unsigned>(tokens), 0),
        [&](int peer) { return peer == call.team.rank ? 0 : num_chunks(tokens); },
        blockIdx.x * static_cast<unsigned>(role.warps * kLanes) + threadIdx.x,
        gridDim.x * static_cast<unsigned>(role.warps * kLanes));
  }
}

/// The comm warp's side of send_rows(): a flag per chunk and peer, when the rows are records.
__device__ inline void release_chunks(const CallParams& call, const Block& block, const Role& role) {
  const int tokens = call.routing.num_tokens, lane = lane_index();
  if (block.ok == 0 || form_of(call, tokens, block.turn) != Form::kRecords) return;
  const bool to_peer = lane < call.team.num_ranks && lane != call.team.rank && (block.dead >> lane & 1) == 0;
  for (int at = static_cast<int>(blockIdx.x); at < num_chunks(tokens); at += static_cast<int>(gridDim.x)) {
    ptx::barrier_sync(kStoredBarrier, (role.warps + 1) * kLanes);
    if (to_peer) {
      publish(flag_in(region_of(call, lane, call.team.rank, block.turn), at), mark_of(call, block.turn));  // pattern A
    }
  }
}

/// Receivers and clerk: counts of all tokens (one block), choices of this block's chunks.
__device__ inline void send_tables(const CallParams& call, Shared& shared, const Role& role) {
  const Block& block = shared.block;
  const int tokens = call.routing.num_tokens, threads = role.team_threads();
  const int chunk = chunk_tokens(tokens), chunks = num_chunks(tokens), blocks = static_cast<int>(gridDim.x);
  const auto clear = [&] {
    for (int i = role.team_thread(); i < call.num_experts; i += threads) shared.histogram[i] = 0;
    ptx::barrier_sync(kTeamBarrier, threads);
  };
  const auto count = [&](int begin, int end, unsigned* strays) {
    count_tokens(call, shared.histogram, begin, end, role.team_warp(), role.warps + 1, strays);
    ptx::barrier_sync(kTeamBarrier, threads);
  };
  const bool counts_all = is_clerk_block();
  int counted = 0;
  unsigned strays = 0;
  clear();
  count(0, counts_all ? tokens : min(static_cast<int>(blockIdx.x) * chunk, tokens), counts_all ? &strays : nullptr);
  if (role.clerk) STAMP(call, 4);
  ptx::barrier_sync(kTurnForTeam, threads + 2 * kLanes);
  if (counts_all) {
    if (block.ok != 0) send_counts(call, block, shared.histogram, role.team_thread(), threads);
    if (strays != 0) atomicAdd(&call.team.state->ids_out_of_range, static_cast<unsigned long long>(strays));
    ptx::barrier_sync(kTeamBarrier, threads);  // read before it is cleared
    clear();
  } else {
    counted = min(static_cast<int>(blockIdx.x) * chunk, tokens);
  }
  for (int at = static_cast<int>(blockIdx.x); at < chunks; at += blocks) {
    const int begin = at * chunk, end = min(begin + chunk, tokens);
    if (counted < begin) count(counted, begin, nullptr);
    if (role.clerk && block.ok != 0) send_choices(call, block, shared.histogram, begin, end);
    if (role.clerk) STAMP(call, 6);
    counted = end;
    if (at + blocks < chunks) ptx::barrier_sync(kTeamBarrier, threads);  // the clerk has added this chunk
  }
}

// ---- receive -------------------------------------------------------------------------------------------------------

/// One look at the counts that `sources` have of a local expert. Returns a source whose count is not there yet, or -1.
__device__ __forceinline__ int read_counts_of(const CallParams& call, const Block& block, unsigned sources, int expert,
                                              std::uint32_t (&values)[kMaxRanks]) {
  std::uint64_t words[kMaxRanks];
#pragma unroll
  for (int source = 0; source < kMaxRanks; ++source) {
    if ((sources >> source & 1) == 0) continue;
    words[source] = protocol::Shared(word_in(call, region_of(call, call.team.rank, source, block.turn),
                                             1 + static_cast<unsigned>(expert)))
                        .load(protocol::kRelaxed);
  }
  int missing = -1;
#pragma unroll
  for (int source = 0; source < kMaxRanks; ++source) {
    if ((sources >> source & 1) == 0) continue;
    values[source] = protocol::count_value(words[source]);
    if (protocol::count_epoch(words[source]) != block.turn) missing = source;
  }
  return missing;
}

/// Receivers and clerk: every source's count of every local expert.
__device__ inline void read_counts(const CallParams& call, Shared& shared, const Role& role) {
  Block& block = shared.block;
  const int ranks = call.team.num_ranks, me = call.team.rank;
  for (int expert = role.team_thread(); expert < call.num_local_experts; expert += role.team_threads()) {
    unsigned open = block.present;
    std::uint32_t values[kMaxRanks] = {};
    while (open != 0) {
      int missing = me;
      const bool all = await(call, block, missing, kWaitInReceive, [&] {
        missing = read_counts_of(call, block, open, expert, values);
        return missing < 0;
      });
      if (all || missing < 0) break;
      open &= ~(1u << missing);  // masked, or this block is broken
      values[missing] = 0;
    }
#pragma unroll
    for (int source = 0; source < kMaxRanks; ++source) {
      if (source >= ranks) break;
      const std::uint32_t most = static_cast<std::uint32_t>(block.tokens[source]);
      shared.counts[expert * ranks + source] = static_cast<std::int32_t>(min(values[source], most));
    }
  }
  ptx::barrier_sync(kTeamBarrier, role.team_threads());
}

/// Clerk: counts, ranges, statistics.
__device__ inline void write_ranges(const DispatchParams& p, const Shared& shared) {
  const CallParams& call = p.call;
  const int ranks = call.team.num_ranks;
  for (int expert = lane_index(); expert < call.num_local_experts; expert += kLanes) {
    std::int32_t rows = 0;
    for (int source = 0; source < ranks; ++source) {
      const std::int32_t count = shared.counts[expert * ranks + source];
      p.range[expert * ranks + source] = static_cast<std::int64_t>(rows) << 32 | count;
      rows += count;
    }
    p.counts[expert] = rows;
    if (p.received != nullptr) p.received[expert] += rows;
  }
}

/// One lane's choice of a received token.
struct Target {
  int expert = 0;  ///< local
  int row = -1;    ///< in its slab; -1 = none
};

/// Rows of an expert that come from sources before `source`.
__device__ __forceinline__ int rows_before(const CallParams& call, Block& block, int source, int expert) {
  unsigned open = block.present & ((1u << source) - 1);
  std::uint32_t values[kMaxRanks] = {};
  int missing = 0;
  while (open != 0 && !await(call, block, missing, kWaitInReceive, [&] {
    missing = read_counts_of(call, block, open, expert, values);
    return missing < 0;
  })) {
    if (missing < 0) break;
    open &= ~(1u << missing);  // masked, or this block is broken
  }
  int rows = 0;
#pragma unroll
  for (int earlier = 0; earlier < kMaxRanks; ++earlier) {
    if ((open >> earlier & 1) != 0) rows += min(static_cast<int>(values[earlier]), block.tokens[earlier]);
  }
  return rows;
}

/// Where the choices of token `token` of `source` go; lane k holds choice k. All lanes.
__device__ __forceinline__ Target find_target(const CallParams& call, Block& block, int source, int token) {
  const int lane = lane_index();
  Target target;
  if (lane < call.top_k) {
    std::uint64_t& word = word_in(call, region_of(call, call.team.rank, source, block.turn),
                                  call.cut.table_word(static_cast<unsigned>(token), lane));
    std::uint64_t seen = 0;
    const bool came = await(call, block, source, kWaitInReceive, [&] {
      seen = protocol::Shared(word).load(protocol::kRelaxed);
      return protocol::count_epoch(seen) == block.turn;
    });
    const std::uint32_t value = protocol::count_value(seen);
    const auto expert = static_cast<int>(value >> kPositionBits);
    const auto position = static_cast<int>(value & ((1u << kPositionBits) - 1));
    if (came && value != kNoChoice && expert < call.num_local_experts && position < block.tokens[source]) {
      target.expert = expert;
      target.row = position + rows_before(call, block, source, expert);
    }
  }
  __syncwarp();
  return target;
}

/// Waits for a strip of a peer. False in all lanes: it will not come.
template <bool kFp8>
__device__ __forceinline__ bool take_strip(const CallParams& call, Block& block, Form form, int source, int token,
                                           int strip, RowStrip<kFp8>& row) {
  constexpr int kVectors = kFp8 ? 1 : 2, kScales = kFp8 ? 4 : 0;
  const std::byte* const region = region_of(call, call.team.rank, source, block.turn);
  bool came = true;
  if (form == Form::kWords) {
    const std::byte* const from = region + call.layout.words + call.cut.row_word(token, strip) * 8;
    came = await(call, block, source, kWaitInReceive, [&] { return load_words(from, row, block.turn); });
    came = __all_sync(kAllLanes, came);
  } else if (form == Form::kPackets) {
    const std::byte* const from = region + call.layout.packets + call.cut.packet(token, strip) * 16;
    Packets<kVectors> packets;
    came = await(call, block, source, kWaitInReceive,
                 [&] { return load_packets<kVectors, kScales>(from, packets, block.turn); });
    came = __all_sync(kAllLanes, came);
    unpack(packets, row);
  } else {
    const std::byte* const record = region + call.layout.records + call.cut.record(token, 0);
    const std::byte* const from = record + (strip * (kVectors * kLanes) + lane_index()) * 16;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) row.data[v] = ptx::load_l2(from + v * kLanes * 16);
    if (kFp8) {
      row.scale =
          __ldcg(reinterpret_cast<const std::uint32_t*>(record + call.cut.strips * 512) + strip * 4 + lane_index() / 8);
    }
  }
  return came;
}

/// Stores a strip to the rows of all chosen experts.
template <bool kFp8>
__device__ __forceinline__ void expand(const DispatchParams& p, const Target& target, int token, int strip,
                                       const RowStrip<kFp8>& row) {
  const CallParams& call = p.call;
  constexpr int kVectors = kFp8 ? 1 : 2;
  const std::int64_t slab_rows = static_cast<std::int64_t>(call.team.num_ranks) * call.max_tokens;
  const std::int64_t row_bytes = call.hidden * (kFp8 ? 1 : 2);
  const std::int64_t slab_row = target.expert * slab_rows + target.row;
  std::uint32_t packed = 0;
  if (kFp8 && p.wire == Wire::kUE8M0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) packed |= (from_lane(row.scale, i * 8) >> 23 & 0xFFu) << (8 * i);
  }
  for (unsigned left = __ballot_sync(kAllLanes, target.row >= 0); left != 0; left &= left - 1) {
    const int choice = __ffs(static_cast<int>(left)) - 1;
    const std::int64_t at = from_lane(slab_row, choice);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int element = element_of<kFp8>(strip, v);
      if (element < call.hidden) {
        *reinterpret_cast<uint4*>(p.slab + at * row_bytes + element * (kFp8 ? 1 : 2)) = row.data[v];
      }
    }
    if constexpr (kFp8) {
      std::uint32_t* const scales = p.scales + from_lane(target.expert, choice) * p.scale_expert_stride +
                                    from_lane(target.row, choice) * p.scale_row_stride;
      if (p.wire == Wire::kUE8M0) {
        if (lane_index() == 0) scales[strip * p.scale_column_stride] = packed;
      } else if (lane_index() % 8 == 0 && strip * kStripElements + lane_index() * 16 < call.hidden) {
        scales[(strip * 4 + lane_index() / 8) * p.scale_column_stride] = row.scale;
      }
    }
  }
  if (strip == 0 && target.row >= 0) p.source[slab_row] = token;
}

template <bool kFp8>
__device__ __forceinline__ void receive_strip(const DispatchParams& p, Block& block, Form form, const Target& target,
                                              int source, int token, int strip) {
  RowStrip<kFp8> row;
  if (source == p.call.team.rank) {
    row = cast<kFp8>(p, load_x<kFp8>(p, token, strip), strip);
  } else if (!take_strip<kFp8>(p.call, block, form, source, token, strip, row)) {
    if (block.broken != 0) return;
    row = RowStrip<kFp8>{};  // the peer died in mid-send: zeros where rows were counted
  }
  if (source == p.call.team.rank) STAMP(p.call, 9);
  if (source != p.call.team.rank) STAMP(p.call, 11);
  expand<kFp8>(p, target, token, strip, row);
}

template <bool kFp8>
__device__ inline void receive_share(const DispatchParams& p, Block& block, const Role& role, int share) {
  const CallParams& call = p.call;
  const int ranks = call.team.num_ranks, blocks = static_cast<int>(gridDim.x), strips = call.cut.strips;
  for (int step = 0; step < ranks; ++step) {  // own rows first: they hide the flight of the others
    const int source = (call.team.rank + step) % ranks;
    const int tokens = block.tokens[source];
    const Form form = form_of(call, tokens, block.turn);
    if (form != Form::kRecords) {
      for (int unit = share; unit < tokens * call.pieces; unit += blocks) {
        const int token = unit / call.pieces, strip = unit % call.pieces * role.warps + role.warp;
        if (strip >= strips) continue;
        const Target target = find_target(call, block, source, token);
        if (source == call.team.rank) STAMP(call, 8);
        if (source != call.team.rank) STAMP(call, 10);
        if (__any_sync(kAllLanes, target.row >= 0)) {
          receive_strip<kFp8>(p, block, form, target, source, token, strip);
        }
      }
      continue;
    }
    const int chunk = chunk_tokens(tokens);
    for (int at = share; at < num_chunks(tokens); at += blocks) {
      bool flagged = source == call.team.rank;
      for (int token = at * chunk; token < min((at + 1) * chunk, tokens); ++token) {
        const Target target = find_target(call, block, source, token);
        if (!__any_sync(kAllLanes, target.row >= 0)) continue;
        if (!flagged) {
          bool came = true;
          if (lane_index() == 0) came = await_flag(call, block, source, at);
          flagged = true;
          if (!__all_sync(kAllLanes, came) && block.broken != 0) break;  // pattern B: lane 0's acquire covers the warp
        }
        for (int strip = role.warp; strip < strips; strip += role.warps) {
          receive_strip<kFp8>(p, block, form, target, source, token, strip);
        }
      }
    }
  }
}

template <bool kFp8>
__global__ void __launch_bounds__((2 * kMostWarps + kServiceWarps) * kLanes, 1)
    dispatch_kernel(const __grid_constant__ DispatchParams p) {
  __shared__ Shared shared;
  ptx::grid_dependency_wait();  // in this order: at most one launch waits ahead
  ptx::grid_dependents_launch();
  const CallParams& call = p.call;
  const Role role(call.warps);
  Block& block = shared.block;
  const bool sends = (call.halves & kSend) != 0, receives = (call.halves & kReceive) != 0;
  if (role.sends) {
    if (sends) send_rows<kFp8>(p, block, role);
    return;
  }
  if (role.comm) {
    STAMP(call, 0);
    start(call, block);
    STAMP(call, 1);
    if (sends) ptx::barrier_arrive(kTurnForSenders, (role.warps + 1) * kLanes);
    ptx::barrier_arrive(kTurnForTeam, role.team_threads() + 2 * kLanes);
    if (!sends) return;
    release_chunks(call, block, role);
    if (is_clerk_block()) release_marks(call, block);
    STAMP(call, 15);
    return;
  }
  if (role.gate) {
    ptx::barrier_sync(kTurnForTeam, role.team_threads() + 2 * kLanes);
    if (lane_index() == 0) pass_gate(call, block);
    __syncwarp();
    STAMP(call, 2);
    if (!receives) return;
    if (block.go != 0) await_heads(call, block);
    STAMP(call, 3);
    ptx::barrier_arrive(kGateBarrier, role.team_threads() + kLanes);
    return;
  }
  if (sends) {
    send_tables(call, shared, role);
  } else {
    ptx::barrier_sync(kTurnForTeam, role.team_threads() + 2 * kLanes);
  }
  if (!receives) return;
  ptx::barrier_sync(kGateBarrier, role.team_threads() + kLanes);
  if (block.go == 0) return;
  STAMP(call, 7);
  for_each_share(block, [&](int share) {
    if (role.receives) receive_share<kFp8>(p, block, role, share);
    if (share == static_cast<int>(gridDim.x) - 1) {
      read_counts(call, shared, role);
      if (role.clerk && block.broken == 0) write_ranges(p, shared);
    }
  });
  if (role.warp == 0 && role.receives) STAMP(call, 12);
  if (role.clerk) STAMP(call, 16);
}

const Kernel<DispatchParams> kDispatchBf16(dispatch_kernel<false>, "low_latency::dispatch_kernel<bf16>");
const Kernel<DispatchParams> kDispatchFp8(dispatch_kernel<true>, "low_latency::dispatch_kernel<fp8>");

}  // namespace

void launch_dispatch(const DispatchParams& params, int num_sms, bool early, cudaStream_t stream) {
  DispatchParams p = params;
  const bool fp8 = p.wire != Wire::kBF16;
  p.call.cut = dispatch_cut(p.call.hidden, fp8, core::expert_block(p.call.num_experts, p.call.team.num_ranks, 0).count,
                            p.call.top_k, p.call.max_tokens);
  const int blocks = complete(p.call, num_sms, 1, kMostWarps);
  LaunchShape shape;
  shape.blocks = static_cast<unsigned>(blocks);
  shape.threads = static_cast<unsigned>((2 * p.call.warps + kServiceWarps) * kLanes);
  shape.stream = stream;
  shape.early = early;
  (fp8 ? kDispatchFp8 : kDispatchBf16)(shape, p);
}

}  // namespace anyep::cuda::low_latency
