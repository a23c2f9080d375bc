// Low-latency dispatch, the sender's side: who the warps are, casts, rows to peers, choices and counts.
#pragma once

#include <cstdint>

#include "cuda/device/fp8.cuh"
#include "cuda/device/packets.cuh"
#include "cuda/kernels/low_latency_dispatch.h"
#include "cuda/kernels/low_latency_positions.cuh"

namespace anyep::cuda::low_latency::outward {

constexpr int kServiceWarps = 2;
/// Warps that share a row, per role: blocks of up to 512 threads, which leave each thread more registers, and of 960.
constexpr int kFewWarps = 7, kMostWarps = 14;

enum Barrier : int { kTeamBarrier = 1, kStoredBarrier, kTurnBarrier, kCountsBarrier, kRoundBarrier };

template <bool kFp8>
using RowStrip = Strip<kFp8 ? 1 : 2, kFp8 ? 4 : 0>;

/// Where a choice of a token goes: addresses of its row and of its first scale.
struct alignas(16) Target {
  std::byte* row;
  std::uint32_t* scales;
};

/// What the clerk tells the data warps to do next.
struct Round {
  Span span;  ///< of sources; count 0 = the data warps shall only come
  int first_strip, end_strip;
  bool last;             ///< nothing follows
  unsigned hits;         ///< lanes of `targets` that go somewhere, as the span has them
  Form form[kMaxRanks];  ///< of the rows of each step that has hits; of a span of tokens the first
  Target targets[kLanes];
};

struct Shared {
  Block block;
  int posted;                                    ///< 1 = the first round is there
  Round round[2];                                ///< this round and the next
  std::int32_t histogram[kMaxExperts];           ///< while sending: tokens so far of every expert
  std::uint8_t owner[kMaxExperts];               ///< the clerk's: of a token's choices of an expert, one
  std::int32_t counts[kMaxExperts + kMaxRanks];  ///< [source][local expert]: tokens that sources bring
};

/// Who a warp is.
struct Role {
  int warps;       ///< of senders, of a group of receivers
  int receivers;   ///< warps of all groups
  int warp;        ///< among the senders, or among its group
  int team_warp;   ///< among receivers and clerk, which is the last
  unsigned steps;  ///< sources, in steps from this rank, whose rows it takes; a sender takes its own
  bool sends, receives, comm, clerk;

