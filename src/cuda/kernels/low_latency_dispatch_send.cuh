// Low-latency dispatch, the sender's side: who the warps are, casts, rows to peers.
#pragma once

#include <cstdint>

#include "cuda/device/bulk.cuh"
#include "cuda/device/fp8.cuh"
#include "cuda/device/packets.cuh"
#include "cuda/kernels/low_latency_dispatch.h"
#include "cuda/kernels/low_latency_gate.cuh"

namespace anyep::cuda::low_latency::outward {

constexpr int kServiceWarps = 2;
/// Warps that share a row, and warps of all groups and own rows together: blocks of up to 512 threads, which leave each thread
/// the registers it needs.
constexpr int kMostWarps = 7, kAllWarps = 14;

enum Barrier : int { kTeamBarrier = 1, kStoredBarrier, kReusableBarrier, kTurnBarrier, kCountsBarrier, kRoundBarrier };

/// Records that wait in shared memory for the comm warp's bulk copies.
constexpr int kRecordSlots = 4;
/// Kernels whose records go by bulk copies: stores to a peer hold up all that an SM's warps load and store, until the link has taken
/// them.
template <int kWays>
inline constexpr bool kCopiesRecords = kWays > 1 && ptx::kBulkCopies;

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
  bool in_records;       ///< all of the span's rows are, here already, or own ones that would travel so
  unsigned hits;         ///< lanes of `targets` that go somewhere, as the span has them
  Form form[kMaxRanks];  ///< of the rows of each step that has hits
  Target targets[kLanes];
};

struct Shared {
  Block block;
  int posted;                                    ///< 1 = the first round is there
  Round round[2];                                ///< this round and the next
  std::int32_t histogram[kMaxExperts];           ///< while sending: tokens so far of every expert
  std::uint8_t owner[kMaxExperts];               ///< the clerk's: of a token's choices of an expert, one
  std::int32_t counts[kMaxExperts + kMaxRanks];  ///< [source][local expert]: tokens that sources bring
  unsigned hosts[kRecordSlots];                  ///< ranks that a record goes to, bits
  unsigned ranks;                                ///< that the clerk may send to, bits
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
    const int index = uniform_warp_index();
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
  /// Senders and comm.
  __device__ int stored_threads() const { return (warps + 1) * kLanes; }
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

/// Strips of a row that a warp takes at once, as far apart as there are warps: more is on its way where a row has more strips than
/// warps, and a kernel for each number.
template <bool kFp8, int kWays>
struct Strips {
  RowStrip<kFp8> at[kWays];
};
template <int kWays>
struct RawStrips {
  RawStrip at[kWays];
};

template <bool kFp8, int kWays>
__device__ __forceinline__ RawStrips<kWays> load_x(const DispatchParams& p, int token, int strip, int apart) {
  RawStrips<kWays> raw;
#pragma unroll
  for (int k = 0; k < kWays; ++k) raw.at[k] = load_x<kFp8>(p, token, strip + k * apart);
  return raw;
}
template <bool kFp8, int kWays>
__device__ __forceinline__ Strips<kFp8, kWays> cast(const DispatchParams& p, const RawStrips<kWays>& raw, int strip,
                                                    int apart) {
  Strips<kFp8, kWays> rows;
#pragma unroll
  for (int k = 0; k < kWays; ++k) rows.at[k] = cast<kFp8>(p, raw.at[k], strip + k * apart);
  return rows;
}

/// Strips of an own row, cast, that its sender keeps for its own slab.
template <bool kFp8, int kWays>
struct OwnStrips {
  int token = -1, strip = 0;
  Strips<kFp8, kWays> rows;
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

/// A strip of a record.
template <bool kFp8>
__device__ __forceinline__ void put_record_strip(const CallParams& call, std::byte* record, int strip,
                                                 const RowStrip<kFp8>& row) {
  constexpr int kVectors = kFp8 ? 1 : 2;
  auto* const vectors = reinterpret_cast<uint4*>(record) + strip * (kVectors * kLanes) + lane_index();
#pragma unroll
  for (int v = 0; v < kVectors; ++v) vectors[v * kLanes] = row.data[v];
  if (kFp8 && lane_index() % 8 == 0) {
    reinterpret_cast<std::uint32_t*>(record + call.cut.strips * 512)[strip * 4 + lane_index() / 8] = row.scale;
  }
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
      put_record_strip<kFp8>(call, to, strip, row);
    }
  }
}

/// Are a block's records copied by the comm warp? One token's are sooner there by stores, unless they are many bytes (measured:
/// 22 KB are not, 43 KB are). In a refresh of words and packets there is no room for them.
ANYEP_HD constexpr bool copies_records(const CallParams& call) {
  constexpr std::uint64_t kMostStored = 32768;
  return call.own_form == Form::kRecords &&
         (are_several_a_chunk(call.routing.num_tokens) ||
          call.cut.record_bytes * static_cast<unsigned>(call.team.num_ranks - 1) > kMostStored);
}
template <int kWays>
__device__ __forceinline__ bool comm_copies(const CallParams& call) {
  return kCopiesRecords<kWays> && copies_records(call);
}

