// Low-latency dispatch, the clerk: where every source's rows go, told round by round.
#pragma once

#include <cstdint>

#include "cuda/kernels/low_latency_dispatch_receive.cuh"

namespace anyep::cuda::low_latency::outward {

/// Where one choice of a token goes, in its lane.
struct Found {
  bool asked = false;     ///< this lane has a choice of a token that its source has
  std::int32_t row = -1;  ///< as DispatchParams::rows has it
  Head head;              ///< of the lane's source
  bool flagged = false;   ///< its chunk's flag has been seen (pattern B')
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
/// kFlags: looks at the flag of a chunk, too, which takes no longer.
template <bool kFlags>
__device__ __forceinline__ std::uint32_t ask(const Clerk& clerk, const Question& question, bool knows, const Place& own,
                                             Found& found, int chunk = 0) {
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
      std::uint64_t& flag = flag_in(question.region + turn.phase, chunk);
      came = await(call, block, turn, source, kWaitInReceive, [&] {
        seen = is_own ? protocol::make_count(turn.number, own_head(call, turn))
                      : protocol::Shared(head).load(protocol::kRelaxed);
        choice = protocol::Shared(word).load(protocol::kRelaxed);
        if constexpr (kFlags) found.flagged = protocol::Shared(flag).load(protocol::kAcquire) == mark_of(call, turn);
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

__device__ __forceinline__ int rows_per_expert(const CallParams& call) {
  return call.team.num_ranks * call.max_tokens;
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
  if (value == kNoChoice || expert >= call.num_local_experts) return;
  int row = static_cast<int>(value & ((1u << kPositionBits) - 1));
#pragma unroll 1
  for (int earlier = 0; earlier < source; ++earlier)
    row += clerk.shared.counts[earlier * call.num_local_experts + expert];
  if (row < rows_per_expert(call)) found.row = expert << kRowBits | row;
}

/// Tells the data warps about a span, lanes as ask() has them, whose rows all are records or none is.
__device__ __forceinline__ void emit(Clerk& clerk, const Found& found, const Item& item, const Span& span,
                                     bool in_records, bool last) {
  const DispatchParams& p = clerk.p;
  const CallParams& call = p.call;
  Round& round = clerk.shared.round[clerk.parity];
  clerk.parity ^= 1;
  const bool hit = clerk.lane.number < span.count && found.row >= 0;
  const unsigned hits = __ballot_sync(kAllLanes, hit);
  const int expert = found.row >> kRowBits, row = found.row & ((1 << kRowBits) - 1);  // of no use without a hit
  const std::int64_t row_bytes = p.wire == Wire::kBF16 ? call.hidden * 2 : call.hidden;
  round.targets[lane_index()] = {p.slab + (expert * rows_per_expert(call) + row) * row_bytes,
                                 p.scales + expert * p.scale_expert_stride + row * p.scale_row_stride};
  if (hit) round.form[span.place_of(clerk.lane.number)] = found.head.form;  // the same in all lanes of a source
  if (lane_index() == 0) {
    round.span = span;
    round.first_strip = item.first_strip;
    round.end_strip = item.end_strip;
    round.last = last;
    round.in_records = in_records;
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
  if (found.row >= 0) {
    p.source[(found.row >> kRowBits) * rows_per_expert(p.call) + (found.row & ((1 << kRowBits) - 1))] = token;
  }
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

/// Flags that a span's rows wait for: of chunk `chunk` of each of its sources, a source per lane. Rows whose flag does not come are
/// lost. All lanes; own records have none.
__device__ __forceinline__ void await_chunks(const Clerk& clerk, const Span& span, int chunk, Found& found) {
  const CallParams& call = clerk.p.call;
  const int step = clerk.lane.number < span.count ? span.step_of(clerk.lane.number) : 0;
  const unsigned wanted = __reduce_or_sync(kAllLanes, found.row >= 0 && !found.flagged ? 1u << step : 0) & ~1u;
  bool came = true;
  if ((wanted >> lane_index() & 1) != 0) {
    came = await_flag(call, clerk.shared.block, clerk.turn, source_at(call, lane_index()), chunk);
  }
  // Pattern B, by the barrier of the round for all. Not there: a peer that died in mid-send, or this block is broken.
  const unsigned there = __ballot_sync(kAllLanes, came);
  if (there == kAllLanes) return;
  const bool leaves = any_lane(retreats(clerk.shared.block));
  if ((there >> step & 1) != 0) return;
  found.row = -1;
  if (leaves) found.asked = false;  // whoever serves in its place says where it went
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

/// What a clerk asks about at once.
struct Part {
  Span span;
  Item item;        ///< of which it is all or some
  int index;        ///< of the item
  bool in_records;  ///< what its sources' rows are; other sources in it have no part in it
};

/// The items of a share, as far as they are not begun, part by part: units of all sources of a group whose rows are words or packets,
/// then chunks of records, own ones first: they hide the others' flight. Chunks of one size at several peers go together, as
/// far as the lanes have room: their flags come at about the same time.
class Walk {
 public:
  __device__ __forceinline__ Walk(const CallParams& call, const Block& block, int share, const Begun& begun)
      : call_(call), block_(block), share_(share), begun_(begun) {
#pragma unroll 1
    for (int step = 0; step < call.team.num_ranks; ++step) {
      if (block.form[source_at(call, step)] == Form::kRecords) records_ |= 1u << step;
    }
    left_ = records_;
  }
  /// Steps whose sources' rows are records, bits.
  __device__ __forceinline__ unsigned records() const {
    return records_;
  }

  /// False: there is no more.
  __device__ __forceinline__ bool next(Part& part) {
    token_ += call_.tokens_per_warp;
    while (token_ >= item_.end) {
      at_ += static_cast<int>(gridDim.x);
      while (at_ >= num_items(call_, in_records_, tokens_)) {
        if (!next_sources()) return false;
      }
      item_ = item_of(call_, in_records_, tokens_, at_);
      token_ = item_.first;
    }
    const Span span = in_records_ && steps_ == 1
                          ? Span::tokens(step_, token_, min(token_ + call_.tokens_per_warp, item_.end))
                          : Span::chunks(step_, steps_, token_, each_);
    part = {span, item_, at_, in_records_};
    return true;
  }

 private:
  __device__ __forceinline__ int tokens_at(int step) const {
    return block_.tokens[source_at(call_, step)];
  }

  __device__ __forceinline__ bool next_sources() {
    const int ranks = call_.team.num_ranks;
    bool done;
    tokens_ = 0;
    if (units_ < ranks) {
      step_ = units_;
      steps_ = min(call_.tokens_per_warp, ranks - units_);
      each_ = 1;
      done = begun_.units && units_ == 0;
      units_ += steps_;
#pragma unroll 1
      for (int step = step_; step < units_; ++step) {
        if ((records_ >> step & 1) == 0) tokens_ = max(tokens_, tokens_at(step));
      }
    } else {
      if (left_ == 0) return false;
      in_records_ = true;
      step_ = __ffs(static_cast<int>(left_)) - 1;
      each_ = chunk_tokens(tokens_at(step_));
      done = (begun_.records >> step_ & 1) != 0;
      steps_ = 0;
      do {
        const int step = step_ + steps_++;
        tokens_ = max(tokens_, tokens_at(step));
        left_ &= ~(1u << step);
      } while (step_ != 0 && joins(step_ + steps_, done));
    }
    at_ = share_ + (done ? static_cast<int>(gridDim.x) : 0);
    return true;
  }
  __device__ __forceinline__ bool joins(int step, bool done) const {
    return (left_ >> step & 1) != 0 && ((begun_.records >> step & 1) != 0) == done &&
           chunk_tokens(tokens_at(step)) == each_ && (steps_ + 1) * each_ <= call_.tokens_per_warp;
  }

  const CallParams& call_;
  const Block& block_;
  int share_;
  Begun begun_;
  unsigned records_ = 0, left_ = 0;  ///< steps; `left_`: not begun with
  int units_ = 0;                    ///< the next group's first step
  // Sources that are at it: items of up to `tokens_` tokens, `each_` a chunk.
  int step_ = 0, steps_ = 0, each_ = 1, tokens_ = 0;
  bool in_records_ = false;
  int at_ = 0;  ///< the item
  Item item_{0, 0, 0, 0};
  int token_ = 0;
};

/// The rounds of a share. Out of line: small batches have but one. Returns the next round's parity.
static __device__ __noinline__ int serve(const DispatchParams& p, Shared& shared, const Turn turn, int round_threads,
                                         int parity, int share, const Begun begun) {
  Clerk clerk(p, shared, turn, round_threads, parity);
  Walk walk(p.call, shared.block, share, begun);
  Part part;
#pragma unroll 1
  while (walk.next(part)) {
    Found found;
    const Question question(p.call, clerk.lane, part.span);
    const std::uint32_t value = ask<true>(clerk, question, false, {}, found, part.in_records ? part.index : 0);
    locate(clerk, question.source, value, found);
    if (part.in_records) {
      await_chunks(clerk, part.span, part.index, found);
    } else if (clerk.lane.number < part.span.count &&
               (walk.records() >> part.span.step_of(clerk.lane.number) & 1) != 0) {
      found.asked = false;
      found.row = -1;
    }
    emit(clerk, found, part.item, part.span, part.in_records, false);
    note(clerk, found, part.item, part.span);
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
  const Item chunk{share, share + 1, 0, call.cut.strips};  // where a chunk is a token, and this is the one
  const auto tell_own = [&](const Found& found) {
    const Span one = Span::steps(0, 1, share);
    emit(clerk, found, chunk, one, true, false);
    note(clerk, found, chunk, one);
    begun.records |= 1u;
  };
  // Own records first: they hide the others' flight.
  const bool own_first = knows && group > 1 && own_form(call, turn) == Form::kRecords;
  if (own_first) {
    Found found;
    found.head.form = Form::kRecords;
    found.asked = lane_index() < call.top_k;
    ptx::barrier_sync(kCountsBarrier, counts_threads);  // the receivers have the counts
    locate(clerk, call.team.rank, found.asked && own.home == call.team.rank ? own.value : kNoChoice, found);
    tell_own(found);
  }
  const std::uint32_t value = ask<false>(clerk, first, knows, own, ahead);
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
    emit(clerk, units, item, all_steps, false, all);
    units.asked = ahead.asked && !in_records;
    note(clerk, units, item, all_steps);
    begun.units = true;
  }
  if (records != 0 && item.first == share && !are_several_a_chunk(most)) {
    all = !begun.units && records != 1 && group == ranks && most <= blocks && serves_alone(block);
    Found rows = ahead;
    rows.asked = ahead.asked && in_records;
    if (!in_records) rows.row = -1;
    if ((records & 1) != 0 && !own_first) tell_own(rows);
    if ((records & ~1u) != 0) {  // all peers at once: their flags come at the same time
      if (clerk.lane.number == 0) {
        rows.asked = false;
        rows.row = -1;
      }
      await_chunks(clerk, all_steps, share, rows);
      emit(clerk, rows, chunk, all_steps, true, all);
      note(clerk, rows, chunk, all_steps);
      begun.records |= records;
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
