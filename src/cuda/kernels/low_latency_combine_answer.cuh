// Low-latency combine, the side of the experts' rank: who its warps are, what is asked of them, answers.
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
    int index = uniform_warp_index(), group = 0;
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

/// Do warps at home that do not answer wait until it is known which ranks take part? Without masks all do.
__device__ __forceinline__ bool waits_for_heads(const CallParams& call) {
  return call.split && call.team.masked != nullptr;
}

/// What the clerk tells those that answer.
struct Round {
  Span span;             ///< of homes
  Item item;             ///< strips
  int chunk;             ///< of records whose flag follows; -1 = none
  bool last;             ///< no more to answer
  unsigned asks;         ///< lanes of `asked` that a home has filled, as the span has them
  Form form[kMaxRanks];  ///< in which each step's answers go home
  Asked asked[kLanes];
  std::int32_t entries[kLanes];  ///< of the table of rows, likewise; where rows are staged
};

/// What the comm warp is told to release next, at once.
struct Release {
  int chunk[kMaxRanks];  ///< whose flag each rank gets; -1 = none
  bool last;             ///< nothing follows
};

/// Set beside the bits in Shared::ranks as soon as they are known.
constexpr unsigned kRanksKnown = 1u << 31;
static_assert(kMaxRanks < 31);

struct Shared {
  Block block;
  int posted;  ///< 1 = the clerk has told the first round; where warps take first asks by themselves: it has found them
  unsigned ranks;  ///< that this block may send to, bits
  Round round[2];  ///< this round and the next
  Release release[2];
  unsigned present[2];  ///< ranks whose flag of a chunk has come
  Asked first[kMaxRanks *
              kMaxTopK];  ///< first asks, choices of step after step, where warps may have to take them from here
};

/// One choice of an own token, in its lane.
struct HomeChoice {
  int rank = -1;  ///< that hosts it; -1 = unused
  Asked ask;      ///< there

  /// What it asks a rank.
  __device__ __forceinline__ Asked asked_of(int which) const {
    Asked asked = ask;
    if (rank != which) asked.expert = -1;
    return asked;
  }
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
    const int expert = checked_id(call, id), rank = rank_of(call, max(expert, 0));
    return {expert < 0 ? -1 : rank, {expert < 0 ? -1 : expert - first_expert(call, rank), weight}};
  }
};
__device__ __forceinline__ HomeChoice choice_of_lane(const CallParams& call, int token) {
  return RawChoice(call, token).read(call);
}

__device__ __forceinline__ int home_at(const CallParams& call, int step) {
  return rank_below(call, step);
}

// ---- answers -------------------------------------------------------------------------------------------------------

/// Comes to one of two barriers; constants, since a kernel whose barriers are not has all sixteen.
template <int kFirst, class Come>
__device__ __forceinline__ void at_one_of_two(int parity, Come&& come) {
  if (parity == 0) {
    come(kFirst);
  } else {
    come(kFirst + 1);
  }
}

/// How those that answer tell the comm warp which flags to release. They go on: a release waits until what is stored has arrived,
/// and with it all that the SM has stored. Hence one for all homes, as far as none gets a second flag.
class Outbox {
 public:
  /// `sent`: releases that comm has been told of before.
  __device__ __forceinline__ Outbox(const Role& role, Shared& shared, int sent)
      : shared_(shared), threads_(role.answer_threads()), sent_(sent) {}

  /// The answers to a home's chunk are stored.
  __device__ __forceinline__ void add(int home, int chunk) {
    if ((homes_ >> home & 1) != 0) send(false);
    open();
    homes_ |= 1u << home;
    if (static_cast<int>(threadIdx.x) == home) shared_.release[parity()].chunk[home] = chunk;
  }
  /// Pattern A: what all have stored.
  __device__ __forceinline__ void send(bool last) {
    open();
    if (threadIdx.x == 0) shared_.release[parity()].last = last;
    at_one_of_two<kStoredBarrier>(parity(), [&](int barrier) { ptx::barrier_arrive(barrier, threads_); });
    ++sent_;
    homes_ = 0;
    is_open_ = false;
  }

