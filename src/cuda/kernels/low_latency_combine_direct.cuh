// Low-latency combine where a block's warps have more than one strip of a row each, and a chunk is a token: what is asked first is
// answered without a round, two strips at once.
//
// Such batches are bound by the link, which is idle until the first answers leave. So those who answer read for themselves what is asked,
// and have the rows of both strips in registers by then. Own rows come behind: a load waits until the link has taken what was stored
// before it, but the link is busy meanwhile, and what names the own rows has been loaded before.
#pragma once

#include <cstdint>

#include "cuda/kernels/low_latency_combine_clerk.cuh"
#include "cuda/kernels/low_latency_combine_receive.cuh"

namespace anyep::cuda::low_latency::homeward {

/// Strips of a row that a warp takes at once, as far apart as it has colleagues.
constexpr int kAtOnce = 2;
struct TwoStrips {
  Vectors<false> at[kAtOnce];
};

/// Rows of one token, as many at a time as there are registers for: of the lanes' entries, in order, those without one left out.
struct HeldPairs {
  static constexpr int kRows = 5;  ///< with more, registers spill
  /// Of slabs: a row's place is a number of 32 bits, in steps of what rows are aligned to.
  static constexpr std::int64_t kRowAlignment = 16, kMostBytes = kRowAlignment << 32;
  TwoStrips rows[kRows];

  /// Loads the first rows of the lanes in `hits`. All lanes; nothing waits.
  __device__ __forceinline__ void load(const CombineParams& p, std::int32_t entry, unsigned hits, int strip,
                                       int apart) {
    // All places first: a shuffle behind a branch asks whether lanes have parted.
    const auto row = static_cast<std::uint32_t>((row_at(p, max(entry, 0)) - p.x) / kRowAlignment);
    const int count = __popc(hits);
    std::uint32_t at[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      at[i] = from_lane(row, __ffs(static_cast<int>(hits)) - 1);
      hits &= hits - 1;
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const std::byte* from = p.x + at[i] * kRowAlignment + element_of<false>(strip, 0) * 2;
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const bool here = element_of<false>(strip + k * apart, 0) < p.call.hidden;
        rows[i].at[k].at[0] = here && i < count ? ptx::load_l2(from) : make_uint4(0, 0, 0, 0);
        from += apart * (kSumElements * 2);
      }
    }
  }
  __device__ __forceinline__ void load(const CombineParams& p, std::int32_t entry, int strip, int apart) {
    load(p, entry, __ballot_sync(kAllLanes, entry >= 0), strip, apart);
  }
  /// weigh() of what load() has loaded; rows beyond are loaded here.
  __device__ __forceinline__ TwoStrips weigh(const CombineParams& p, std::int32_t entry, const Asked& asked, int strip,
                                             int apart) {
    TwoStrips sum;
    if (__any_sync(kAllLanes, asked.expert != (entry >= 0 ? entry >> kRowBits : -1))) {
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) sum.at[k] = weigh_slowly(p, entry, asked, strip + k * apart);
      return sum;
    }
    Sums<false> sums[kAtOnce];
    for (unsigned hits = __ballot_sync(kAllLanes, entry >= 0);;) {
      const int count = __popc(hits);
      float weights[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        weights[i] = from_lane(asked.weight, __ffs(static_cast<int>(hits)) - 1);
        hits &= hits - 1;
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (i >= count) break;
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) add_weighted(sums[k], rows[i].at[k], weights[i]);
      }
      if (hits == 0) break;
      load(p, entry, hits, strip, apart);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) sum.at[k] = rounded(sums[k]);
    return sum;
  }
};

// ---- answers -------------------------------------------------------------------------------------------------------

/// Strips, before `end`, of this rank's sum of a home's token, as it asks for them. `held`: rows of strip `held_strip` of that token.
__device__ __forceinline__ void answer_token(const CombineParams& p, const Role& role, const Turn& turn, Form form,
                                             int home, int token, std::int32_t entry, const Asked& asked,
                                             int first_strip, int end, int held_strip, HeldPairs& held) {
#pragma unroll 1
  for (int strip = first_strip + role.warp; strip < end; strip += kAtOnce * role.warps) {
    if (strip != held_strip) held.load(p, entry, strip, role.warps);
    held_strip = -1;
    const TwoStrips sum = held.weigh(p, entry, asked, strip, role.warps);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int at = strip + k * role.warps;
      if (at < end) put_answer(p.call, turn, form, home, token, at, sum.at[k]);
    }
  }
}

