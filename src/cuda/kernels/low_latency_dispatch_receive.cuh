// Low-latency dispatch, the receiver's side: the clerk (low_latency_dispatch_clerk.cuh) finds out where rows go, data warps take
// and copy them.
//
// They meet at a barrier per round: for some tokens of some sources, which choices go where. Own rows are part of it; their senders
// still have them.
#pragma once

#include <cstdint>

#include "cuda/kernels/low_latency_dispatch_tables.cuh"

namespace anyep::cuda::low_latency::outward {

__device__ __forceinline__ int source_at(const CallParams& call, int step) {
  return rank_below(call, step);
}

// ---- counts --------------------------------------------------------------------------------------------------------

/// Some warps, `threads` in all: the counts of the first `sources` sources, in shared memory. A source that is masked
/// meanwhile brings none. Leaves when the block retreats: the counts may be those of a block of this rank that finds no SM.
__device__ __forceinline__ void gather_counts(const CallParams& call, Shared& shared, const Turn& turn, int sources,
                                              int thread, int threads) {
  Block& block = shared.block;
  constexpr int kUnroll = 2;
  const int experts = call.num_local_experts, pairs = (experts + 1) / 2, total = sources * pairs;
#pragma unroll 1
  for (int base = thread; base < total; base += kUnroll * threads) {
    const std::byte* at[kUnroll];
    int from[kUnroll], expert[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int index = min(base + i * threads, total - 1);
      from[i] = static_cast<int>(static_cast<unsigned>(index) * call.count_reciprocal >> kExpertBits);
      expert[i] = 2 * (index - from[i] * pairs);
      at[i] = region_from(call, turn, from[i]) + word_at(call, call.cut.count_word(static_cast<unsigned>(expert[i])));
    }
    std::uint64_t low[kUnroll] = {}, high[kUnroll] = {};
    const auto is_there = [&](int i) {
      return protocol::count_epoch(low[i]) == turn.number && protocol::count_epoch(high[i]) == turn.number;
    };
    unsigned dead = block.dead;
    for (int missing = -1;; dead |= 1u << missing) {  // masked, or this block is broken
      const bool all = await(call, block, turn, missing, kWaitInReceive, [&] {
        missing = -1;
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) ptx::load_two_words(at[i], low[i], high[i]);
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
          if ((dead >> from[i] & 1) == 0 && !is_there(i)) missing = from[i];
        }
        return missing < 0 || retreats(block);
      });
      if (all || missing < 0) break;
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (base + i * threads >= total) break;
      const auto count = [&](std::uint64_t word) {
        return is_there(i) ? min(static_cast<int>(protocol::count_value(word)), call.max_tokens) : 0;
      };
      std::int32_t* const to = shared.counts + from[i] * experts + expert[i];
      to[0] = count(low[i]);
      if (expert[i] + 1 < experts) to[1] = count(high[i]);
    }
  }
  __syncwarp();  // see await()
}

/// Who writes the counts for the caller: with masks it must be known who takes part, and the clerk knows.
__device__ __forceinline__ bool clerk_writes_counts(const CallParams& call) {
  return call.team.masked != nullptr;
}
/// Threads [0, threads) of the clerk block, or of the one that serves in its place: counts, ranges and statistics for the caller.
__device__ inline void write_counts(const DispatchParams& p, const Shared& shared, int thread, int threads) {
  const CallParams& call = p.call;
  const Block& block = shared.block;
  const int ranks = call.team.num_ranks, experts = call.num_local_experts;
  // Once only, whoever else serves this share: statistics are added.
  if (!gate_opens(block) || any_lane(look_at(block.broken) != 0)) return;
  constexpr int kUnroll = 4;
#pragma unroll 1
  for (int first = thread; first < experts; first += kUnroll * threads) {
    std::int32_t rows[kUnroll] = {};
#pragma unroll 1
    for (int source = 0; source < ranks; ++source) {
      const bool present = !clerk_writes_counts(call) || (block.present >> source & 1) != 0;
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int expert = first + i * threads;
        if (expert >= experts) break;
        const std::int32_t count = present ? shared.counts[source * experts + expert] : 0;
        p.range[expert * ranks + source] = static_cast<std::int64_t>(rows[i]) << 32 | count;
        rows[i] += count;
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int expert = first + i * threads;
      if (expert >= experts) break;
      p.counts[expert] = rows[i];
      if (p.received != nullptr) p.received[expert] += rows[i];
    }
  }
}

