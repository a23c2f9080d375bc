// Low-latency combine, the side of the experts' rank, and what homes ask it.
#pragma once

#include <cstdint>

#include "cuda/kernels/low_latency_rows.cuh"

namespace anyep::cuda::low_latency::homeward {

/// Warps beside clerk and comm: with more of them, threads have fewer registers than held rows need.
constexpr int kMostWarps = 14;
constexpr int kServiceWarps = 2;

enum Barrier : int {
  kHomeBarrier = 1,
  kTurnBarrier,
  kRoundBarrier,
  kHeadsBarrier,
  kStoredBarrier,  // two, in turn
  kTakenBarrier = kStoredBarrier + 2
};

/// Who a warp is. Where a block has not warps enough, the same ones answer and then take what comes home.
struct Role {
  int warps;       ///< that share a row: of a group, of those at home
  int answerers;   ///< warps of all groups
  int warp;        ///< among its group, or those at home
  unsigned steps;  ///< homes, in steps from this rank, that it answers
  bool answers, home, comm, clerk;

  __device__ __forceinline__ explicit Role(const CallParams& call)
      : warps(call.warps), answerers(call.warps * call.groups) {
    int index = warp_index(), group = 0;
    answers = index < answerers;
    home = call.split ? !answers && index < answerers + warps : answers;
    const int service = index - (call.split ? answerers + warps : answerers);
    clerk = service == 0;
    comm = service == 1;
    for (warp = answers ? index : index - answerers; answers && warp >= warps; warp -= warps) ++group;
    steps = steps_of(call, group);
  }
  /// Those that answer, and clerk or comm.
  __device__ int answer_threads() const { return (answerers + 1) * kLanes; }
  __device__ int home_threads() const { return warps * kLanes; }
};

/// What the clerk tells those that answer.
struct Round {
  Span span;             ///< of homes
  Item item;             ///< strips
  int chunk;             ///< of records whose flag follows; -1 = none
  bool last;             ///< no more to answer
  unsigned asks;         ///< lanes of `asked` that a home has filled, as the span has them
  Form form[kMaxRanks];  ///< in which each step's answers go home; of a span of tokens the first
  Asked asked[kLanes];
  std::int32_t entries[kLanes];  ///< of the table of rows, likewise
};

/// What the comm warp is told to release next.
struct Release {
  int home;   ///< -1 = no more
  int chunk;  ///< -1 = nothing this time
};

struct Shared {
  Block block;
  unsigned ranks;  ///< that this block may send to
  Round round[2];  ///< this round and the next
  Release release[2];
  unsigned present[2];  ///< ranks whose flag of a chunk has come
};

/// One choice of an own token, in its lane.
struct HomeChoice {
  int rank = -1;  ///< that hosts it; -1 = unused
  Asked ask;      ///< there
};

/// The same on its way. Nothing waits before read().
struct RawChoice {
  std::int64_t id = -1;
  float weight = 0;