/// What a home asks about a token, a choice per lane.
struct Ask {
  int tokens;  ///< of the home
  Form form;   ///< likewise
  Asked asked;
  unsigned ranks;  ///< that this block may send to, bits
};
/// All lanes. The clerk's wait for the same has a limit; what it has found is in shared memory, where no load waits behind stores.
__device__ __forceinline__ Ask await_ask(const CallParams& call, const Shared& shared, const Turn& turn, int step,
                                         int token) {
  const int home = home_at(call, step), choice = min(lane_index(), call.top_k - 1);
  const std::byte* const words = reinterpret_cast<const std::byte*>(
      &word_in(call, region_from(call, turn, home), call.cut.table_word(static_cast<unsigned>(token), choice)));
  Ask ask;
  while (true) {
    std::uint64_t expert = 0, weight = 0;
    ptx::load_two_words(words, expert, weight);
    ask.ranks = *static_cast<const volatile unsigned*>(&shared.ranks);
    if (__all_sync(kAllLanes,
                   is_fresh(expert, turn.number) && is_fresh(weight, turn.number) && (ask.ranks & kRanksKnown) != 0)) {
      ptx::fence_block();  // the clerk has acquired these ranks' marks (pattern F, litmus slot-reuse-cta)
      const std::uint32_t head = from_lane(head_of_ask(expert), 0);
      ask.tokens = tokens_of(head);
      ask.form = form_of(head);
      if (lane_index() < call.top_k) ask.asked = read_ask(call, expert, weight);
      return ask;
    }
    if (!any_lane(look_at(shared.posted) != 0)) continue;
    ptx::fence_block();  // likewise; and what it has found was there before it said so
    ask.ranks = shared.ranks;
    ask.tokens = shared.block.tokens[home];
    ask.form = shared.block.form[home];
    if (lane_index() < call.top_k) ask.asked = shared.first[step * call.top_k + choice];
    return ask;
  }
}

/// Is a home's token `item.first`, of a block's share, answered before any round? As records, if it is a chunk, and the share's.
__device__ __forceinline__ bool comes_first(const Item& item, int tokens, Form form) {
  return item.first < tokens &&
         (form != Form::kRecords || (item.first == this_share() && !are_several_a_chunk(tokens)));
}

/// Those that answer, before any round: the share's first token of every home of theirs; the group's first warp tells which chunks that
/// completes. `entry`, `held`: of the first home, strip `strip` and on, -1 where a warp has none.
__device__ __forceinline__ void answer_first(const CombineParams& p, Shared& shared, const Role& role, const Turn& turn,
                                             const Item& item, std::int32_t entry, int strip, HeldPairs& held) {
  const CallParams& call = p.call;
  if (role.steps == 0 || item.first >= call.max_tokens) return;
#pragma unroll 1
  for (unsigned steps = role.steps;;) {
    const int step = __ffs(static_cast<int>(steps)) - 1, home = home_at(call, step);
    steps &= steps - 1;
    RawEntry next;  // on its way while this home is waited for
    if (steps != 0) next = RawEntry(p, home_at(call, __ffs(static_cast<int>(steps)) - 1), item.first);
    const Ask ask = await_ask(call, shared, turn, step, item.first);
    if (any_lane(retreats(shared.block))) return;
    const bool first = comes_first(item, ask.tokens, ask.form), whole = ask.form == Form::kRecords;
    if (first && whole && role.warp == 0 && lane_index() == 0) shared.release[0].chunk[home] = item.first;
    if (first && (ask.ranks >> home & 1) != 0 && any_lane(ask.asked.expert >= 0)) {
      answer_token(p, role, turn, ask.form, home, item.first, entry, ask.asked, whole ? 0 : item.first_strip,
                   whole ? call.cut.strips : item.end_strip, strip, held);
    }
    if (steps == 0) return;
    entry = next.read(p);
    if (strip >= 0) held.load(p, entry, strip, role.warps);
  }
}

/// What is asked in one round. Out of line: mostly there is none.
static __device__ __noinline__ void answer_round(const CombineParams& p, const Shared& shared, const Role& role,
                                                 const Turn turn, const Round& round) {
  HeldPairs held;
  for_each_asked(p.call, shared, role, round, [&](int, int home, int token, int i, const Asked& asked) {
    answer_token(p, role, turn, round.form[round.span.place_of(i)], home, token, RawEntry(p, home, token).read(p),
                 asked, round.item.first_strip, round.item.end_strip, -1, held);
  });
}