// ---- rows of tokens that there are not ------------------------------------------------------------------------------

/// One warp: a share of the rows of tokens that their sources do not have. tokens_at(step): of the source there.
template <class TokensAt>
__device__ __forceinline__ void forget_rest(const DispatchParams& p, int share, TokensAt&& tokens_at) {
  const CallParams& call = p.call;
  const int apart = static_cast<int>(gridDim.x) * kLanes, most = call.max_tokens * call.top_k;
#pragma unroll 1
  for (int step = 0; step < call.team.num_ranks; ++step) {
    std::int32_t* const rows = p.rows + source_at(call, step) * most;
#pragma unroll 1
    for (int at = tokens_at(step) * call.top_k + share * kLanes + lane_index(); at < most; at += apart) rows[at] = -1;
  }
}

/// The comm warp: this block's share. A block that retreats leaves it to whoever serves in its place.
__device__ __forceinline__ void forget_rest(const DispatchParams& p, Block& block, const Turn& turn) {
  Head head;
  if (lane_index() < p.call.team.num_ranks) head = await_head(p.call, block, turn, lane_index());
  __syncwarp();
  if (any_lane(retreats(block))) return;
  forget_rest(p, this_share(), [&](int step) { return from_lane(head.tokens, step); });
}

// ---- data warps ----------------------------------------------------------------------------------------------------

/// One look at a strip that carries its flag. All lanes; true in those whose part is there.
template <bool kFp8>
__device__ __forceinline__ bool see_strip(const std::byte* from, Form form, const Turn& turn, RowStrip<kFp8>& row) {
  constexpr int kVectors = kFp8 ? 1 : 2, kScales = kFp8 ? 4 : 0;
  if (form == Form::kWords) return load_words(from, row, turn.number);
  Packets<kVectors> packets;
  const bool there = load_packets<kVectors, kScales>(from, packets, turn.number);
  __syncwarp();
  unpack(packets, row);
  return there;
}

template <bool kFp8>
__device__ __forceinline__ void load_record(const CallParams& call, const std::byte* record, int strip,
                                            RowStrip<kFp8>& row) {
  constexpr int kVectors = kFp8 ? 1 : 2;
  const std::byte* const from = record + (strip * (kVectors * kLanes) + lane_index()) * 16;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) row.data[v] = ptx::load_l2(from + v * kLanes * 16);
  if (kFp8) {
    row.scale =
        __ldcg(reinterpret_cast<const std::uint32_t*>(record + call.cut.strips * 512) + strip * 4 + lane_index() / 8);
  }
}

/// A strip of a peer that was taken before it was known whether it is wanted.
template <bool kFp8>
struct Early {
  int step = -1, token = -1, strip = 0;
  Form form = Form::kRecords;  ///< what was looked for; records: nothing was
  RowStrip<kFp8> row;
};

/// Receivers, until the clerk knows more: looks for this block's first strip of the first source that the warp has, in the form
/// of the own rows.
template <bool kFp8>
__device__ __forceinline__ Early<kFp8> look_early(const CallParams& call, const Shared& shared, const Role& role,
                                                  const Turn& turn) {
  Early<kFp8> early;
  const Item item = first_item(call);
  const int strip = item.first_strip + role.warp;
  const Form form = own_form(call, turn);
  const int step = __ffs(static_cast<int>(role.steps)) - 1;
  if (form == Form::kRecords || step < 0 || strip >= item.end_strip) return early;
  if (item.first >= min(call.max_tokens, form == Form::kWords ? kMostWordTokens : kMostPacketTokens)) return early;
  const std::byte* const from =
      region_from(call, turn, source_at(call, step)) + strip_at(call, form, item.first, strip);
  bool there = false;
  while (!there && !any_lane(look_at(shared.posted) != 0)) {  // the clerk's wait has a limit
    there = __all_sync(kAllLanes, see_strip<kFp8>(from, form, turn, early.row));
  }
  if (!there) return early;
  early.step = step;
  early.token = item.first;
  early.strip = strip;
  early.form = form;
  return early;
}