 private:
  __device__ __forceinline__ int parity() const { return sent_ & 1; }
  /// Two may be under way.
  __device__ __forceinline__ void open() {
    if (is_open_) return;
    is_open_ = true;
    if (sent_ >= 2) at_one_of_two<kTakenBarrier>(parity(), [&](int barrier) { ptx::barrier_sync(barrier, threads_); });
    if (threadIdx.x < kMaxRanks) shared_.release[parity()].chunk[threadIdx.x] = -1;
  }

  Shared& shared_;
  int threads_, sent_;
  unsigned homes_ = 0;  ///< that this one has a flag for, bits
  bool is_open_ = false;
};
/// The comm warp's side. `first`: of answers before any round, of which a block that retreats may have some only.
__device__ __forceinline__ void release_chunks(const CallParams& call, const Role& role, const Shared& shared,
                                               const Turn& turn, bool first) {
  const int threads = role.answer_threads(), home = lane_index();
  const bool is_home = home < call.team.num_ranks;
#pragma unroll 1
  for (int taken = 0;; ++taken) {
    const int parity = taken & 1;
    at_one_of_two<kStoredBarrier>(parity, [&](int barrier) { ptx::barrier_sync(barrier, threads); });
    const Release& release = shared.release[parity];
    const int chunk = is_home && !(first && retreats(shared.block)) ? release.chunk[home] : -1;
    first = false;
    const bool last = release.last;
    if (chunk >= 0 && (shared.ranks >> home & 1) != 0 && look_at(shared.block.broken) == 0) {
      publish(flag_in(region_to(call, turn, home), chunk), mark_of(call, turn));  // pattern A: one release for all
    }
    __syncwarp();
    if (last) return;
    // The one before is over, too. Nobody waits for the last two, whose barriers would stay half full.
    if (taken > 0)
      at_one_of_two<kTakenBarrier>(parity ^ 1, [&](int barrier) { ptx::barrier_arrive(barrier, threads); });
  }
}

/// Offset in a region of a rank's sum of a token, one strip.
__device__ __forceinline__ std::uint64_t answer_offset(const CallParams& call, Form form, int token, int strip) {
  if (form == Form::kWords) return call.at.words + call.cut.row_word(token, strip) * 8;
  if (form == Form::kPackets) return call.at.packets + call.cut.packet(token, strip) * 16;
  return call.at.records + call.cut.record(token, 0) + strip * 512;
}
/// Where this rank's sum of a home's token, one strip, goes.
__device__ __forceinline__ std::byte* answer_at(const CallParams& call, const Turn& turn, Form form, int home,
                                                int token, int strip) {
  return region_to(call, turn, home) + answer_offset(call, form, token, strip);
}
__device__ __forceinline__ void put_answer(std::byte* to, const Turn& turn, Form form, const Vectors<false>& sum) {
  Strip<1, 0> answer;
  answer.data[0] = sum.at[0];
  if (form == Form::kWords) {
    store_words(to, answer, turn.number);
  } else if (form == Form::kPackets) {
    store_packets(to, answer, turn.number);
  } else {
    *reinterpret_cast<uint4*>(to + lane_index() * 16) = answer.data[0];
  }
}

__device__ __forceinline__ void put_answer(const CallParams& call, const Turn& turn, Form form, int home, int token,
                                           int strip, const Vectors<false>& sum) {
  put_answer(answer_at(call, turn, form, home, token, strip), turn, form, sum);
}

/// Those that answer: answer(round) for every round that the clerk tells, and flags behind those that complete a chunk.
/// `sent`: releases before.
template <class Answer>
__device__ __forceinline__ void for_each_round(const CallParams& call, Shared& shared, const Role& role, int sent,
                                               Answer&& answer) {
  Outbox outbox(role, shared, sent);
#pragma unroll 1
  for (int parity = 0;; parity ^= 1) {
    ptx::barrier_sync(kRoundBarrier, role.answer_threads());  // and whoever is here is through with the round before
    const Round& round = shared.round[parity];
    answer(round);
    if (round.chunk >= 0) outbox.add(home_at(call, round.span.step), round.chunk);
    if (round.last) return outbox.send(true);
  }
}

/// Rows of one token of one home, one strip, that were loaded before it was known whether and how they are asked for.
struct Ahead {
  int home = -1, token = -1;
  int strip = -1;  ///< -1 = the rows are gone
  std::int32_t entry = -1;
  int first_strip = -1;   ///< what `strip` was first
  unsigned answered = 0;  ///< steps of homes that have their answers to that strip, bits