/// The clerk finds the first asks, for those who answer and have not seen them yet, and the heads. What is left for rounds: `left`.
__device__ __forceinline__ Begun find_first(const Clerk<false>& clerk, bool& left) {
  const CallParams& call = clerk.call;
  Block& block = clerk.shared.block;
  const int ranks = call.team.num_ranks, share = this_share(), blocks = static_cast<int>(gridDim.x);
  const Item item = first_item(call);
  Begun begun{~0u, 0};
  left = false;
#pragma unroll 1
  for (int first = 1; first < ranks; first += call.tokens_per_warp) {
    const int end = min(ranks, first + call.tokens_per_warp), step = first + clerk.lane.number;
    const Found found = find(clerk, Span::steps(first, end, item.first));
    const bool mine = step < end, in_records = mine && found.head.form == Form::kRecords;
    if (mine) clerk.shared.first[first * call.top_k + lane_index()] = found.asked;
    keep_head(block, mine && clerk.lane.choice == 0, home_at(call, mine ? step : 0), found.head);
    const bool done = !in_records || comes_first(item, found.head.tokens, Form::kRecords);
    begun.records |= __reduce_or_sync(kAllLanes, in_records && done ? 1u << step : 0);
    left = left || any_lane(mine && share + (done ? blocks : 0) < num_items(call, in_records, found.head.tokens));
  }
  ptx::fence_block();
  if (lane_index() == 0) tell(clerk.shared.posted, 1);
  return begun;
}
/// run_clerk() where those who answer do not wait for the first rounds.
__device__ __forceinline__ void run_clerk_beside(const CombineParams& p, Shared& shared, const Turn& turn) {
  Block& block = shared.block;
  Clerk<false> clerk(p, shared, turn, 0);
  bool left;
  const Begun begun = find_first(clerk, left);
  if (lane_index() == 0) block.present |= 1u << p.call.team.rank;
  __syncwarp();
  tell_home(p.call);
  // A block that retreats has perhaps seen some heads only: whoever serves in its place answers.
  if (left && !any_lane(retreats(block))) clerk.parity = serve<false>(p, shared, turn, 0, this_share(), begun);
  serve_others(clerk);
}

// ---- at home -------------------------------------------------------------------------------------------------------

/// This rank's share of strips of an own token. Out of line: the first ones are summed while others' are on their way.
static __device__ __noinline__ TwoStrips sum_own(const CombineParams& p, const OwnToken own, int strip, int apart) {
  HeldPairs held;
  held.load(p, own.entry, strip, apart);
  return held.weigh(p, own.entry, own.asked_here(p.call), strip, apart);
}
/// An own token, and this rank's share of its strips from `strip` on, as far as they are summed.
struct OwnPair {
  OwnToken own;
  int strip = -1;
  TwoStrips mine;

  __device__ __forceinline__ void turn_to(const CombineParams& p, const Role& role, int token, int which) {
    if (token != own.token) {
      own.load(p, token);
      strip = -1;
    }
    if (which != strip) mine = sum_own(p, own, which, role.warps);
    strip = which;
  }
};

/// add_answers() out of line: two strips a warp are mostly records.
static __device__ __noinline__ void add_one_strip(const CombineParams& p, Block& block, const Turn turn, Form form,
                                                  unsigned present, const OwnToken own, int strip,
                                                  const Vectors<false> mine) {
  add_answers(p, block, turn, form, present, own, strip, mine);
}
/// The same for strips, before `end`, of answers that are records and there.
__device__ __forceinline__ void add_records(const CombineParams& p, const Turn& turn, unsigned present,
                                            const OwnPair& ahead, int apart, int end) {
  const CallParams& call = p.call;
  const OwnToken& own = ahead.own;
  const std::byte* const from =
      region_from(call, turn, 0) + answer_offset(call, Form::kRecords, own.token, ahead.strip) + lane_index() * 16;
  Sums<false> total[kAtOnce];
#pragma unroll 1
  for (unsigned hosts = own.hosts() & present; hosts != 0; hosts &= hosts - 1) {
    const int rank = __ffs(static_cast<int>(hosts)) - 1;
    TwoStrips answer = ahead.mine;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (rank == call.team.rank || ahead.strip + k * apart >= end) continue;
      answer.at[k].at[0] = ptx::load_l2(from + static_cast<unsigned>(rank) * call.at.source_bytes + k * apart * 512);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) add(total[k], answer.at[k]);
  }