  __device__ __forceinline__ RawChoice() {}
  __device__ __forceinline__ RawChoice(const CallParams& call, int token, int choice) {
    id = raw_id(call, token, choice);
    weight = call.routing.weights[token * call.top_k + choice];
  }
  __device__ __forceinline__ RawChoice(const CallParams& call, int token) {
    if (lane_index() < call.top_k) *this = RawChoice(call, token, lane_index());
  }
  __device__ __forceinline__ HomeChoice read(const CallParams& call) const {
    HomeChoice choice;
    choice.ask.weight = weight;
    const int expert = checked_id(call, id);
    if (expert < 0) return choice;
    choice.rank = rank_of(call, expert);
    choice.ask.expert = expert - call.first_expert[choice.rank];
    return choice;
  }
};
__device__ __forceinline__ HomeChoice choice_of_lane(const CallParams& call, int token) {
  return RawChoice(call, token).read(call);
}

__device__ __forceinline__ int home_at(const CallParams& call, int step) {
  return rank_below(call, step);
}
/// The share's first token, while it is not known who has how many.
__device__ __forceinline__ Item first_item(const CallParams& call) {
  return item_of(call, false, 0, static_cast<int>(blockIdx.x));
}

// ---- clerk ---------------------------------------------------------------------------------------------------------

/// One warp tells every rank what tokens ask it, a choice per lane, to offset `at` of its region. Pattern G.
__device__ __forceinline__ void send_asks(const CallParams& call, const Turn& turn, unsigned ranks, bool mine,
                                          std::uint64_t at, const HomeChoice& choice) {
  if (!mine) return;
#pragma unroll 1
  for (int step = 1; step < call.team.num_ranks; ++step) {
    const int rank = rank_above(call, step);
    if ((ranks >> rank & 1) == 0) continue;
    const std::uint32_t expert = choice.rank == rank ? static_cast<std::uint32_t>(choice.ask.expert) : ~0u;
    ptx::store_two_words(region_to(call, turn, rank) + at, make_word(expert, turn.number),
                         make_word(__float_as_uint(choice.ask.weight), turn.number));
  }
}
__device__ __forceinline__ std::uint64_t ask_at(const CallParams& call, int token, int choice) {
  return word_at(call, call.cut.table_word(static_cast<unsigned>(token), choice));
}
/// The other tokens of this block.
static __device__ __noinline__ void send_more_asks(const CallParams& call, const Turn turn, unsigned ranks) {
  const int tokens = call.routing.num_tokens, index = static_cast<int>(blockIdx.x);
  const bool in_records = call.own_form == Form::kRecords;
  const LaneOfChoices lane(call);
#pragma unroll 1
  for (int at = index; at < num_items(call, in_records, tokens); at += static_cast<int>(gridDim.x)) {
    const Item item = item_of(call, in_records, tokens, at);
    if (item.first_strip != 0) continue;
#pragma unroll 1
    for (int first = item.first + (at == index ? 1 : 0); first < item.end; first += call.tokens_per_warp) {
      const int token = first + lane.number;
      const bool mine = lane.number < call.tokens_per_warp && token < item.end;
      RawChoice choice;
      if (mine) choice = RawChoice(call, token, lane.choice);
      send_asks(call, turn, ranks, mine, ask_at(call, token, lane.choice), choice.read(call));
    }
  }
}

/// The clerk of a block, one warp: what it needs wherever it is.
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
__device__ __forceinline__ Found find(const Clerk& clerk, const Span& span) {
  const CallParams& call = clerk.call;
  const Turn& turn = clerk.turn;
  Block& block = clerk.shared.block;
  const bool mine = clerk.lane.number < min(call.tokens_per_warp, span.count);
  const int home = home_at(call, mine ? span.step_of(clerk.lane.number) : 0);
  const int token = span.token_of(clerk.lane.number);
  Found found;
  if (mine) {
    if (token < call.max_tokens) {
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
    const auto local = static_cast<std::uint32_t>(expert);
    if (found.here && local < static_cast<std::uint32_t>(call.num_local_experts)) {
      found.asked.expert = static_cast<int>(local);
      found.asked.weight = __uint_as_float(static_cast<std::uint32_t>(weight));
    }
  }
  __syncwarp();
  return found;
}

/// Tells those that answer what homes ask about a span, lanes as find() has them.
__device__ __forceinline__ void emit(Clerk& clerk, const Found& found, const Item& item, const Span& span, int chunk,
                                     bool last) {
  Round& round = clerk.shared.round[clerk.parity];
  clerk.parity ^= 1;
  const unsigned asks = __ballot_sync(kAllLanes, found.here && clerk.lane.number < span.count);
  round.asked[lane_index()] = found.asked;
  round.entries[lane_index()] = is_row(clerk.p, found.entry) ? found.entry : -1;
  if (lane_index() == 0) {
    round.span = span;
    round.item = item;
    round.chunk = chunk;
    round.last = last;
    round.asks = asks;
  }
  if (clerk.lane.choice == 0 && clerk.lane.number < (span.of_tokens ? 1 : span.count)) {
    round.form[clerk.lane.number] = found.head.form;
  }
  ptx::barrier_sync(kRoundBarrier, clerk.round_threads);
}

/// What a clerk has done of its block's own share before serve() does the rest.
struct Begun {
  bool units;        ///< the first unit, of the homes whose rows are words or packets
  unsigned records;  ///< steps of homes whose first chunk is done
};

/// The rounds of a share: units of all homes of a group whose rows are words or packets, then records home by home, chunk by
/// chunk. Out of line: small batches have but one round. Returns the next round's parity.
static __device__ __noinline__ int serve(const CombineParams& p, Shared& shared, const Turn turn, int parity, int share,
                                         const Begun begun) {
  const CallParams& call = p.call;
  const Block& block = shared.block;
  Clerk clerk(p, shared, turn, parity);
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
      const bool done = in_records ? (begun.records >> kind & 1) != 0 : begun.units && first == 1;
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
__device__ __forceinline__ void post_last(Clerk& clerk) {
  if (lane_index() == 0) {
    clerk.shared.round[clerk.parity].span.count = 0;
    clerk.shared.round[clerk.parity].chunk = -1;
    clerk.shared.round[clerk.parity].last = true;
  }
  ptx::barrier_sync(kRoundBarrier, clerk.round_threads);
}

/// The clerk tells the warps at home whose answers count, where those do not hear of it by its rounds.
__device__ __forceinline__ void tell_home(const CallParams& call) {
  if (call.split) ptx::barrier_arrive(kHeadsBarrier, (call.warps + 1) * kLanes);
}

/// All that a clerk does while the experts' rank adds.
__device__ __forceinline__ void run_clerk(const CombineParams& p, Shared& shared, const Turn& turn) {
  const CallParams& call = p.call;
  Block& block = shared.block;
  Clerk clerk(p, shared, turn, 0);
  const int share = static_cast<int>(blockIdx.x), ranks = call.team.num_ranks, blocks = static_cast<int>(gridDim.x);
  const int end = min(ranks, 1 + call.tokens_per_warp);
  const Item item = first_item(call);
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
  Begun begun{false, 0};
  const unsigned present = __reduce_or_sync(kAllLanes, here && ahead.head.present ? 1u << home : 0);
  if (lane_index() == 0)
    block.present = present | 1u << call.team.rank;  // those at home want it, if nothing else comes
  if (end == ranks) tell_home(call);
  const bool alone = end == ranks && serves_alone(block);
  const bool one_chunk =
      !leaves && records == 2u && end == 2 && item.first == share && most <= kMaxChunks && share < most;
  bool all = false;
  if (one_chunk) {  // one home, in records: a chunk is a token, and this is the one
    // In a refresh the heads are needed in `block`: forget_unwritten() reads them there.
    all = alone && most <= blocks && !is_refresh(turn.number);
    emit(clerk, ahead, {share, share + 1, 0, call.cut.strips}, Span::tokens(1, share, share + 1), share, all);
    begun.records = records;
  } else if (!leaves && records != (1u << end) - 2) {
    Found units = ahead;
    if (in_records) units.here = false;
    all = alone && records == 0 && most * call.pieces <= blocks;  // no refresh: there all come in records
    emit(clerk, units, item, all_steps, -1, all);
    begun.units = true;
  }
  if (all) return;
  keep_head(block, here && clerk.lane.choice == 0, home, ahead.head);
  if (end < ranks) {
    await_heads(call, block, turn, end);
    tell_home(call);
  }
  if (!leaves && (end < ranks || begun.records != records || most * call.pieces > blocks)) {
    clerk.parity = serve(p, shared, turn, clerk.parity, share, begun);
  }
  if (!serves_alone(block) && gate_opens(block)) {
    for_each_share(block, false, [&](int extra) { clerk.parity = serve(p, shared, turn, clerk.parity, extra, {}); });
  }
  post_last(clerk);
}

// ---- answers -------------------------------------------------------------------------------------------------------

/// One of two barriers; constants, since a kernel whose barriers are not has all sixteen.
template <int kFirst>
__device__ __forceinline__ void sync_one_of_two(int parity, int threads) {
  if (parity == 0) {
    ptx::barrier_sync(kFirst, threads);
  } else {
    ptx::barrier_sync(kFirst + 1, threads);
  }
}
template <int kFirst>
__device__ __forceinline__ void arrive_at_one_of_two(int parity, int threads) {
  if (parity == 0) {
    ptx::barrier_arrive(kFirst, threads);
  } else {
    ptx::barrier_arrive(kFirst + 1, threads);
  }
}

/// Those that answer tell the comm warp to release a flag. Pattern A: what all have stored. They go on: a release waits until what
/// is stored has arrived. `told`: how often before; two may be under way.
__device__ __forceinline__ void tell_release(const Role& role, Shared& shared, int home, int chunk, int& told) {
  const int parity = told & 1;
  if (told >= 2) sync_one_of_two<kTakenBarrier>(parity, role.answer_threads());
  if (threadIdx.x == 0) shared.release[parity] = {home, chunk};
  arrive_at_one_of_two<kStoredBarrier>(parity, role.answer_threads());
  ++told;
}
/// Those that answer tell the comm warp that there are no more flags to release.
__device__ __forceinline__ void tell_no_more(const Role& role, Shared& shared, int told) {
  tell_release(role, shared, -1, 0, told);
  // No barrier stays half full: the last release before this has been taken, too.
  if (told >= 2) sync_one_of_two<kTakenBarrier>(told & 1, role.answer_threads());
}
/// The comm warp's side.
__device__ __forceinline__ void release_chunks(const CallParams& call, const Role& role, const Shared& shared,
                                               const Turn& turn) {
#pragma unroll 1
  for (int parity = 0;; parity ^= 1) {
    sync_one_of_two<kStoredBarrier>(parity, role.answer_threads());
    const Release release = shared.release[parity];
    __syncwarp();
    if (release.home < 0) return;
    arrive_at_one_of_two<kTakenBarrier>(parity, role.answer_threads());
    if (lane_index() == 0 && release.chunk >= 0 && (shared.ranks >> release.home & 1) != 0 &&
        look_at(shared.block.broken) == 0) {
      publish(flag_in(region_to(call, turn, release.home), release.chunk), mark_of(call, turn));  // pattern A
    }
    __syncwarp();
  }
}

/// This rank's sum of a home's token, one strip, to the home.
__device__ __forceinline__ void put_answer(const CombineParams& p, const Turn& turn, Form form, int home, int token,
                                           int strip, const Vectors<false>& sum) {
  const CallParams& call = p.call;
  Strip<1, 0> answer;
  answer.data[0] = sum.at[0];
  std::byte* const region = region_to(call, turn, home);
  if (form == Form::kWords) {
    store_words(region + call.at.words + call.cut.row_word(token, strip) * 8, answer, turn.number);
  } else if (form == Form::kPackets) {
    store_packets(region + call.at.packets + call.cut.packet(token, strip) * 16, answer, turn.number);
  } else {
    std::byte* const to = region + call.at.records + call.cut.record(token, 0) + strip * 512 + lane_index() * 16;
    *reinterpret_cast<uint4*>(to) = answer.data[0];
  }
}

/// What a round asks about number `number` of its span, in lanes.
struct Question {
  Asked asked;
  std::int32_t entry = -1;

  __device__ __forceinline__ Question(const CallParams& call, const Round& round, int number) {
    if (lane_index() >= call.top_k) return;
    asked = round.asked[number * call.top_k + lane_index()];
    entry = round.entries[number * call.top_k + lane_index()];
  }
};

/// Rows of one token of one home, one strip, that were loaded before it was known whether and how they are asked for.
struct Ahead {
  int home = -1, token = -1, strip = -1;
};

/// Until the clerk says that there is no more to answer. `held`: the rows ahead.
__device__ __forceinline__ void answer_rounds(const CombineParams& p, Shared& shared, const Role& role,
                                              const Turn& turn, Ahead ahead, Held& held) {
  const CallParams& call = p.call;
  int releases = 0;
#pragma unroll 1
  for (int parity = 0;; parity ^= 1) {
    ptx::barrier_sync(kRoundBarrier, role.answer_threads());  // and whoever is here is through with the round before
    const Round& round = shared.round[parity];
#pragma unroll 1
    for (int i = 0; i < round.span.count; ++i) {
      const int step = round.span.step_of(i), token = round.span.token_of(i);
      if ((role.steps >> step & 1) == 0 || (round.asks >> (i * call.top_k) & 1) == 0) continue;
      const int home = home_at(call, step);
      if ((shared.ranks >> home & 1) == 0) continue;
      const Question question(call, round, i);
      if (!__any_sync(kAllLanes, question.asked.expert >= 0)) continue;
#pragma unroll 1
      for (int strip = round.item.first_strip + role.warp; strip < round.item.end_strip; strip += role.warps) {
        if (home != ahead.home || token != ahead.token || strip != ahead.strip) {
          load_rows(p, question.entry, strip, held);
          ahead.strip = -1;  // what was held ahead is gone
        }
        const Vectors<false> sum = weigh(p, question.entry, question.asked, strip, held);
        put_answer(p, turn, round.form[round.span.of_tokens ? 0 : i], home, token, strip, sum);
      }
    }
    if (round.chunk >= 0) tell_release(role, shared, home_at(call, round.span.step), round.chunk, releases);
    if (round.last) break;
  }
  tell_no_more(role, shared, releases);
}

/// Every row of a home's token, as records: at [token][index among the token's experts here]. One warp, its strips. Has it any?
template <bool kLogFmt>
__device__ __forceinline__ bool send_choices_of(const CombineParams& p, const Role& role, const Turn& turn, int home,
                                                int token) {
  const CallParams& call = p.call;
  const std::int32_t entry = RawEntry(p, home, token).read(p);
  const unsigned same = __match_any_sync(kAllLanes, entry);
  const bool first = entry >= 0 && __ffs(static_cast<int>(same)) - 1 == lane_index();
  const unsigned firsts = __ballot_sync(kAllLanes, first);
  int index = 0;
  for (unsigned left = firsts; left != 0; left &= left - 1) {
    index += from_lane(entry, __ffs(static_cast<int>(left)) - 1) < entry ? 1 : 0;
  }
  const std::byte* const row = row_at(p, max(entry, 0));
  std::byte* const record = region_to(call, turn, home) + call.at.records +
                            call.cut.record(static_cast<unsigned>(token), min(index, call.cut.rows_per_token - 1));
  for (unsigned left = firsts; left != 0; left &= left - 1) {
    const int holder = __ffs(static_cast<int>(left)) - 1;
    for (int strip = role.warp; strip < call.cut.strips; strip += role.warps) {
      put_record<kLogFmt>(from_lane(record, holder), from_lane(row, holder), call.hidden, strip);
    }
  }
  return firsts != 0;
}

/// All rows that any home may want, chunk by chunk. Own rows go through a region, too. A chunk without rows has no flag: its
/// home has no choice here, and knows it. In a refresh all have one.
template <bool kLogFmt>
__device__ inline void send_choices(const CombineParams& p, Shared& shared, const Role& role, const Turn& turn) {
  const CallParams& call = p.call;
  const bool all = is_refresh(turn.number);
  const int chunks = num_chunks(call.max_tokens), blocks = static_cast<int>(gridDim.x);
  int releases = 0, at = static_cast<int>(blockIdx.x);
#pragma unroll 1
  for (int step = 1; step <= call.team.num_ranks; ++step, at -= chunks) {  // one row of chunks, home after home
    const int home = home_at(call, step);
#pragma unroll 1
    for (; at < chunks; at += blocks) {
      const Item item = item_of(call, true, call.max_tokens, at);
      bool any = all;
#pragma unroll 1
      for (int token = item.first; token < item.end && (shared.ranks >> home & 1) != 0; ++token) {
        if (send_choices_of<kLogFmt>(p, role, turn, home, token)) any = true;
      }
      // One warp's word counts: the table is the caller's memory, and those at a barrier must agree.
      tell_release(role, shared, home, any ? at : -1, releases);
    }
  }
  tell_no_more(role, shared, releases);
}

/// Those that answer, in a refresh turn.
static __device__ __noinline__ void forget_unwritten(const CombineParams& p, const Shared& shared, const Role role,
                                                     const Turn turn, bool per_choice) {
  const CallParams& call = p.call;
  const Block& block = shared.block;
  const unsigned threads = static_cast<unsigned>(role.answerers * kLanes);
  if (blockIdx.x == 0 && static_cast<int>(threadIdx.x) < call.team.num_ranks &&
      (shared.ranks >> threadIdx.x & 1) != 0) {  // between head and table
    protocol::Shared(word_in(call, region_to(call, turn, static_cast<int>(threadIdx.x)), 1))
        .store(0, protocol::kRelaxed);
  }
  const std::uint32_t first_word =
      per_choice ? 2 : call.cut.table_word(static_cast<unsigned>(call.routing.num_tokens), 0);
  const int me = call.team.rank;
  // A block that retreats may not know which flags its peers get: it leaves them to the next refresh.
  const bool knows = !any_lane(retreats(block));
  refresh(
      call, turn, shared.ranks, first_word,
      [&call, &block, per_choice, me, knows](int peer) {
        if (per_choice) return num_chunks(call.max_tokens);
        if (!knows) return kMaxChunks;
        return peer == me || block.form[peer] != Form::kRecords ? 0 : num_chunks(block.tokens[peer]);
      },
      blockIdx.x * threads + threadIdx.x, gridDim.x * threads);
}

}  // namespace anyep::cuda::low_latency::homeward