/// Where a block's senders put rows: to the ranks themselves, or, records, into shared memory for comm.
template <bool kFp8, int kWays>
struct Outlet {
  const CallParams& call;
  Shared& shared;
  std::byte* slots;  ///< [kRecordSlots] records
  const Role& role;
  Turn turn;
  Form form;
  bool copies;     ///< comm does
  int tokens = 0;  ///< of this block so far, where comm copies

  __device__ __forceinline__ Outlet(const CallParams& params, Shared& block, std::byte* records, const Role& who,
                                    const Turn& now)
      : call(params),
        shared(block),
        slots(records),
        role(who),
        turn(now),
        form(own_form(params, now)),
        copies(comm_copies<kWays>(params)) {}

  /// Strips of a token, up to `end`, for the ranks.
  __device__ __forceinline__ void put(unsigned ranks, int token, int strip, int end,
                                      const Strips<kFp8, kWays>& rows) const {
    const int slot = tokens % kRecordSlots;
    if (copies && lane_index() == 0 && role.warp == 0) shared.hosts[slot] = ranks;
#pragma unroll
    for (int k = 0; k < kWays; ++k) {
      const int at = strip + k * role.warps;
      if (at >= end) continue;
      if (copies) {
        put_record_strip<kFp8>(call, slots + slot * call.cut.record_bytes, at, rows.at[k]);
      } else {
        put_strip<kFp8>(call, turn, form, ranks, strip_at(call, form, token, at), at, rows.at[k]);
      }
    }
  }
  /// All strips of this warp of a token are put; `more`: it has another one.
  __device__ __forceinline__ void end_token(bool more) {
    if (!copies) return;
    bulk::used_before_copy();
    come_to_comm(more);
    if (++tokens >= kRecordSlots && more) ptx::barrier_sync(kReusableBarrier, role.stored_threads());
  }
  /// All of an item; `more`: there is another one.
  __device__ __forceinline__ void end_item(bool more) const {
    if (!copies && form == Form::kRecords) come_to_comm(more);  // pattern A
  }

 private:
  /// The last time nobody waits for comm.
  __device__ __forceinline__ void come_to_comm(bool more) const {
    if (more) {
      ptx::barrier_sync(kStoredBarrier, role.stored_threads());
    } else {
      ptx::barrier_arrive(kStoredBarrier, role.stored_threads());
    }
  }
};

/// Senders, beyond what send_rows() does at once: all strips of this warp, but the first ones of the block's first item if they
/// are `begun`. The next ones are on their way while some are sent.
template <bool kFp8, int kWays>
static __device__ __noinline__ void send_more_rows(const DispatchParams& p, Shared& shared, std::byte* slots,
                                                   const Role role, const Turn turn, unsigned ranks, bool begun) {
  const CallParams& call = p.call;
  const int tokens = call.routing.num_tokens, step = kWays * role.warps, blocks = static_cast<int>(gridDim.x);
  Outlet<kFp8, kWays> outlet(call, shared, slots, role, turn);
  const bool in_records = outlet.form == Form::kRecords;
  const int items = num_items(call, in_records, tokens);
#pragma unroll 1
  for (int at = this_share(); at < items; at += blocks) {
    const Item item = item_of(call, in_records, tokens, at);
    const int first_strip = item.first_strip + role.warp;
    int token = first_strip < item.end_strip ? item.first : item.end, strip = first_strip;
    const auto advance = [&] {
      strip += step;
      if (strip < item.end_strip) return;
      strip = first_strip;
      ++token;
    };
    const auto end_if_through = [&](int before) {
      if (token != before) outlet.end_token(token < item.end || at + blocks < items);
    };
    if (begun && token < item.end) {
      advance();
      end_if_through(item.first);
    }
    begun = false;
    RawStrips<kWays> next{};
    int next_id = -1;
    const auto load = [&] {
      if (token >= item.end) return;
      next_id = id_of_lane(call, token);
      next = load_x<kFp8, kWays>(p, token, strip, role.warps);
    };
    load();
#pragma unroll 1
    while (token < item.end) {
      const RawStrips<kWays> raw = next;
      const unsigned hosts = ranks_of_token(call, next_id) & ranks;
      const int this_token = token, this_strip = strip;
      advance();
      load();
      outlet.put(hosts, this_token, this_strip, item.end_strip, cast<kFp8, kWays>(p, raw, this_strip, role.warps));
      end_if_through(this_token);
    }
    outlet.end_item(at + blocks < items);
  }
  if (!is_refresh(turn.number)) return;
  const int me = call.team.rank;
  const unsigned threads = static_cast<unsigned>(role.warps * kLanes);
  const unsigned worker = blockIdx.x * threads + threadIdx.x, workers = gridDim.x * threads;
  refresh(call, turn, ranks, call.cut.table_word(static_cast<unsigned>(tokens), 0), worker, workers);
  refresh_flags(
      call, turn, ranks, [me, tokens](int peer) { return peer == me ? 0 : num_chunks(tokens); }, worker, workers);
}