  __device__ __forceinline__ bool has(int its_home, int its_token, int its_strip) const {
    return its_home == home && its_token == token && its_strip == strip;
  }
  __device__ __forceinline__ bool is_answered(int step, int its_token, int its_strip) const {
    return (answered >> step & 1) != 0 && its_token == token && its_strip == first_strip;
  }
};

/// What a home asks about a choice: word 0 {epoch, form of the home's rows (3), its number of tokens (13), local expert (16)}, word 1
/// {epoch, weight}.
constexpr int kAskBits = 16;
constexpr std::uint32_t kNotHere = (1u << kAskBits) - 1;
static_assert(kMaxExperts < kNotHere);
__device__ __forceinline__ std::uint32_t make_ask(std::uint32_t head, int expert, bool here) {
  return head << kAskBits | (here ? static_cast<std::uint32_t>(expert) : kNotHere);
}
/// Form and number of tokens.
__device__ __forceinline__ std::uint32_t head_of_ask(std::uint64_t word) {
  return static_cast<std::uint32_t>(word) >> kAskBits;
}
/// Checked: -1 unless this rank has that expert.
__device__ __forceinline__ Asked read_ask(const CallParams& call, std::uint64_t expert, std::uint64_t weight) {
  const std::uint32_t local = static_cast<std::uint32_t>(expert) & kNotHere;
  return {local < static_cast<std::uint32_t>(call.num_local_experts) ? static_cast<int>(local) : -1,
          __uint_as_float(static_cast<std::uint32_t>(weight))};
}

/// One early answer. False: the clerk knows more by now, or the home's rows are records, whose flags go by rounds.
[[nodiscard]] __device__ __forceinline__ bool answer_one_early(const CombineParams& p, Shared& shared, const Turn& turn,
                                                               const Ahead& ahead, const Held& held) {
  const CallParams& call = p.call;
  const std::byte* const words = reinterpret_cast<const std::byte*>(
      &word_in(call, region_from(call, turn, ahead.home),
               call.cut.table_word(static_cast<unsigned>(ahead.token), min(lane_index(), call.top_k - 1))));
  std::byte* as_words = answer_at(call, turn, Form::kWords, ahead.home, ahead.token, ahead.strip);
  std::byte* as_packets = answer_at(call, turn, Form::kPackets, ahead.home, ahead.token, ahead.strip);
  ptx::have_ready(as_words);
  ptx::have_ready(as_packets);
  std::uint64_t expert = 0, weight = 0;
  unsigned ranks = 0;
  for (bool there = false; !there;) {  // the clerk's wait has a limit
    ptx::load_two_words(words, expert, weight);
    ranks = *static_cast<const volatile unsigned*>(&shared.ranks);
    there = __all_sync(kAllLanes, is_fresh(expert, turn.number) && is_fresh(weight, turn.number) &&
                                      (ranks & kRanksKnown) != 0) != 0;
    if (!there && any_lane(look_at(shared.posted) != 0)) return false;
  }
  ptx::fence_block();  // whoever said which ranks has acquired their marks (pattern F, litmus slot-reuse-cta)
  const Form form = form_of(from_lane(head_of_ask(expert), 0));
  if (form == Form::kRecords) return false;
  Asked asked;
  if (lane_index() < call.top_k) asked = read_ask(call, expert, weight);
  if ((ranks >> ahead.home & 1) == 0 || !__any_sync(kAllLanes, asked.expert >= 0)) return true;
  put_answer(form == Form::kWords ? as_words : as_packets, turn, form, weigh(p, ahead.entry, asked, ahead.strip, held));
  return true;
}
/// Those that answer, until the clerk knows more: a warp's first answers need no round where homes ask in time. Where the same warps
/// take what comes home, only the very first one: with all of them 64 tokens of four ranks took longer (decision 0017).
__device__ __forceinline__ void answer_early(const CombineParams& p, Shared& shared, const Role& role, const Turn& turn,
                                             Ahead& ahead, Held& held) {
  if (ahead.home < 0) return;
#pragma unroll 1
  for (unsigned steps = role.steps;;) {
    const int step = __ffs(static_cast<int>(steps)) - 1;
    steps = p.call.split ? steps & (steps - 1) : 0;
    const int next = home_at(p.call, max(__ffs(static_cast<int>(steps)) - 1, 0));
    RawEntry entry;  // on its way while this home is waited for
    if (steps != 0) entry = RawEntry(p, next, ahead.token);
    if (!answer_one_early(p, shared, turn, ahead, held)) return;
    ahead.answered |= 1u << step;
    if (steps == 0) return;
    ahead.home = next;
    ahead.entry = entry.read(p);
    load_rows(p, ahead.entry, ahead.strip, held);
  }
}

