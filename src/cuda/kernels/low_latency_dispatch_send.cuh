// Low-latency dispatch, the sender's side: who the warps are, casts, rows to peers, choices and counts.
#pragma once

#include <cstdint>

#include "cuda/device/fp8.cuh"
#include "cuda/device/packets.cuh"
#include "cuda/kernels/low_latency_dispatch.h"
#include "cuda/kernels/low_latency_positions.cuh"

namespace anyep::cuda::low_latency::outward {

constexpr int kServiceWarps = 3;
/// Warps that share a row, per role: blocks of up to 544 threads, which leave each thread more registers, and of 992.
constexpr int kFewWarps = 7, kMostWarps = 14;

enum Barrier : int {
  kTeamBarrier = 1,
  kStoredBarrier,
  kTurnForSenders,
  kTurnForTeam,
  kGateBarrier,
  kTargetBarrier,
  kTurnForHeads
};

template <bool kFp8>
using RowStrip = Strip<kFp8 ? 1 : 2, kFp8 ? 4 : 0>;

/// One lane's choice of a received token.
struct Target {
  std::int64_t row;       ///< of all slabs; -1 = none
  std::int64_t scale_at;  ///< of its first scale, in elements
};

struct Shared {
  Block block;
  std::int32_t histogram[kMaxExperts];           ///< while sending: tokens so far of every expert
  std::int32_t counts[kMaxExperts + kMaxRanks];  ///< while receiving: [local expert][source]
  Target targets[2][kLanes];                     ///< of this unit and the next, found by one warp for all receivers
  Target ahead[kLanes];                          ///< of this block's first unit, likewise, before the gate opens
};

/// Who a warp is.
struct Role {
  int warps;  ///< of senders, of receivers
  int warp;   ///< among its kind
  bool sends, receives, comm, heads, clerk;

  __device__ explicit Role(int per_kind) : warps(per_kind) {
    const int index = warp_index();
    sends = index < warps;
    receives = !sends && index < 2 * warps;
    comm = index == 2 * warps;
    heads = index == 2 * warps + 1;
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

/// Ranks that host a choice of the token, this one left out. All lanes.
__device__ __forceinline__ unsigned ranks_of_token(const CallParams& call, int id) {
  const unsigned bit = id >= 0 ? 1u << rank_of(call, id) : 0;
  return __reduce_or_sync(kAllLanes, bit) & ~(1u << call.team.rank);
}

template <bool kFp8>
__device__ __forceinline__ void put_strip(const DispatchParams& p, const Block& block, Form form, unsigned ranks,
                                          int token, int strip, const RowStrip<kFp8>& row) {
  const CallParams& call = p.call;
#pragma unroll 1
  for (int step = 1; step < call.team.num_ranks; ++step) {
    const int rank = around(call, call.team.rank + step);
    if ((ranks >> rank & 1) == 0) continue;
    std::byte* const region = block.to[rank];
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

template <bool kFp8>
__device__ inline void send_rows(const DispatchParams& p, const Block& block, const Role& role) {
  const CallParams& call = p.call;
  const int tokens = call.routing.num_tokens, index = static_cast<int>(blockIdx.x);
  // The first strip is on its way before the turn is known, from which the form follows; they differ in a refresh only.
  const bool guess = call.layout.form(call.cut, tokens, call.hook) == Form::kRecords;
  const Item ahead = item_of(call, guess, tokens, index, role.warp);
  RowStrip<kFp8> row{};
  unsigned ranks = 0;
  if (ahead.first < tokens) {
    const int id = id_of_lane(call, ahead.first);
    if (ahead.first_strip < ahead.end_strip) {
      row = cast<kFp8>(p, load_x<kFp8>(p, ahead.first, ahead.first_strip), ahead.first_strip);
    }
    ranks = ranks_of_token(call, id);
  }
  ptx::barrier_sync(kTurnForSenders, (role.warps + 1) * kLanes);
  if (block.ok == 0) return;
  const Form form = form_of(call, tokens, block.turn);
  const bool in_records = form == Form::kRecords;
#pragma unroll 1
  for (int at = index; at < num_items(call, in_records, tokens); at += static_cast<int>(gridDim.x)) {
    const Item item = item_of(call, in_records, tokens, at, role.warp);
#pragma unroll 1
    for (int token = item.first; token < item.end; ++token) {
      const bool ready = at == index && token == ahead.first && in_records == guess;
      if (!ready) ranks = ranks_of_token(call, id_of_lane(call, token));
#pragma unroll 1
      for (int strip = item.first_strip; strip < item.end_strip; strip += role.warps) {
        if (!ready || strip != ahead.first_strip) row = cast<kFp8>(p, load_x<kFp8>(p, token, strip), strip);
        put_strip<kFp8>(p, block, form, ranks & ~block.dead, token, strip, row);
      }
    }
    if (in_records)
      ptx::barrier_sync(kStoredBarrier, (role.warps + 1) * kLanes);  // pattern A: all before comm's release
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
      publish(flag_in(block.to[lane], at), mark_of(call, block.turn));  // pattern A
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
  // The clerk's first token has its place before the turn is known.
  const int first_token = static_cast<int>(blockIdx.x) * chunk;
  Place place{-1, kNoChoice};
  if (role.clerk && !counts_all && first_token < tokens) {
    place = take_place(call, shared.histogram, id_of_lane(call, first_token));
  }
  ptx::barrier_sync(kTurnForTeam, threads + kLanes);
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
    if (role.clerk && block.ok != 0) {
#pragma unroll 1
      for (int token = begin; token < end; ++token) {
        if (counts_all || token != first_token) place = take_place(call, shared.histogram, id_of_lane(call, token));
        send_places(call, block, token, place);
      }
    }
    counted = end;
    if (at + blocks < chunks) ptx::barrier_sync(kTeamBarrier, threads);  // the clerk has added this chunk
  }
}

}  // namespace anyep::cuda::low_latency::outward