/// Senders: this rank's rows to peers. Returns the block's first strips, which their sender has in registers.
template <bool kFp8, int kWays>
__device__ __forceinline__ OwnStrips<kFp8, kWays> send_rows(const DispatchParams& p, Shared& shared, std::byte* slots,
                                                            const Role& role, Turn& turn) {
  const CallParams& call = p.call;
  Block& block = shared.block;
  const int tokens = call.routing.num_tokens, index = this_share();
  const bool in_records = call.own_form == Form::kRecords;
  const int items = num_items(call, in_records, tokens);
  const Item item = item_of(call, in_records, tokens, index);
  OwnStrips<kFp8, kWays> own;
  own.strip = item.first_strip + role.warp;
  const bool any = index < items, has_strip = any && own.strip < item.end_strip;
  const bool more = any && (item.end > item.first + 1 || own.strip + kWays * role.warps < item.end_strip ||
                            index + static_cast<int>(gridDim.x) < items);
  enter(call, block);
  RawStrips<kWays> raw{};
  if (has_strip) raw = load_x<kFp8, kWays>(p, item.first, own.strip, role.warps);
  const std::int64_t id = any && lane_index() < call.top_k ? raw_id(call, item.first, lane_index()) : -1;
  const Signs signs(call, block);
  own.rows = cast<kFp8, kWays>(p, raw, own.strip, role.warps);
  if (has_strip) own.token = item.first;
  const unsigned hosts = ranks_of_token(call, checked_id(call, id));
  unsigned ranks;
  turn = start(call, block, signs, ranks);
  if (is_refresh(turn.number)) [[unlikely]] {  // whole rows, whatever the batch
    ptx::barrier_arrive(kTurnBarrier, all_threads());
    send_more_rows<kFp8, kWays>(p, shared, slots, role, turn, ranks, false);
    return own;
  }
  Outlet<kFp8, kWays> outlet(call, shared, slots, role, turn);
  if (has_strip) outlet.put(hosts & ranks, item.first, own.strip, item.end_strip, own.rows);
  ptx::barrier_arrive(kTurnBarrier, all_threads());
  if (more) {
    send_more_rows<kFp8, kWays>(p, shared, slots, role, turn, ranks, true);
  } else if (any) {
    outlet.end_token(false);
    outlet.end_item(false);
  }
  return own;
}

/// The comm warp's side of send_rows(), when the rows are records: a flag per chunk and peer. `slots`: the records themselves,
/// where it copies them. meanwhile(): once, while the first copies are on their way.
template <int kWays, class Meanwhile>
__device__ __forceinline__ void release_chunks(const CallParams& call, const Shared& shared, const std::byte* slots,
                                               const Turn& turn, unsigned ranks, const Role& role,
                                               Meanwhile&& meanwhile) {
  const bool in_records = own_form(call, turn) == Form::kRecords;
  const int tokens = call.routing.num_tokens, chunks = num_chunks(tokens), blocks = static_cast<int>(gridDim.x);
  // A lane per step: copies start in the order of steps.
  const int step = lane_index();
  const bool is_peer = step > 0 && step < call.team.num_ranks;
  const int peer = rank_above(call, is_peer ? step : 0);
  const bool to_peer = is_peer && (ranks >> peer & 1) != 0;
  std::byte* const region = region_to(call, turn, peer);
  const bool copies = comm_copies<kWays>(call);
  if (copies) bulk::acquired_for_stores();
  int count = 0;
#pragma unroll 1
  for (int at = this_share();; at += blocks) {
    const bool any = in_records && at < chunks;
    if (copies && any) {
      const Item item = item_of(call, true, tokens, at);
#pragma unroll 1
      for (int token = item.first; token < item.end; ++token) {
        const int slot = count % kRecordSlots;
        ptx::barrier_sync(kStoredBarrier, role.stored_threads());
        if (to_peer && (shared.hosts[slot] >> peer & 1) != 0) {
          bulk::store(region + strip_at(call, Form::kRecords, token, 0), slots + slot * call.cut.record_bytes,
                      static_cast<std::uint32_t>(call.cut.record_bytes));
        }
        bulk::commit();
        if (++count < kRecordSlots || (token + 1 == item.end && at + blocks >= chunks)) continue;
        bulk::wait_source_reusable<kRecordSlots - 1>();
        __syncwarp();
        ptx::barrier_arrive(kReusableBarrier, role.stored_threads());
      }
    }
    if (at < blocks) meanwhile();
    if (!any) return;
    if (copies) {
      bulk::wait_delivered();
      __syncwarp();
    } else {
      ptx::barrier_sync(kStoredBarrier, role.stored_threads());
    }
    if (to_peer) publish(flag_in(region, at), mark_of(call, turn));  // pattern I, or A: one release for all
  }
}

}  // namespace anyep::cuda::low_latency::outward
