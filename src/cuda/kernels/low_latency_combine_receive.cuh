// Low-latency combine, the home's side: own rows, answers or rows per choice, added in ranks' and choices' order.
#pragma once

#include <cstdint>

#include "cuda/kernels/low_latency_combine_answer.cuh"

namespace anyep::cuda::low_latency::homeward {

/// Ranks whose answers count, bits, this one included. Where masks are allowed, the clerk has found out.
__device__ __forceinline__ unsigned answering(const CallParams& call, const Block& block) {
  return call.team.masked == nullptr ? (1u << call.team.num_ranks) - 1 : block.present;
}

/// A strip of a rank's answer. False: it will not come, or this block retreats.
__device__ __forceinline__ bool take_answer(const CallParams& call, Block& block, const Turn& turn, Form form, int rank,
                                            int token, int strip, Strip<1, 0>& answer) {
  const std::byte* const region = region_from(call, turn, rank);
  bool came = true;
  if (form == Form::kWords) {
    const std::byte* const from = region + answer_offset(call, Form::kWords, token, strip);
    (void)await(call, block, turn, rank, kWaitInReceive, [&] {
      came = load_words(from, answer, turn.number);
      return came || retreats(block);
    });
    came = __all_sync(kAllLanes, came);
  } else if (form == Form::kPackets) {
    const std::byte* const from = region + answer_offset(call, Form::kPackets, token, strip);
    Packets<1> packets;
    (void)await(call, block, turn, rank, kWaitInReceive, [&] {
      came = load_packets<1, 0>(from, packets, turn.number);
      return came || retreats(block);
    });
    came = __all_sync(kAllLanes, came);
    unpack(packets, answer);
  } else {
    const std::byte* const from = region + answer_offset(call, form, token, strip) + lane_index() * 16;
    answer.data[0] = ptx::load_l2(from);
  }
  return came;
}

/// An own token as its home knows it, in lanes: its choices, its rows here.
struct OwnToken {
  int token = -1;
  HomeChoice choice;
  std::int32_t entry = -1;

  __device__ __forceinline__ void load(const CombineParams& p, int which) {
    const RawEntry at_entry(p, p.call.team.rank, which);
    const RawChoice at_choice(p.call, which);
    token = which;
    choice = at_choice.read(p.call);
    entry = at_entry.read(p);
  }
  /// Ranks that host a choice, bits.
  __device__ __forceinline__ unsigned hosts() const {
    return __reduce_or_sync(kAllLanes, choice.rank >= 0 ? 1u << choice.rank : 0);
  }
  /// What it asks this rank, in lanes.
  __device__ __forceinline__ Asked asked_here(const CallParams& call) const { return choice.asked_of(call.team.rank); }
};

/// This rank's own share of one strip of an own token.
__device__ __forceinline__ Vectors<false> weigh_own(const CombineParams& p, const OwnToken& own, int strip,
                                                    const Held& held) {
  return weigh(p, own.entry, own.asked_here(p.call), strip, held);
}

/// One strip of a token whose ranks add. `present`: ranks whose answer counts, this one included; `mine`: its own share.
__device__ __forceinline__ void add_answers(const CombineParams& p, Block& block, const Turn& turn, Form form,
                                            unsigned present, const OwnToken& own, int strip,
                                            const Vectors<false>& mine) {
  const CallParams& call = p.call;
  Sums<false> total;
  unsigned hosts = own.hosts() & present;
#pragma unroll 1
  for (; hosts != 0; hosts &= hosts - 1) {
    const int rank = __ffs(static_cast<int>(hosts)) - 1;
    Strip<1, 0> answer;
    answer.data[0] = mine.at[0];
    if (rank != call.team.rank && !take_answer(call, block, turn, form, rank, own.token, strip, answer)) {
      if (any_lane(retreats(block))) return;  // whoever serves in its place has all of them
      continue;
    }
    add(total, Vectors<false>{{answer.data[0]}});
  }
  store_strip<false>(p.out + own.token * p.out_row_stride, call.hidden, strip, rounded(total));
}

/// Those of the `wanted` ranks whose flag of a chunk has come, bits, or kLeaves: this block retreats. One warp waits, a rank per lane;
/// all at home get its answer (`wanted` is that warp's), and its acquires (pattern B).
constexpr unsigned kLeaves = 1u << 31;
__device__ __forceinline__ unsigned await_chunk(const CallParams& call, Shared& shared, const Role& role,
                                                const Turn& turn, int chunk, unsigned wanted, int& parity) {
  Block& block = shared.block;
  if (role.warp == 0) {
    const int rank = lane_index();
    bool came = (wanted & answering(call, block)) >> rank & 1;
    if (came) came = await_flag(call, block, turn, rank, chunk);
    const unsigned present = __ballot_sync(kAllLanes, came);
    const bool leaves = any_lane(retreats(block));
    if (rank == 0) shared.present[parity] = leaves ? kLeaves : present;
  }
  ptx::barrier_sync(kHomeBarrier, role.home_threads());
  const unsigned present = shared.present[parity];
  parity ^= 1;
  return present;
}

/// An own token, and this rank's share of one strip, as far as it is summed: of a block's first item ahead.
struct OwnStrip {
  OwnToken own;
  int strip = -1;
  Vectors<false> mine;