/// Stores a strip to the rows of the chosen experts: bits of `choices`, entries of `targets` in shared memory.
template <bool kFp8>
__device__ __forceinline__ void expand(const DispatchParams& p, const Target* targets, unsigned choices, int strip,
                                       const RowStrip<kFp8>& row) {
  constexpr int kVectors = kFp8 ? 1 : 2, kBytes = kFp8 ? 1 : 2;
  const int element = element_of<kFp8>(strip, 0), left_over = static_cast<int>(p.call.hidden) - element;
  std::uint32_t scale = row.scale;
  bool has_scale = kFp8 && lane_index() % 8 == 0 && left_over > 0;
  std::int64_t scale_offset = 0;
  if constexpr (kFp8) {
    int column = strip * 4 + lane_index() / 8;
    if (p.wire == Wire::kUE8M0) {
      scale = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) scale |= (from_lane(row.scale, i * 8) >> 23 & 0xFFu) << (8 * i);
      has_scale = lane_index() == 0;
      column = strip;
    }
    scale_offset = column * p.scale_column_stride;
  }
#pragma unroll 1
  for (; choices != 0; choices &= choices - 1) {
    const Target target = targets[__ffs(static_cast<int>(choices)) - 1];
    std::byte* const to = target.row + element * kBytes;
    if (left_over > 0) *reinterpret_cast<uint4*>(to) = row.data[0];
    if constexpr (kVectors == 2) {
      if (left_over > kLanes * 8) *reinterpret_cast<uint4*>(to + kLanes * 16) = row.data[1];
    }
    if (has_scale) target.scales[scale_offset] = scale;
  }
}

/// Waits for a strip of a peer. False in all lanes: it will not come, or this block retreats.
template <bool kFp8>
__device__ __forceinline__ bool take_strip(const CallParams& call, Block& block, const Turn& turn, Form form,
                                           int source, int token, int strip, RowStrip<kFp8>& row) {
  const std::byte* const from = region_from(call, turn, source) + strip_at(call, form, token, strip);
  if (form == Form::kRecords) {
    load_record<kFp8>(call, from, strip, row);
    return true;
  }
  bool there = false;
  (void)await_together(call, block, turn, source, kWaitInReceive, [&] {
    there = __all_sync(kAllLanes, see_strip<kFp8>(from, form, turn, row));
    return there || any_lane(retreats(block));
  });
  return there;
}

/// Expands strips of a token, up to `end`.
template <bool kFp8, int kWays>
__device__ __forceinline__ void expand(const DispatchParams& p, const Target* targets, unsigned choices, int strip,
                                       int apart, int end, const Strips<kFp8, kWays>& rows) {
#pragma unroll
  for (int k = 0; k < kWays; ++k) {
    if (strip + k * apart < end) expand<kFp8>(p, targets, choices, strip + k * apart, rows.at[k]);
  }
}

/// Choices of number `i` of a round's span that go somewhere, bits.
__device__ __forceinline__ unsigned hits_of(const CallParams& call, const Round& round, int i) {
  return round.hits >> (i * call.top_k) & ((1u << (call.top_k - 1)) * 2 - 1);
}

/// The numbers of a round's span that this warp takes and that go somewhere, one after the other: use(number, load(number)); the
/// next one is on its way meanwhile.
template <class Load, class Use>
__device__ __forceinline__ void for_each_number(const CallParams& call, const Round& round, const Role& role,
                                                Load&& load, Use&& use) {
  const auto from = [&](int i) {
    while (i < round.span.count && (hits_of(call, round, i) == 0 || (role.steps >> round.span.step_of(i) & 1) == 0))
      ++i;
    return i;
  };
  int i = from(0);
  if (i >= round.span.count) return;
  auto next = load(i);
#pragma unroll 1
  while (i < round.span.count) {
    const auto row = next;
    const int number = i;
    i = from(i + 1);
    if (i < round.span.count) next = load(i);
    use(number, row);
  }
}

