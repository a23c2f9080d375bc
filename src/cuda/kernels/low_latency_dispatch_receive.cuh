// Low-latency dispatch, the receiver's side: where rows go, waiting for them, copies to every chosen expert.
#pragma once

#include <cstdint>

#include "cuda/kernels/low_latency_dispatch_send.cuh"

namespace anyep::cuda::low_latency::outward {

/// One look at the counts that `sources` have of a local expert. Returns a source whose count is not there yet, or -1.
__device__ __forceinline__ int read_counts_of(const CallParams& call, const Block& block, unsigned sources, int expert,
                                              std::uint32_t (&values)[kMaxRanks]) {
  std::uint64_t words[kMaxRanks];
#pragma unroll
  for (int source = 0; source < kMaxRanks; ++source) {
    if ((sources >> source & 1) == 0) continue;
    words[source] =
        protocol::Shared(word_in(call, block.from[source], 1 + static_cast<unsigned>(expert))).load(protocol::kRelaxed);
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

/// Rows of an expert that come from sources before `source`. A source that is masked meanwhile brings none. Leaves when the
/// block retreats: the counts may be those of a block of this rank that finds no SM.
__device__ __forceinline__ int rows_before(const CallParams& call, Block& block, int source, int expert) {
  int rows = 0;
#pragma unroll 1
  for (int earlier = 0; earlier < source; ++earlier) {
    if ((block.dead >> earlier & 1) != 0) continue;
    std::uint64_t& word = word_in(call, block.from[earlier], 1 + static_cast<unsigned>(expert));
    std::uint64_t seen = 0;
    const bool came = await(call, block, earlier, kWaitInReceive, [&] {
      seen = protocol::Shared(word).load(protocol::kRelaxed);
      return protocol::count_epoch(seen) == block.turn || gate_of(block) == 2;
    });
    if (came) rows += min(static_cast<int>(protocol::count_value(seen)), call.max_tokens);
  }
  return rows;
}

/// Where choices of a received token go, for several sources at once: lane i looks at choice i % top_k of the source
/// i / top_k steps after this rank.
struct Lookup {
  int step, choice;

  __device__ explicit Lookup(const CallParams& call)
      : step(lane_index() / call.top_k), choice(lane_index() - step * call.top_k) {}
};

__device__ __forceinline__ int source_at(const CallParams& call, int step) {
  return around(call, call.team.rank + step);
}

/// Where the choice in a word goes.
__device__ __forceinline__ Target target_of(const DispatchParams& p, Block& block, int source, std::uint64_t word) {
  const CallParams& call = p.call;
  const std::uint32_t value = protocol::count_value(word);
  const auto expert = static_cast<int>(value >> kPositionBits);
  const int slab_rows = call.team.num_ranks * call.max_tokens;
  if (value == kNoChoice || expert >= call.num_local_experts) return {-1, 0};
  const int row = static_cast<int>(value & ((1u << kPositionBits) - 1)) + rows_before(call, block, source, expert);
  if (row >= slab_rows) return {-1, 0};
  return {static_cast<std::int64_t>(expert) * slab_rows + row,
          expert * p.scale_expert_stride + row * p.scale_row_stride};
}
__device__ __forceinline__ std::uint64_t& choice_word(const CallParams& call, const Block& block, const Lookup& lookup,
                                                      int source, int token) {
  return word_in(call, block.from[source], call.cut.table_word(static_cast<unsigned>(token), lookup.choice));
}

/// Targets of token `token` of the sources at steps [first, end) that bring it. All lanes.
__device__ __forceinline__ Target find_targets(const DispatchParams& p, Block& block, const Lookup& lookup, int first,
                                               int end, int token) {
  const CallParams& call = p.call;
  Target target{-1, 0};
  const int step = first + lookup.step;
  if (lookup.step < call.tokens_per_warp && step < end) {
    const int source = source_at(call, step);
    if (token < block.tokens[source]) {
      std::uint64_t& word = choice_word(call, block, lookup, source, token);
      std::uint64_t seen = 0;
      const bool came = await(call, block, source, kWaitInReceive, [&] {
        seen = protocol::Shared(word).load(protocol::kRelaxed);
        return protocol::count_epoch(seen) == block.turn;
      });
      if (came) target = target_of(p, block, source, seen);
    }
  }
  __syncwarp();
  return target;
}

/// The same for the first sources, from this rank on, before it is known which sources bring how many.
__device__ __forceinline__ Target look_for_targets(const DispatchParams& p, Block& block, const Lookup& lookup,
                                                   int token) {
  const CallParams& call = p.call;
  Target target{-1, 0};
  if (lookup.step < call.tokens_per_warp && lookup.step < call.team.num_ranks && token < call.max_tokens) {
    const int source = source_at(call, lookup.step);
    std::uint64_t& word = choice_word(call, block, lookup, source, token);
    std::uint64_t seen = 0;
    const bool found = look_ahead(call, block, source, token, [&] {
      seen = protocol::Shared(word).load(protocol::kRelaxed);
      return protocol::count_epoch(seen) == block.turn;
    });
    if (found && gate_of(block) != 2) target = target_of(p, block, source, seen);
  }
  __syncwarp();
  return target;
}

/// Receivers: one warp looks, since many that poll are in each other's way; all get the answer. find() in that warp only;
/// its waits hold for all (pattern B).
template <class Find>
__device__ __forceinline__ Target share_targets(Shared& shared, const Role& role, int& parity, Find&& find) {
  if (role.warps == 1) return find();
  if (role.warp == 0) shared.targets[parity][lane_index()] = find();
  ptx::barrier_sync(kTargetBarrier, role.warps * kLanes);  // and whoever is here has read the targets before the last
  const Target target = shared.targets[parity][lane_index()];
  parity ^= 1;
  return target;
}

/// Waits for a strip of a peer. False in all lanes: it will not come.
template <bool kFp8>
__device__ __forceinline__ bool take_strip(const CallParams& call, Block& block, Form form, int source, int token,
                                           int strip, RowStrip<kFp8>& row) {
  constexpr int kVectors = kFp8 ? 1 : 2, kScales = kFp8 ? 4 : 0;
  const std::byte* const region = block.from[source];
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

/// Stores a strip to the rows of the chosen experts, those of `lanes`.
template <bool kFp8>
__device__ __forceinline__ void expand(const DispatchParams& p, const Target& target, unsigned lanes, int token,
                                       int strip, const RowStrip<kFp8>& row) {
  const CallParams& call = p.call;
  constexpr int kVectors = kFp8 ? 1 : 2, kBytes = kFp8 ? 1 : 2;
  // Addresses by lane first, so that the loop over choices is short.
  const int element = element_of<kFp8>(strip, 0);
  std::byte* const lane_row = p.slab + target.row * (call.hidden * kBytes);
  std::uint32_t* const lane_scales = p.scales + target.scale_at;
  std::uint32_t scale = row.scale;
  bool has_scale = kFp8 && lane_index() % 8 == 0 && element < call.hidden;
  std::int64_t scale_offset = (strip * 4 + lane_index() / 8) * p.scale_column_stride;
  if (kFp8 && p.wire == Wire::kUE8M0) {
    scale = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) scale |= (from_lane(row.scale, i * 8) >> 23 & 0xFFu) << (8 * i);
    has_scale = lane_index() == 0;
    scale_offset = strip * p.scale_column_stride;
  }
#pragma unroll 1
  for (unsigned left = lanes; left != 0; left &= left - 1) {
    const int choice = __ffs(static_cast<int>(left)) - 1;
    std::byte* const to = from_lane(lane_row, choice) + element * kBytes;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (element + v * (kLanes * 8) < call.hidden) *reinterpret_cast<uint4*>(to + v * (kLanes * 16)) = row.data[v];
    }
    if constexpr (kFp8) {
      std::uint32_t* const scales = from_lane(lane_scales, choice);
      if (has_scale) scales[scale_offset] = scale;
    }
  }
  if (strip == 0 && (lanes >> lane_index() & 1) != 0) p.source[target.row] = token;
}

/// A strip of an own row, cast before it is needed.
template <bool kFp8>
struct OwnStrip {
  int token = -1, strip = 0;
  RowStrip<kFp8> row;
};

template <bool kFp8>
__device__ __forceinline__ void receive_strip(const DispatchParams& p, Block& block, const OwnStrip<kFp8>& own,
                                              const Target& target, unsigned lanes, int source, int token, int strip) {
  RowStrip<kFp8> row;
  if (source == p.call.team.rank) {
    if (token == own.token && strip == own.strip) {
      row = own.row;
    } else {
      row = cast<kFp8>(p, load_x<kFp8>(p, token, strip), strip);
    }
  } else {
    if (!take_strip<kFp8>(p.call, block, block.form[source], source, token, strip, row)) {
      if (block.broken != 0) return;
      row = RowStrip<kFp8>{};  // the peer died in mid-send: zeros where rows were counted
    }
  }
  expand<kFp8>(p, target, lanes, token, strip, row);
}

/// A share of all sources' rows: those of words and packets together, unit by unit, those of records source by source,
/// chunk by chunk. Own rows first: they hide the others' flight. One place for all forms, since code is slow to come, too.
template <bool kFp8>
__device__ inline void receive_share(const DispatchParams& p, Shared& shared, const Role& role, const Lookup& lookup,
                                     const OwnStrip<kFp8>& own, int ahead, int share, int& parity) {
  const CallParams& call = p.call;
  Block& block = shared.block;
  const int ranks = call.team.num_ranks;
  int next = 0;
#pragma unroll 1
  for (int first = 0; first < ranks; first = next) {
    const bool in_records = block.form[source_at(call, first)] == Form::kRecords;
    int tokens = 0;
    do {
      tokens = max(tokens, block.tokens[source_at(call, next)]);
      ++next;
    } while (next < ranks && !in_records && next - first < call.tokens_per_warp &&
             block.form[source_at(call, next)] != Form::kRecords);
#pragma unroll 1
    for (int at = share; at < num_items(call, in_records, tokens); at += static_cast<int>(gridDim.x)) {
      const Item item = item_of(call, in_records, tokens, at, role.warp);
      const bool needs_flag = in_records && first != 0;  // own records have none
      bool flagged = !needs_flag;                        // in the warp that looks
#pragma unroll 1
      for (int token = item.first; token < item.end; ++token) {
        // What was looked up ahead counts steps from this rank on.
        const bool known = token == ahead && next <= call.tokens_per_warp;
        const int base = known ? 0 : first;
        Target target;
        if (known && !needs_flag) {
          target = shared.ahead[lane_index()];
        } else {
          target = share_targets(shared, role, parity, [&] {
            Target found = known ? shared.ahead[lane_index()] : find_targets(p, block, lookup, first, next, token);
            const bool here = found.row >= 0 && (!known || lookup.step == first);
            if (flagged || !__any_sync(kAllLanes, here)) return found;
            bool came = true;
            if (lane_index() == 0) came = await_flag(call, block, source_at(call, first), at);
            flagged = true;
            if (!__all_sync(kAllLanes, came)) found.row = -1;  // a peer that died in mid-send, or this block is broken
            return found;
          });
        }
#pragma unroll 1
        for (int step = first; step < next; ++step) {
          const unsigned lanes = __ballot_sync(
              kAllLanes, target.row >= 0 && base + lookup.step == step && token < block.tokens[source_at(call, step)]);
          if (lanes == 0) continue;
#pragma unroll 1
          for (int strip = item.first_strip; strip < item.end_strip; strip += role.warps) {
            receive_strip<kFp8>(p, block, own, target, lanes, source_at(call, step), token, strip);
          }
        }
      }
    }
  }
}

/// The strip of this rank's first unit, loaded and cast while the others' data are in flight.
template <bool kFp8>
__device__ __forceinline__ OwnStrip<kFp8> prepare_own(const DispatchParams& p, const Role& role) {
  const CallParams& call = p.call;
  OwnStrip<kFp8> own;
  const Unit unit = unit_of(call, static_cast<int>(blockIdx.x));
  const int strip = unit.piece * role.warps + role.warp;
  if (unit.token >= call.routing.num_tokens || strip >= call.cut.strips) return own;
  own.token = unit.token;
  own.strip = strip;
  own.row = cast<kFp8>(p, load_x<kFp8>(p, own.token, strip), strip);
  return own;
}

}  // namespace anyep::cuda::low_latency::outward