/// What a round asks of a warp: use(step, home, token, number in the span, asked), asked in lanes.
template <class Use>
__device__ __forceinline__ void for_each_asked(const CallParams& call, const Shared& shared, const Role& role,
                                               const Round& round, Use&& use) {
#pragma unroll 1
  for (int i = 0; i < round.span.count; ++i) {
    const int step = round.span.step_of(i), token = round.span.token_of(i);
    if ((role.steps >> step & 1) == 0 || (round.asks >> (i * call.top_k) & 1) == 0) continue;
    const int home = home_at(call, step);
    if ((shared.ranks >> home & 1) == 0) continue;
    Asked asked;
    if (lane_index() < call.top_k) asked = round.asked[i * call.top_k + lane_index()];
    if (!__any_sync(kAllLanes, asked.expert >= 0)) continue;
    use(step, home, token, i, asked);
  }
}

/// Until the clerk says that there is no more to answer. `held`: the rows ahead.
__device__ __forceinline__ void answer_rounds(const CombineParams& p, Shared& shared, const Role& role,
                                              const Turn& turn, Ahead& ahead, Held& held) {
  const CallParams& call = p.call;
  for_each_round(call, shared, role, 0, [&](const Round& round) {
    for_each_asked(call, shared, role, round, [&](int step, int home, int token, int i, const Asked& asked) {
      std::int32_t entry = ahead.entry;
      if (home != ahead.home || token != ahead.token) entry = RawEntry(p, home, token).read(p);
#pragma unroll 1
      for (int strip = round.item.first_strip + role.warp; strip < round.item.end_strip; strip += role.warps) {
        if (ahead.is_answered(step, token, strip)) continue;
        if (!ahead.has(home, token, strip)) {
          load_rows(p, entry, strip, held);
          ahead.strip = -1;  // what was held ahead is gone
        }
        const Vectors<false> sum = weigh(p, entry, asked, strip, held);
        put_answer(call, turn, round.form[round.span.place_of(i)], home, token, strip, sum);
      }
    });
  });
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
  Outbox outbox(role, shared, 0);
  int at = this_share();
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
      outbox.add(home, any ? at : -1);
    }
  }
  outbox.send(true);
}

/// Those that answer, in a refresh turn.
static __device__ __noinline__ void forget_unwritten(const CombineParams& p, const Shared& shared, const Role role,
                                                     const Turn turn, bool per_choice) {
  const CallParams& call = p.call;
  const Block& block = shared.block;
  const unsigned threads = static_cast<unsigned>(role.answerers * kLanes);
  const std::uint32_t first_word =
      per_choice ? kCountsAt : call.cut.table_word(static_cast<unsigned>(call.routing.num_tokens), 0);
  const auto worker_of = [threads](int share) { return static_cast<unsigned>(share) * threads + threadIdx.x; };
  const unsigned workers = gridDim.x * threads;
  refresh(call, turn, shared.ranks, first_word, worker_of(this_share()), workers);
  const auto clear_flags = [&](int share) {
    refresh_flags(
        call, turn, shared.ranks,
        [&call, &block, per_choice](int peer) {
          if (per_choice) return num_chunks(call.max_tokens);
          return peer == call.team.rank || block.form[peer] != Form::kRecords ? 0 : num_chunks(block.tokens[peer]);
        },
        worker_of(share), workers);
  };
  if (per_choice) return clear_flags(this_share());
  // A block that retreats may not know which flags its peers get: the one that serves in its place clears its share of the others.
  if (any_lane(retreats(block))) return;
  for_each_share(block, true, clear_flags);
}

}  // namespace anyep::cuda::low_latency::homeward