#pragma unroll
  for (int k = 0; k < kAtOnce; ++k) {
    const int strip = ahead.strip + k * apart;
    if (strip < end) store_strip<false>(p.out + own.token * p.out_row_stride, call.hidden, strip, rounded(total[k]));
  }
}

/// A share of the own tokens.
__device__ __forceinline__ void receive_pairs(const CombineParams& p, Shared& shared, const Role& role,
                                              const Turn& turn, int share, OwnPair& ahead, int& parity) {
  const CallParams& call = p.call;
  const Form form = own_form(call, turn);
  const bool in_records = form == Form::kRecords;
  const unsigned me = 1u << call.team.rank;
#pragma unroll 1
  for (int at = share; at < num_items(call, in_records, call.routing.num_tokens); at += static_cast<int>(gridDim.x)) {
    const Item item = item_of(call, in_records, call.routing.num_tokens, at);
    unsigned present = answering(call, shared.block);
    if (in_records) {
      present = await_chunk(call, shared, role, turn, at, ~me, parity) | me;
      if ((present & kLeaves) != 0) return;
    }
#pragma unroll 1
    for (int token = item.first; token < item.end; ++token) {
#pragma unroll 1
      for (int strip = item.first_strip + role.warp; strip < item.end_strip; strip += kAtOnce * role.warps) {
        ahead.turn_to(p, role, token, strip);
        if (in_records) {
          add_records(p, turn, present, ahead, role.warps, item.end_strip);
          continue;
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int which = strip + k * role.warps;
          if (which < item.end_strip)
            add_one_strip(p, shared.block, turn, form, present, ahead.own, which, ahead.mine.at[k]);
        }
      }
    }
  }
}

/// A data warp; all answer, and then take what comes home.
__device__ __forceinline__ void run_direct(const CombineParams& p, Shared& shared, const Role& role) {
  const CallParams& call = p.call;
  Block& block = shared.block;
  const int tokens = call.routing.num_tokens;
  const Item item = first_item(call), own_item = item_of(call, call.own_form == Form::kRecords, tokens, this_share());
  const int strip = item.first_strip + role.warp, own_strip = own_item.first_strip + role.warp;
  const bool any = role.steps != 0 && item.first < call.max_tokens, has_strip = any && strip < item.end_strip;
  const bool any_own = own_item.first < tokens && own_strip < own_item.end_strip;
  HeldPairs held;
  OwnPair mine;
  enter(call, block);
  RawEntry entry, own_entry;
  RawChoice own_choice;
  if (any) entry = RawEntry(p, home_at(call, __ffs(static_cast<int>(role.steps)) - 1), item.first);
  if (any_own) {
    own_entry = RawEntry(p, call.team.rank, own_item.first);
    own_choice = RawChoice(call, own_item.first);
  }
  const Turn turn = find_turn(call);
  ptx::barrier_arrive(kTurnBarrier, all_threads());
  const std::int32_t first_entry = entry.read(p);
  if (has_strip) held.load(p, first_entry, strip, role.warps);  // here before they are asked for
  if (any_own) mine.own = {own_item.first, own_choice.read(call), own_entry.read(p)};
  answer_first(p, shared, role, turn, item, first_entry, has_strip ? strip : -1, held);
  at_one_of_two<kStoredBarrier>(0, [&](int barrier) { ptx::barrier_arrive(barrier, role.answer_threads()); });
  if (any_own) {
    held.load(p, mine.own.entry, own_strip, role.warps);
    mine.mine = held.weigh(p, mine.own.entry, mine.own.asked_here(call), own_strip, role.warps);
    mine.strip = own_strip;
  }
  for_each_round(call, shared, role, 1, [&](const Round& round) {
    if (round.span.count != 0) answer_round(p, shared, role, turn, round);
  });
  if (is_refresh(turn.number)) [[unlikely]]
    forget_unwritten(p, shared, role, turn, false);
  if (any_lane(retreats(block))) return;
  int parity = 0;
  for_each_share(block, true, [&](int share) { receive_pairs(p, shared, role, turn, share, mine, parity); });
}

}  // namespace anyep::cuda::low_latency::homeward
