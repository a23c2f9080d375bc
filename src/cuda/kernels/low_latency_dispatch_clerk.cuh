// Low-latency dispatch, the clerk: where every source's rows go, told round by round.
#pragma once

#include <cstdint>

#include "cuda/kernels/low_latency_dispatch_receive.cuh"

namespace anyep::cuda::low_latency::outward {

/// Where one choice of a token goes, in its lane.
struct Found {
  bool asked = false;     ///< this lane has a choice of a token that its source has
  std::int32_t row = -1;  ///< as DispatchParams::rows has it
  Target target{};
  std::int32_t* source = nullptr;  ///< of that row
  Head head;                       ///< of the lane's source
};

/// The clerk of a block, one warp: what it needs wherever it is.
struct Clerk {
  const DispatchParams& p;
  Shared& shared;
  Turn turn;
  LaneOfChoices lane;
  int round_threads;
  int parity;  ///< of the next round

  __device__ __forceinline__ Clerk(const DispatchParams& params, Shared& block, const Turn& now, int threads, int next)
      : p(params), shared(block), turn(now), lane(params.call), round_threads(threads), parity(next) {}
};

/// What a lane asks about: a token at a source. Addresses are those of turns 0 mod 4.
struct Question {
  int source = 0, token = 0;
  bool mine = false;  ///< the lane has a question
  std::byte* region = nullptr;
  std::byte* word = nullptr;  ///< of its choice