  __device__ __forceinline__ explicit Role(const CallParams& call)
      : warps(call.warps), receivers(call.warps * call.groups) {
    const int index = warp_index();
    sends = index < warps;
    team_warp = index - warps;
    receives = !sends && team_warp < receivers;
    clerk = team_warp == receivers;
    comm = team_warp == receivers + 1;
    int group = 0;
    warp = sends ? index : team_warp;
    for (; receives && warp >= warps; warp -= warps) ++group;
    steps = sends ? 1u : steps_of(call, group);
  }
  /// Senders, receivers and clerk.
  __device__ int round_threads() const { return (warps + receivers + 1) * kLanes; }
  /// Receivers and clerk.
  __device__ int team_threads() const { return (receivers + 1) * kLanes; }
  __device__ int team_thread() const { return team_warp * kLanes + lane_index(); }
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

/// A strip of an own row, cast, that its sender keeps for its own slab.
template <bool kFp8>
struct OwnStrip {
  int token = -1, strip = 0;
  RowStrip<kFp8> row;
};

// ---- rows ----------------------------------------------------------------------------------------------------------

/// Ranks that host a choice of the token, this one left out. All lanes.
__device__ __forceinline__ unsigned ranks_of_token(const CallParams& call, int id) {
  const unsigned bit = id >= 0 ? 1u << rank_of(call, id) : 0;
  return __reduce_or_sync(kAllLanes, bit) & ~(1u << call.team.rank);
}

/// Offset of a strip in a region, in bytes.
__device__ __forceinline__ std::uint64_t strip_at(const CallParams& call, Form form, int token, int strip) {
  const auto row = static_cast<unsigned>(token);
  if (form == Form::kWords) return call.at.words + call.cut.row_word(row, strip) * 8;
  if (form == Form::kPackets) return call.at.packets + call.cut.packet(row, strip) * 16;
  return call.at.records + call.cut.record(row, 0);  // scales lie behind all strips
}

template <bool kFp8>
__device__ __forceinline__ void put_strip(const CallParams& call, const Turn& turn, Form form, unsigned ranks,
                                          std::uint64_t at, int strip, const RowStrip<kFp8>& row) {
#pragma unroll 1
  for (int step = 1; step < call.team.num_ranks; ++step) {
    const int rank = rank_above(call, step);
    if ((ranks >> rank & 1) == 0) continue;
    std::byte* const to = region_to(call, turn, rank) + at;
    if (form == Form::kWords) {
      store_words(to, row, turn.number);
    } else if (form == Form::kPackets) {
      store_packets(to, row, turn.number);
    } else {
      constexpr int kVectors = kFp8 ? 1 : 2;
      auto* const vectors = reinterpret_cast<uint4*>(to) + strip * (kVectors * kLanes) + lane_index();
#pragma unroll
      for (int v = 0; v < kVectors; ++v) vectors[v * kLanes] = row.data[v];
      if (kFp8 && lane_index() % 8 == 0) {
        reinterpret_cast<std::uint32_t*>(to + call.cut.strips * 512)[strip * 4 + lane_index() / 8] = row.scale;
      }
    }
  }
}

/// Senders, beyond what send_rows() does at once: all strips of this warp, `first` of them left out.
template <bool kFp8>
static __device__ __noinline__ void send_more_rows(const DispatchParams& p, const Role role, const Turn turn,
                                                   unsigned ranks, int first) {
  const CallParams& call = p.call;
  const int tokens = call.routing.num_tokens;
  const Form form = own_form(call, turn);
  const bool in_records = form == Form::kRecords;
#pragma unroll 1
  for (int at = static_cast<int>(blockIdx.x); at < num_items(call, in_records, tokens);
       at += static_cast<int>(gridDim.x)) {
    const Item item = item_of(call, in_records, tokens, at);
#pragma unroll 1
    for (int token = item.first; token < item.end; ++token) {
      const unsigned hosts = ranks_of_token(call, id_of_lane(call, token)) & ranks;
#pragma unroll 1
      for (int strip = item.first_strip + role.warp; strip < item.end_strip; strip += role.warps) {
        if (--first >= 0) continue;
        const RowStrip<kFp8> row = cast<kFp8>(p, load_x<kFp8>(p, token, strip), strip);
        put_strip<kFp8>(call, turn, form, hosts, strip_at(call, form, token, strip), strip, row);
      }
    }
    if (in_records)
      ptx::barrier_sync(kStoredBarrier, (role.warps + 1) * kLanes);  // pattern A: all before comm's release
  }
  if (!is_refresh(turn.number)) return;
  const int me = call.team.rank;
  refresh(
      call, turn, ranks, call.cut.table_word(static_cast<unsigned>(tokens), 0),
      [me, tokens](int peer) { return peer == me ? 0 : num_chunks(tokens); },
      blockIdx.x * static_cast<unsigned>(role.warps * kLanes) + threadIdx.x,
      gridDim.x * static_cast<unsigned>(role.warps * kLanes));
}

/// Senders: this rank's rows to peers. Returns the block's first strip, which its sender has in registers.
template <bool kFp8>
__device__ __forceinline__ OwnStrip<kFp8> send_rows(const DispatchParams& p, Block& block, const Role& role,
                                                    Turn& turn) {
  const CallParams& call = p.call;
  const int tokens = call.routing.num_tokens, index = static_cast<int>(blockIdx.x);
  const bool in_records = call.own_form == Form::kRecords;
  const int items = num_items(call, in_records, tokens);
  const Item item = item_of(call, in_records, tokens, index);
  OwnStrip<kFp8> own;
  own.strip = item.first_strip + role.warp;
  const bool any = index < items, has_strip = any && own.strip < item.end_strip;
  const bool more = any && (item.end > item.first + 1 || own.strip + role.warps < item.end_strip ||
                            index + static_cast<int>(gridDim.x) < items);
  const std::uint64_t at = strip_at(call, call.own_form, item.first, own.strip);
  enter(call, block);
  RawStrip raw{};
  if (has_strip) raw = load_x<kFp8>(p, item.first, own.strip);
  const std::int64_t id = any && lane_index() < call.top_k ? raw_id(call, item.first, lane_index()) : -1;
  const Signs signs(call, block);
  own.row = cast<kFp8>(p, raw, own.strip);
  if (has_strip) own.token = item.first;
  const unsigned hosts = ranks_of_token(call, checked_id(call, id));
  unsigned ranks;
  turn = start(call, block, signs, ranks);
  if (is_refresh(turn.number)) [[unlikely]] {  // whole rows, whatever the batch
    ptx::barrier_arrive(kTurnBarrier, all_threads());
    send_more_rows<kFp8>(p, role, turn, ranks, 0);
    return own;
  }
  if (has_strip) put_strip<kFp8>(call, turn, call.own_form, hosts & ranks, at, own.strip, own.row);
  ptx::barrier_arrive(kTurnBarrier, all_threads());
  if (more) {
    send_more_rows<kFp8>(p, role, turn, ranks, has_strip ? 1 : 0);
  } else if (in_records && any) {
    ptx::barrier_sync(kStoredBarrier, (role.warps + 1) * kLanes);  // pattern A: all before comm's release
  }
  return own;
}

/// The comm warp's side of send_rows(): a flag per chunk and peer, when the rows are records.
__device__ __forceinline__ void release_chunks(const CallParams& call, const Turn& turn, unsigned ranks,
                                               const Role& role) {
  const int tokens = call.routing.num_tokens, lane = lane_index();
  if (call.own_form != Form::kRecords && !is_refresh(turn.number)) return;
  const bool to_peer = lane != call.team.rank && (ranks >> lane & 1) != 0;
  for (int at = static_cast<int>(blockIdx.x); at < num_chunks(tokens); at += static_cast<int>(gridDim.x)) {
    ptx::barrier_sync(kStoredBarrier, (role.warps + 1) * kLanes);
    if (to_peer) publish(flag_in(region_to(call, turn, lane), at), mark_of(call, turn));  // pattern A
  }
}

// ---- choices and counts --------------------------------------------------------------------------------------------

/// Receivers and clerk, beyond what send_tables() does at once: the other items of the block, or all of them.
static __device__ __noinline__ void send_more_tables(const CallParams& call, Shared& shared, const Role role,
                                                     const Turn turn, unsigned ranks, bool begun) {
  const int tokens = call.routing.num_tokens, threads = role.team_threads(), blocks = static_cast<int>(gridDim.x);
  const bool in_records = own_form(call, turn) == Form::kRecords;
  const int index = static_cast<int>(blockIdx.x);
  int counted = begun ? item_of(call, in_records, tokens, index).first + 1 : 0;
  ptx::barrier_sync(kTeamBarrier, threads);  // what was there is read, or the clerk has added the first token
  if (!begun) {
    for (int i = role.team_thread(); i < call.num_experts; i += threads) shared.histogram[i] = 0;
    ptx::barrier_sync(kTeamBarrier, threads);
  }
#pragma unroll 1
  for (int at = index; at < num_items(call, in_records, tokens); at += blocks) {
    const Item item = item_of(call, in_records, tokens, at);
    if (counted < item.first) {
      (void)count_tokens(call, shared.histogram, counted, item.first, role.team_warp, role.receivers + 1);
      ptx::barrier_sync(kTeamBarrier, threads);
      counted = item.first;
    }
    if (role.clerk) {
#pragma unroll 1
      for (int token = counted; token < item.end; ++token) {
        const Place place = take_place(call, shared.histogram, shared.owner, id_of_lane(call, token));
        if (item.first_strip == 0) send_places(call, turn, ranks, token, place);
      }
    }
    counted = item.end;
    ptx::barrier_sync(kTeamBarrier, threads);  // the clerk has added this item
  }
}

/// Receivers and clerk: counts of all tokens (one block), choices of this block's items. The histogram is clear.
/// `ahead`: in the clerk, the place of this block's first token, if `knows` it.
__device__ __forceinline__ Turn send_tables(const CallParams& call, Shared& shared, const Role& role, Place& ahead,
                                            bool& knows) {
  Block& block = shared.block;
  const int tokens = call.routing.num_tokens, index = static_cast<int>(blockIdx.x);
  const bool in_records = call.own_form == Form::kRecords, counts_all = is_clerk_block();
  const Item item = item_of(call, in_records, tokens, index);
  const int items = num_items(call, in_records, tokens);
  const bool any = index < items && !counts_all;
  const int counted = counts_all ? tokens : any ? item.first : 0;
  const bool more = (any && (item.end > item.first + 1 || items > index + static_cast<int>(gridDim.x))) ||
                    (counts_all && index < items);
  enter(call, block);
  const bool has_choice = role.clerk && any && lane_index() < call.top_k;
  const std::int64_t id = has_choice ? raw_id(call, item.first, lane_index()) : -1;
  unsigned strays = 0, ranks = 0;
  Turn turn{};
  if (role.clerk) turn = start(call, block, Signs(call, block), ranks);  // meanwhile the receivers count
  if (counted != 0) {
    if (role.receives) strays = count_tokens(call, shared.histogram, 0, counted, role.team_warp, role.receivers);
    ptx::barrier_sync(kTeamBarrier, role.team_threads());
  }
  if (role.receives) turn = counts_all ? start(call, block, Signs(call, block), ranks) : find_turn(call);
  ptx::barrier_arrive(kTurnBarrier, all_threads());
  knows = any && (in_records || !is_refresh(turn.number));
  if (role.clerk && knows) {
    ahead = take_place(call, shared.histogram, shared.owner, checked_id(call, id));
    if (item.first_strip == 0) send_places(call, turn, ranks, item.first, ahead);
  }
  if (counts_all) {
    send_counts(call, turn, ranks, shared.histogram, role.team_thread(), role.team_threads());
    if (strays != 0) atomicAdd(&call.team.state->ids_out_of_range, static_cast<unsigned long long>(strays));
  }
  if (more || is_refresh(turn.number)) [[unlikely]] {
    send_more_tables(call, shared, role, turn, ranks, knows);
  }
  return turn;
}

}  // namespace anyep::cuda::low_latency::outward