  __device__ __forceinline__ void turn_to(const CombineParams& p, int token, int which) {
    if (token != own.token) {
      own.load(p, token);
      strip = -1;
    }
    if (which == strip) return;
    Held held;
    load_rows(p, own.entry, which, held);
    mine = weigh_own(p, own, which, held);
    strip = which;
  }
};

/// A share of the own tokens.
__device__ __forceinline__ void receive_answers(const CombineParams& p, Shared& shared, const Role& role,
                                                const Turn& turn, int share, OwnStrip& ahead, int& parity) {
  const CallParams& call = p.call;
  Block& block = shared.block;
  const int tokens = call.routing.num_tokens;
  const Form form = own_form(call, turn);
  const bool in_records = form == Form::kRecords;
#pragma unroll 1
  for (int at = share; at < num_items(call, in_records, tokens); at += static_cast<int>(gridDim.x)) {
    const Item item = item_of(call, in_records, tokens, at);
    unsigned present = answering(call, block);
    if (in_records) {
      const unsigned me = 1u << call.team.rank;
      const int strip = item.first_strip + role.warp;
      if (strip < item.end_strip) ahead.turn_to(p, item.first, strip);  // while the answers are on their way
      present = await_chunk(call, shared, role, turn, at, ~me, parity) | me;
      if ((present & kLeaves) != 0) return;
    }
#pragma unroll 1
    for (int token = item.first; token < item.end; ++token) {
#pragma unroll 1
      for (int strip = item.first_strip + role.warp; strip < item.end_strip; strip += role.warps) {
        ahead.turn_to(p, token, strip);
        add_answers(p, block, turn, form, present, ahead.own, strip, ahead.mine);
      }
    }
  }
}

/// One strip of a token whose rows came per choice.
template <bool kLogFmt>
__device__ __forceinline__ void add_choices(const CombineParams& p, unsigned present, int token, int strip,
                                            const HomeChoice& choice, const std::byte* record) {
  const CallParams& call = p.call;
  const bool counts = choice.rank >= 0 && (present >> choice.rank & 1) != 0;
  // Exact: all choices count as one rank's, whose sum is rounded once and nothing is added.
  unsigned hosts = __reduce_or_sync(kAllLanes, counts ? 1u << (p.exact ? 0 : choice.rank) : 0);
  Sums<kLogFmt> total;
  Vectors<kLogFmt> part{};
#pragma unroll 1
  for (; hosts != 0; hosts &= hosts - 1) {
    const int rank = __ffs(static_cast<int>(hosts)) - 1;
    const unsigned choices = __ballot_sync(kAllLanes, counts && (p.exact || choice.rank == rank));
    part = weigh_records<kLogFmt>(choices, record, choice.ask.weight, static_cast<int>(call.hidden), strip);
    if (!p.exact) add(total, part);
  }
  if (!p.exact) part = rounded(total);
  store_strip<kLogFmt>(p.out + token * p.out_row_stride, call.hidden, strip, part);
}

/// Index of this lane's expert among the token's distinct experts at its rank, ascending. All lanes.
__device__ __forceinline__ int index_at_rank(const CallParams& call, const HomeChoice& choice) {
  const int key = choice.rank >= 0 ? choice.rank * kMaxExperts + choice.ask.expert : -1;
  const bool first = __ffs(static_cast<int>(__match_any_sync(kAllLanes, key))) - 1 == lane_index();
  int index = 0;
  for (int other = 0; other < call.top_k; ++other) {
    const int its_key = from_lane(key, other);
    const bool its_first = from_lane(first ? 1 : 0, other) != 0;
    index += its_first && its_key >= 0 && its_key < key && its_key / kMaxExperts == choice.rank;
  }
  return index;
}

template <bool kLogFmt>
__device__ inline void receive_choices(const CombineParams& p, Shared& shared, const Role& role, const Turn& turn,
                                       int share, int& parity) {
  const CallParams& call = p.call;
  const int tokens = call.routing.num_tokens;
  for (int chunk = share; chunk < num_chunks(call.max_tokens); chunk += static_cast<int>(gridDim.x)) {
    const Item item = item_of(call, true, call.max_tokens, chunk);
    if (item.first >= tokens) break;
    unsigned hosts = 0;
    for (int token = item.first; role.warp == 0 && token < min(item.end, tokens); ++token) {
      const int rank = choice_of_lane(call, token).rank;
      hosts |= __reduce_or_sync(kAllLanes, rank >= 0 ? 1u << rank : 0);
    }
    const unsigned present = await_chunk(call, shared, role, turn, chunk, hosts, parity);
    for (int token = item.first; token < min(item.end, tokens); ++token) {
      const HomeChoice choice = choice_of_lane(call, token);
      const int index = index_at_rank(call, choice);
      const std::byte* record = nullptr;
      if (choice.rank >= 0) {
        record = region_from(call, turn, choice.rank) + call.at.records +
                 call.cut.record(static_cast<unsigned>(token), index);
      }
      for (int strip = role.warp; strip < call.cut.strips; strip += role.warps) {
        add_choices<kLogFmt>(p, present, token, strip, choice, record);
      }
    }
  }
}

}  // namespace anyep::cuda::low_latency::homeward
