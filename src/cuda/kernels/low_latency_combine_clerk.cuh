// Low-latency combine, the clerk: what this home asks of its tokens' choices, what homes ask this rank, told round by round.
#pragma once

#include <cstdint>

#include "cuda/kernels/low_latency_combine_answer.cuh"

namespace anyep::cuda::low_latency::homeward {

/// One warp tells every rank what tokens ask it, a choice per lane, to offset `at` of its region. Pattern G.
__device__ __forceinline__ void send_asks(const CallParams& call, const Turn& turn, unsigned ranks, bool mine,
                                          std::uint64_t at, const HomeChoice& choice) {
  if (!mine) return;
  const std::uint32_t head = own_head(call, turn);
#pragma unroll 1
  for (int step = 1; step < call.team.num_ranks; ++step) {
    const int rank = rank_above(call, step);
    if ((ranks >> rank & 1) == 0) continue;
    const std::uint32_t expert = make_ask(head, choice.ask.expert, choice.rank == rank);
    ptx::store_two_words(region_to(call, turn, rank) + at, make_word(expert, turn.number),
                         make_word(__float_as_uint(choice.ask.weight), turn.number));
  }
}
__device__ __forceinline__ std::uint64_t ask_at(const CallParams& call, int token, int choice) {
  return word_at(call, call.cut.table_word(static_cast<unsigned>(token), choice));
}
/// The other tokens of this block, beyond the first ones of its first item.
static __device__ __noinline__ void send_more_asks(const CallParams& call, const Turn turn, unsigned ranks) {
  const int tokens = call.routing.num_tokens, index = this_share();
  const bool in_records = call.own_form == Form::kRecords;
  const LaneOfChoices lane(call);
#pragma unroll 1
  for (int at = index; at < num_items(call, in_records, tokens); at += static_cast<int>(gridDim.x)) {
    const Item item = item_of(call, in_records, tokens, at);
    if (item.first_strip != 0) continue;
#pragma unroll 1
    for (int first = item.first + (at == index ? call.tokens_per_warp : 0); first < item.end;
         first += call.tokens_per_warp) {
      const int token = first + lane.number;
      const bool mine = lane.number < call.tokens_per_warp && token < item.end;
      RawChoice choice;
      if (mine) choice = RawChoice(call, token, lane.choice);
      send_asks(call, turn, ranks, mine, ask_at(call, token, lane.choice), choice.read(call));
    }
  }
}

/// The clerk of a block, one warp: what it needs wherever it is. kStaged: it tells entries of the table of rows, too.
template <bool kStaged>
struct Clerk {
  const CombineParams& p;
  const CallParams& call;
  Shared& shared;
  Turn turn;
  LaneOfChoices lane;
  int round_threads;
  int parity;  ///< of the next round