  __device__ __forceinline__ Question(const CallParams& call, const LaneOfChoices& lane, const Span& span)
      : source(source_at(call, lane.number < span.count ? span.step_of(lane.number) : 0)),
        token(span.token_of(lane.number)),
        mine(lane.number < min(call.tokens_per_warp, span.count)),
        region(region_from(call, Turn{}, source)),
        word(region + word_at(call, call.cut.table_word(static_cast<unsigned>(token), lane.choice))) {}
};

/// What choices' words say, and the sources' heads. `own`: the places of this rank's token, if `knows`: they need not be asked for.
__device__ __forceinline__ std::uint32_t ask(const Clerk& clerk, const Question& question, bool knows, const Place& own,
                                             Found& found) {
  const CallParams& call = clerk.p.call;
  const Turn& turn = clerk.turn;
  Block& block = clerk.shared.block;
  const int source = question.source, token = question.token;
  const bool mine = question.mine, is_own = source == call.team.rank;
  std::uint32_t value = kNoChoice;
  if (is_own && (knows || !mine)) {
    found.head = {true, call.routing.num_tokens, own_form(call, turn)};
    found.asked = mine && token < found.head.tokens;
    if (found.asked && own.home == source) value = own.value;
  } else {
    std::uint64_t seen = 0, choice = 0;
    bool came = (block.dead >> source & 1) == 0;
    if (came) {
      std::uint64_t& head = word_in(call, question.region + turn.phase, 0);
      std::uint64_t& word = *reinterpret_cast<std::uint64_t*>(question.word + turn.phase);
      came = await(call, block, turn, source, kWaitInReceive, [&] {
        seen = is_own ? protocol::make_count(turn.number, own_head(call, turn))
                      : protocol::Shared(head).load(protocol::kRelaxed);
        choice = protocol::Shared(word).load(protocol::kRelaxed);
        const bool there = protocol::count_epoch(choice) == turn.number || token >= tokens_of(seen);
        return (protocol::count_epoch(seen) == turn.number && there) || retreats(block);
      });
    }
    found.head = read_head(call, block, turn, source, came && protocol::count_epoch(seen) == turn.number, seen);
    found.asked = token < found.head.tokens && protocol::count_epoch(choice) == turn.number;
    if (found.asked) value = protocol::count_value(choice);
  }
  __syncwarp();
  return value;
}

/// Where a choice goes, now that the counts are there; they are not where this block retreats. All lanes, each its own.
__device__ __forceinline__ void locate(const Clerk& clerk, int source, std::uint32_t value, Found& found) {
  const DispatchParams& p = clerk.p;
  const CallParams& call = p.call;
  if (any_lane(retreats(clerk.shared.block))) {
    found.asked = false;  // whoever serves in its place says where it went
    return;
  }
  const auto expert = static_cast<int>(value >> kPositionBits);
  const int slab_rows = call.team.num_ranks * call.max_tokens;
  if (value == kNoChoice || expert >= call.num_local_experts) return;
  int row = static_cast<int>(value & ((1u << kPositionBits) - 1));
#pragma unroll 1
  for (int earlier = 0; earlier < source; ++earlier)
    row += clerk.shared.counts[earlier * call.num_local_experts + expert];
  if (row >= slab_rows) return;
  const int slab_row = expert * slab_rows + row;
  found.row = expert << kRowBits | row;
  found.target.row = p.slab + slab_row * (p.wire == Wire::kBF16 ? call.hidden * 2 : call.hidden);
  found.target.scales = p.scales + expert * p.scale_expert_stride + row * p.scale_row_stride;
  found.source = p.source + slab_row;
}

/// Tells the data warps about a span, lanes as ask() has them.
__device__ __forceinline__ void emit(Clerk& clerk, const Found& found, const Item& item, const Span& span, bool last) {
  Round& round = clerk.shared.round[clerk.parity];
  clerk.parity ^= 1;
  const bool hit = clerk.lane.number < span.count && found.row >= 0;
  const unsigned hits = __ballot_sync(kAllLanes, hit);
  round.targets[lane_index()] = found.target;
  if (hit) round.form[span.of_tokens ? 0 : clerk.lane.number] = found.head.form;  // the same in all lanes of a source
  if (lane_index() == 0) {
    round.span = span;
    round.first_strip = item.first_strip;
    round.end_strip = item.end_strip;
    round.last = last;
    round.hits = hits;
    tell(clerk.shared.posted, 1);
  }
  ptx::barrier_sync(kRoundBarrier, clerk.round_threads);
}

/// Notes where the rows of a span went.
__device__ __forceinline__ void note(const Clerk& clerk, const Found& found, const Item& item, const Span& span) {
  const DispatchParams& p = clerk.p;
  if (item.first_strip != 0 || clerk.lane.number >= span.count || !found.asked) return;
  const int token = span.token_of(clerk.lane.number);
  if (found.row >= 0) *found.source = token;
  if (p.rows != nullptr) {
    const int source = source_at(p.call, span.step_of(clerk.lane.number));
    p.rows[(source * p.call.max_tokens + token) * p.call.top_k + clerk.lane.choice] = found.row;
  }
}

/// A round without rows: the data warps are through with what came before when they come; or it is the last.
__device__ __forceinline__ void post(Clerk& clerk, bool last) {
  if (lane_index() == 0) {
    clerk.shared.round[clerk.parity].span.count = 0;
    clerk.shared.round[clerk.parity].last = last;
    tell(clerk.shared.posted, 1);
  }
  clerk.parity ^= 1;
  ptx::barrier_sync(kRoundBarrier, clerk.round_threads);
}

/// A chunk's flag, if anything of it comes here. All lanes.
__device__ __forceinline__ void await_chunk(const Clerk& clerk, int step, int chunk, Found& found) {
  if (step == 0 || !__any_sync(kAllLanes, found.row >= 0)) return;  // own records have none
  bool came = true;
  if (lane_index() == 0) {
    came = await_flag(clerk.p.call, clerk.shared.block, clerk.turn, source_at(clerk.p.call, step), chunk);
  }
  // Pattern B, by the barrier of the round for all. Not there: a peer that died in mid-send, or this block is broken.
  if (__all_sync(kAllLanes, came)) return;
  found.row = -1;
  if (any_lane(retreats(clerk.shared.block))) found.asked = false;  // whoever serves in its place says where it went
}

/// The share's first token at all sources of a group, while it is not known who has how many.
__device__ __forceinline__ Span first_span(const CallParams& call) {
  return Span::steps(0, min(call.team.num_ranks, call.tokens_per_warp), first_item(call).first);
}

/// What a clerk has done of its block's own share before serve() does the rest.
struct Begun {
  bool units;                ///< the first unit, of the sources whose rows are words or packets
  unsigned records;          ///< steps of sources whose first chunk is done
  bool whole_share = false;  ///< the share has nothing else
};

/// The rounds of a share: units of all sources of a group whose rows are words or packets, then records source by source,
/// chunk by chunk. Own rows come first: they hide the others' flight. Out of line: small batches have but one round. Returns
/// the next round's parity.
static __device__ __noinline__ int serve(const DispatchParams& p, Shared& shared, const Turn turn, int round_threads,
                                         int parity, int share, const Begun begun) {
  const CallParams& call = p.call;
  const Block& block = shared.block;
  Clerk clerk(p, shared, turn, round_threads, parity);
  const int ranks = call.team.num_ranks, blocks = static_cast<int>(gridDim.x);
#pragma unroll 1
  for (int first = 0; first < ranks; first += call.tokens_per_warp) {
    const int end = min(first + call.tokens_per_warp, ranks);
    int most = 0;
    unsigned records = 0;
#pragma unroll 1
    for (int step = first; step < end; ++step) {
      const int source = source_at(call, step);
      if (block.form[source] == Form::kRecords) {
        records |= 1u << step;
      } else {
        most = max(most, block.tokens[source]);
      }
    }
    // One place for both kinds of items: steps of the group at once, then those of records one by one.
#pragma unroll 1
    for (unsigned kinds = records << 1 | 1u; kinds != 0; kinds &= kinds - 1) {
      const int kind = __ffs(static_cast<int>(kinds)) - 2;  // -1 = units, else a step
      const bool in_records = kind >= 0;
      const int tokens = in_records ? block.tokens[source_at(call, kind)] : most;
      const bool done = in_records ? (begun.records >> kind & 1) != 0 : begun.units && first == 0;
#pragma unroll 1
      for (int at = share + (done ? blocks : 0); at < num_items(call, in_records, tokens); at += blocks) {
        const Item item = item_of(call, in_records, tokens, at);
        bool flagged = !in_records;
#pragma unroll 1
        for (int token = item.first; token < item.end; token += in_records ? call.tokens_per_warp : 1) {
          const Span span = in_records ? Span::tokens(kind, token, min(token + call.tokens_per_warp, item.end))
                                       : Span::steps(first, end, token);
          Found found;
          const Question question(call, clerk.lane, span);
          const std::uint32_t value = ask(clerk, question, false, {}, found);
          locate(clerk, question.source, value, found);
          if (!in_records && (records >> (first + clerk.lane.number) & 1) != 0) {
            found.asked = false;
            found.row = -1;
          }
          if (!flagged) await_chunk(clerk, kind, at, found);
          flagged = flagged || __any_sync(kAllLanes, found.row >= 0);
          emit(clerk, found, item, span, false);
          note(clerk, found, item, span);
        }
      }
    }
  }
  return clerk.parity;
}

/// When it is not yet known for whom else this block serves.
static __device__ __noinline__ int serve_others(const DispatchParams& p, Shared& shared, const Turn turn,
                                                int round_threads, int parity) {
  Clerk clerk(p, shared, turn, round_threads, parity);
  post(clerk, false);
  if (lane_index() == 0) tell(shared.block.received, 1);
  if (gate_opens(shared.block)) {
    for_each_share(shared.block, false, [&](int share) {
      clerk.parity = serve(p, shared, turn, round_threads, clerk.parity, share, {});
      if (p.rows != nullptr) {
        forget_rest(p, share, [&](int step) { return shared.block.tokens[source_at(p.call, step)]; });
      }
      if (share != static_cast<int>(gridDim.x) - 1) return;
      gather_counts(p.call, shared, turn, p.call.team.num_ranks, lane_index(), kLanes);
      __syncwarp();
      write_counts(p, shared, lane_index(), kLanes);
    });
  }
  return clerk.parity;
}

/// A clerk's first round or rounds: a token of the share at all sources of a group, before it is known who has how many. Tells what
/// is done; `all`: that this was all. `own`: as run_clerk() has it.
__device__ __forceinline__ Begun begin(Clerk& clerk, const Question& first, int counts_threads, bool knows,
                                       const Place& own, bool& all) {
  const CallParams& call = clerk.p.call;
  Block& block = clerk.shared.block;
  const Turn& turn = clerk.turn;
  const int share = this_share(), ranks = call.team.num_ranks, blocks = static_cast<int>(gridDim.x);
  const int group = min(ranks, call.tokens_per_warp);
  const Item item = first_item(call);
  Found ahead;
  const Span all_steps = first_span(call);
  Begun begun{false, 0};
  const auto tell_chunk = [&](int step, const Found& found, bool last) {  // a chunk is a token, and this is the one
    const Item chunk{share, share + 1, 0, call.cut.strips};
    const Span one = Span::tokens(step, share, share + 1);
    emit(clerk, found, chunk, one, last);
    note(clerk, found, chunk, one);
    begun.records |= 1u << step;
  };
  // Own records first: they hide the others' flight.
  const bool own_first = knows && group > 1 && own_form(call, turn) == Form::kRecords;
  if (own_first) {
    Found found;
    found.head.form = Form::kRecords;
    found.asked = lane_index() < call.top_k;
    ptx::barrier_sync(kCountsBarrier, counts_threads);  // the receivers have the counts
    locate(clerk, call.team.rank, found.asked && own.home == call.team.rank ? own.value : kNoChoice, found);
    tell_chunk(0, found, false);
  }
  const std::uint32_t value = ask(clerk, first, knows, own, ahead);
  const bool here = clerk.lane.number < group;
  const bool in_records = here && ahead.head.form == Form::kRecords;
  const unsigned records = __reduce_or_sync(kAllLanes, in_records ? 1u << clerk.lane.number : 0);
  const int most = __reduce_max_sync(kAllLanes, here ? ahead.head.tokens : 0);
  if (!own_first) ptx::barrier_sync(kCountsBarrier, counts_threads);  // the receivers have the counts
  locate(clerk, first.source, value, ahead);
  all = records == 0 && group == ranks && most * call.pieces <= blocks && serves_alone(block);
  if (records != (2u << (group - 1)) - 1) {  // some come as words or packets
    Found units = ahead;
    if (in_records) units.row = -1;
    emit(clerk, units, item, all_steps, all);
    units.asked = ahead.asked && !in_records;
    note(clerk, units, item, all_steps);
    begun.units = true;
  }
  if (records != 0 && item.first == share && !are_several_a_chunk(most)) {
    all = begun.units ? false : group == ranks && most <= blocks && serves_alone(block);
#pragma unroll 1
    for (int step = own_first ? 1 : 0; step < group; ++step) {
      if ((records >> step & 1) == 0) continue;
      Found found;
      const int from = (lane_index() + step * call.top_k) % kLanes;
      const std::int32_t row = from_lane(ahead.row, from);
      found.target.row = from_lane(ahead.target.row, from);
      found.target.scales = from_lane(ahead.target.scales, from);
      found.source = from_lane(ahead.source, from);
      const bool asked = from_lane(ahead.asked ? 1 : 0, from) != 0;
      found.head.form = Form::kRecords;
      if (clerk.lane.number == 0) {
        found.asked = asked;
        found.row = row;
      }
      await_chunk(clerk, step, share, found);
      tell_chunk(step, found, all && step + 1 == group);
    }
  }
  keep_head(block, here && clerk.lane.choice == 0, source_at(call, here ? clerk.lane.number : 0), ahead.head);
  if (group < ranks) await_heads(call, block, turn, group);
  begun.whole_share = group == ranks && begun.records == records && most * call.pieces <= blocks;
  return begun;
}

/// All that a clerk does to receive. `first`: of first_span(); `own`: the places of this block's first token, if it `knows` them.
__device__ __forceinline__ void run_clerk(const DispatchParams& p, Shared& shared, const Turn& turn, int round_threads,
                                          int counts_threads, const Question& first, bool knows, const Place& own) {
  const CallParams& call = p.call;
  Block& block = shared.block;
  Clerk clerk(p, shared, turn, round_threads, 0);
  const int share = this_share();
  Begun begun{false, 0};
  bool all = false;
  if (own_form(call, turn) == Form::kRecords && are_several_a_chunk(call.routing.num_tokens)) {
    // Chunks have several tokens, here and most likely at the others: the first round is one of serve()'s.
    await_heads(call, block, turn, 0);
    ptx::barrier_sync(kCountsBarrier, counts_threads);
  } else {
    begun = begin(clerk, first, counts_threads, knows, own, all);
  }
  if (!begun.whole_share) clerk.parity = serve(p, shared, turn, clerk.round_threads, clerk.parity, share, begun);
  if (is_clerk_block() && clerk_writes_counts(call)) write_counts(p, shared, lane_index(), kLanes);
  if (all) return;
  if (!serves_alone(block)) clerk.parity = serve_others(p, shared, turn, round_threads, clerk.parity);
  post(clerk, true);
}

}  // namespace anyep::cuda::low_latency::outward