/// A round of records, or of own rows that would travel so.
template <bool kFp8, int kWays>
__device__ __forceinline__ void serve_records(const DispatchParams& p, const Round& round, const Role& role,
                                              const Turn& turn, const OwnStrips<kFp8, kWays>& own) {
  const CallParams& call = p.call;
  const Span& span = round.span;
#pragma unroll 1
  for (int strip = round.first_strip + role.warp; strip < round.end_strip; strip += kWays * role.warps) {
    const auto put = [&](int i, const Strips<kFp8, kWays>& rows) {
      expand<kFp8, kWays>(p, round.targets + i * call.top_k, hits_of(call, round, i), strip, role.warps,
                          round.end_strip, rows);
    };
    if (role.receives) {
      for_each_number(
          call, round, role,
          [&](int i) {
            const std::byte* const record = region_from(call, turn, source_at(call, span.step_of(i))) +
                                            strip_at(call, Form::kRecords, span.token_of(i), strip);
            Strips<kFp8, kWays> rows;
#pragma unroll
            for (int k = 0; k < kWays; ++k) {
              if (strip + k * role.warps < round.end_strip) {
                load_record<kFp8>(call, record, strip + k * role.warps, rows.at[k]);
              }
            }
            return rows;
          },
          put);
    } else {
      const auto holds = [&](int token) { return token == own.token && strip == own.strip; };
      for_each_number(
          call, round, role,
          [&](int i) {
            const int token = span.token_of(i);
            return holds(token) ? RawStrips<kWays>{} : load_x<kFp8, kWays>(p, token, strip, role.warps);
          },
          [&](int i, const RawStrips<kWays>& raw) {
            put(i, holds(span.token_of(i)) ? own.rows : cast<kFp8, kWays>(p, raw, strip, role.warps));
          });
    }
  }
}

/// Senders (own rows) and receivers (peers' rows), until the clerk says that this was the last round.
template <bool kFp8, int kWays>
__device__ __forceinline__ void serve_rounds(const DispatchParams& p, Shared& shared, const Role& role,
                                             const Turn& turn, const OwnStrips<kFp8, kWays>& own,
                                             const Early<kFp8>& early) {
  const CallParams& call = p.call;
  Block& block = shared.block;
#pragma unroll 1
  for (int parity = 0;; parity ^= 1) {
    ptx::barrier_sync(kRoundBarrier, role.round_threads());  // and whoever is here is through with the round before
    const Round& round = shared.round[parity];
    const bool in_records = round.span.count != 0 && round.in_records;
    if (in_records) serve_records<kFp8, kWays>(p, round, role, turn, own);
#pragma unroll 1
    for (int i = 0; i < round.span.count && !in_records; ++i) {
      const unsigned choices = hits_of(call, round, i);
      const int step = round.span.step_of(i), token = round.span.token;
      if (choices == 0 || (role.steps >> step & 1) == 0) continue;
      const int source = source_at(call, step);
      const Form form = round.form[i];
#pragma unroll 1
      for (int strip = round.first_strip + role.warp; strip < round.end_strip; strip += kWays * role.warps) {
        Strips<kFp8, kWays> rows = own.rows;
        if (step != 0) {
          bool gone = false;
#pragma unroll
          for (int k = 0; k < kWays; ++k) {
            const int at = strip + k * role.warps;
            rows.at[k] = early.row;
            if (at >= round.end_strip) continue;
            if (step == early.step && token == early.token && at == early.strip && form == early.form) continue;
            if (take_strip<kFp8>(call, block, turn, form, source, token, at, rows.at[k])) continue;
            gone = any_lane(look_at(block.broken) != 0 || retreats(block));
            rows.at[k] = RowStrip<kFp8>{};  // the peer died in mid-send: zeros where rows were counted
          }
          if (gone) break;
        } else if (token != own.token || strip != own.strip) {
          rows = cast<kFp8, kWays>(p, load_x<kFp8, kWays>(p, token, strip, role.warps), strip, role.warps);
        }
        expand<kFp8, kWays>(p, round.targets + i * call.top_k, choices, strip, role.warps, round.end_strip, rows);
      }
    }
    if (round.last) return;
  }
}

}  // namespace anyep::cuda::low_latency::outward