  __device__ __forceinline__ Clerk(const CombineParams& params, Shared& block, const Turn& now, int next)
      : p(params),
        call(params.call),
        shared(block),
        turn(now),
        lane(call),
        round_threads((call.warps * call.groups + 1) * kLanes),
        parity(next) {}
};

/// What one home asks about a choice, in its lane.
struct Found {
  bool here = false;  ///< the home has that token
  Asked asked;
  std::int32_t entry = -1;  ///< of the table of rows, in the choice's place
  Head head;                ///< of the home
};

/// What homes ask about a span, and their heads. All lanes.
template <bool kStaged>
__device__ __forceinline__ Found find(const Clerk<kStaged>& clerk, const Span& span) {
  const CallParams& call = clerk.call;
  const Turn& turn = clerk.turn;
  Block& block = clerk.shared.block;
  const bool mine = clerk.lane.number < min(call.tokens_per_warp, span.count);
  const int home = home_at(call, mine ? span.step_of(clerk.lane.number) : 0);
  const int token = span.token_of(clerk.lane.number);
  Found found;
  if (mine) {
    if (kStaged && token < call.max_tokens) {
      found.entry = clerk.p.rows[(home * call.max_tokens + token) * call.top_k + clerk.lane.choice];
    }
    std::uint64_t seen = 0, expert = 0, weight = 0;
    bool came = (block.dead >> home & 1) == 0;
    if (came) {
      std::byte* const region = region_from(call, turn, home);
      std::uint64_t& words =
          word_in(call, region, call.cut.table_word(static_cast<unsigned>(token), clerk.lane.choice));
      came = await(call, block, turn, home, kWaitMidSend, [&] {
        seen = protocol::Shared(word_in(call, region, 0)).load(protocol::kRelaxed);
        ptx::load_two_words(&words, expert, weight);
        const bool there = (is_fresh(expert, turn.number) && is_fresh(weight, turn.number)) || token >= tokens_of(seen);
        return (protocol::count_epoch(seen) == turn.number && there) || retreats(block);
      });
    }
    found.head = read_head(call, block, turn, home, came && protocol::count_epoch(seen) == turn.number, seen);
    found.here = token < found.head.tokens && is_fresh(expert, turn.number) && is_fresh(weight, turn.number);
    if (found.here) found.asked = read_ask(call, expert, weight);
  }
  __syncwarp();
  return found;
}

/// Tells those that answer what homes ask about a span, lanes as find() has them.
template <bool kStaged>
__device__ __forceinline__ void emit(Clerk<kStaged>& clerk, const Found& found, const Item& item, const Span& span,
                                     int chunk, bool last) {
  Round& round = clerk.shared.round[clerk.parity];
  clerk.parity ^= 1;
  const unsigned asks = __ballot_sync(kAllLanes, found.here && clerk.lane.number < span.count);
  round.asked[lane_index()] = found.asked;
  if (kStaged) round.entries[lane_index()] = is_row(clerk.p, found.entry) ? found.entry : -1;
  if (lane_index() == 0) {
    round.span = span;
    round.item = item;
    round.chunk = chunk;
    round.last = last;
    round.asks = asks;
    tell(clerk.shared.posted, 1);
  }
  if (clerk.lane.choice == 0 && clerk.lane.number < span.count && span.token_of(clerk.lane.number) == span.token) {
    round.form[span.place_of(clerk.lane.number)] = found.head.form;
  }
  ptx::barrier_sync(kRoundBarrier, clerk.round_threads);
}

/// What a clerk has done of its block's own share before serve() does the rest.
struct Begun {
  unsigned units;    ///< steps of homes whose first unit is done, if their rows are words or packets
  unsigned records;  ///< steps of homes whose first chunk is done
};

/// The rounds of a share: units of all homes of a group whose rows are words or packets, then records home by home, chunk by
/// chunk. Out of line: small batches have but one round. Returns the next round's parity.
template <bool kStaged>
static __device__ __noinline__ int serve(const CombineParams& p, Shared& shared, const Turn turn, int parity, int share,
                                         const Begun begun) {
  const CallParams& call = p.call;
  const Block& block = shared.block;
  Clerk<kStaged> clerk(p, shared, turn, parity);
  const int ranks = call.team.num_ranks, blocks = static_cast<int>(gridDim.x);
#pragma unroll 1
  for (int first = 1; first < ranks; first += call.tokens_per_warp) {
    const int end = min(first + call.tokens_per_warp, ranks);
    int most = 0;
    unsigned records = 0;
#pragma unroll 1
    for (int step = first; step < end; ++step) {
      const int home = home_at(call, step);
      if (block.form[home] == Form::kRecords) {
        records |= 1u << step;
      } else {
        most = max(most, block.tokens[home]);
      }
    }
    // One place for both kinds of items: steps of the group at once, then those of records one by one.
#pragma unroll 1
    for (unsigned kinds = records << 1 | 1u; kinds != 0; kinds &= kinds - 1) {
      const int kind = __ffs(static_cast<int>(kinds)) - 2;  // -1 = units, else a step
      const bool in_records = kind >= 0;
      const int tokens = in_records ? block.tokens[home_at(call, kind)] : most;
      const bool done = in_records ? (begun.records >> kind & 1) != 0 : (begun.units >> first & 1) != 0;
#pragma unroll 1
      for (int at = share + (done ? blocks : 0); at < num_items(call, in_records, tokens); at += blocks) {
        const Item item = item_of(call, in_records, tokens, at);
#pragma unroll 1
        for (int token = item.first; token < item.end; token += in_records ? call.tokens_per_warp : 1) {
          const int token_end = min(token + call.tokens_per_warp, item.end);
          const Span span = in_records ? Span::tokens(kind, token, token_end) : Span::steps(first, end, token);
          Found found = find(clerk, span);
          if (any_lane(retreats(block))) return clerk.parity;  // some of it may be missing
          if (!in_records && (records >> (first + clerk.lane.number) & 1) != 0) found.here = false;
          emit(clerk, found, item, span, in_records && token_end == item.end ? at : -1, false);
        }
      }
    }
  }
  return clerk.parity;
}

/// Ends the rounds.
template <bool kStaged>
__device__ __forceinline__ void post_last(Clerk<kStaged>& clerk) {
  if (lane_index() == 0) {
    clerk.shared.round[clerk.parity].span.count = 0;
    clerk.shared.round[clerk.parity].chunk = -1;
    clerk.shared.round[clerk.parity].last = true;
    tell(clerk.shared.posted, 1);
  }
  ptx::barrier_sync(kRoundBarrier, clerk.round_threads);
}

/// The shares of blocks that have left; ends the rounds.
template <bool kStaged>
__device__ __forceinline__ void serve_others(Clerk<kStaged>& clerk) {
  const Block& block = clerk.shared.block;
  if (!serves_alone(block) && gate_opens(block)) {
    for_each_share(block, false, [&](int share) {
      clerk.parity = serve<kStaged>(clerk.p, clerk.shared, clerk.turn, clerk.parity, share, {});
    });
  }
  post_last(clerk);
}

/// The clerk tells the warps at home whose answers count, where those do not hear of it by its rounds.
__device__ __forceinline__ void tell_home(const CallParams& call) {
  if (waits_for_heads(call)) ptx::barrier_arrive(kHeadsBarrier, (call.warps + 1) * kLanes);
}

/// All that a clerk does while the experts' rank adds.
template <bool kStaged>
__device__ __forceinline__ void run_clerk(const CombineParams& p, Shared& shared, const Turn& turn) {
  const CallParams& call = p.call;
  Block& block = shared.block;
  Clerk<kStaged> clerk(p, shared, turn, 0);
  const int share = this_share(), ranks = call.team.num_ranks, blocks = static_cast<int>(gridDim.x);
  const int end = min(ranks, 1 + call.tokens_per_warp);
  const Item item = first_item(call);
  if (kStaged && are_several_a_chunk(call.routing.num_tokens)) {
    // Most likely all have several tokens a chunk: those are serve()'s.
    await_heads(call, block, turn, 1);
    if (lane_index() == 0) block.present |= 1u << call.team.rank;
    __syncwarp();
    tell_home(call);
    clerk.parity = serve<kStaged>(p, shared, turn, clerk.parity, share, {});
    return serve_others(clerk);
  }
  // The first token, before it is known who has how many.
  const Span all_steps = Span::steps(1, end, item.first);
  const Found ahead = find(clerk, all_steps);
  // A block that retreats has perhaps seen some choices of a token only: whoever serves in its place answers.
  const bool leaves = any_lane(retreats(block));
  const bool here = clerk.lane.number < end - 1;
  const int home = home_at(call, here ? 1 + clerk.lane.number : 0);
  const bool in_records = here && ahead.head.form == Form::kRecords;
  const unsigned records = __reduce_or_sync(kAllLanes, in_records ? 2u << clerk.lane.number : 0);
  const int most = __reduce_max_sync(kAllLanes, here ? ahead.head.tokens : 0);
  Begun begun{0, 0};
  const unsigned present = __reduce_or_sync(kAllLanes, here && ahead.head.present ? 1u << home : 0);
  if (lane_index() == 0)
    block.present = present | 1u << call.team.rank;  // those at home want it, if nothing else comes
  if (end == ranks) tell_home(call);
  const bool alone = end == ranks && serves_alone(block);
  bool all = false;
  if (!leaves && records != (1u << end) - 2) {  // some want words or packets
    Found units = ahead;
    if (in_records) units.here = false;
    all = alone && records == 0 && most * call.pieces <= blocks;  // no refresh: there all come in records
    emit(clerk, units, item, all_steps, -1, all);
    begun.units = (1u << end) - 2;
  }
  if (!leaves && records != 0 && item.first == share && share < most && !are_several_a_chunk(most)) {
    // In a refresh the heads are needed in `block`: forget_unwritten() reads them there.
    all = begun.units == 0 && alone && most <= blocks && !is_refresh(turn.number);
#pragma unroll 1
    for (int step = 1; step < end; ++step) {  // a chunk is a token, and this is the one
      if ((records >> step & 1) == 0) continue;
      const int from = (lane_index() + (step - 1) * call.top_k) % kLanes;
      Found one;
      one.here = from_lane(ahead.here ? 1 : 0, from) != 0 && clerk.lane.number == 0;
      one.asked = {from_lane(ahead.asked.expert, from), from_lane(ahead.asked.weight, from)};
      one.entry = from_lane(ahead.entry, from);
      one.head.form = Form::kRecords;
      const bool has = share < from_lane(ahead.head.tokens, (step - 1) * call.top_k);
      emit(clerk, one, {share, share + 1, 0, call.cut.strips}, Span::tokens(step, share, share + 1), has ? share : -1,
           all && step + 1 == end);
    }
    begun.records = records;
  }
  if (all) return;
  keep_head(block, here && clerk.lane.choice == 0, home, ahead.head);
  if (end < ranks) {
    await_heads(call, block, turn, end);
    tell_home(call);
  }
  if (!leaves && (end < ranks || begun.records != records || most * call.pieces > blocks)) {
    clerk.parity = serve<kStaged>(p, shared, turn, clerk.parity, share, begun);
  }
  serve_others(clerk);
}

}  // namespace anyep::cuda::low_latency::homeward
