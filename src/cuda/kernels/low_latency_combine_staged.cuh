// Low-latency combine where a warp has several strips of a row: the rows of the next ones are on their way to shared memory while
// one is summed. Own shares travel as answers, too: at home all answers to a strip are on their way at once.
#pragma once

#include <cstdint>

#include "cuda/kernels/low_latency_combine_receive.cuh"

namespace anyep::cuda::low_latency::homeward {

/// Strips of a token's rows here, or of its answers: a lane reads what it has copied itself.
struct Slot {
  static constexpr int kRows = kHeldRows;
  static_assert(kRows >= kMaxRanks);
  Vectors<false> rows[kRows][kLanes];

  __device__ __forceinline__ const Vectors<false>& row(int i) const { return rows[i][lane_index()]; }
};

/// A warp's slots, oldest first.
class Ring {
 public:
  static constexpr int kMostSlots = 3;

  __device__ __forceinline__ Ring(Slot* slots, int num_slots)
      : slots_(slots), lane_at_(ptx::shared_address(&slots->rows[0][lane_index()])), num_slots_(num_slots) {}

  __device__ __forceinline__ bool is_full() const { return count_ == num_slots_; }

  /// Sets a strip of the first lanes' rows on its way, of those in `lanes`; there must be room.
  __device__ __forceinline__ void push(unsigned lanes, const std::byte* row, std::int64_t hidden, int strip) {
    const int at = first_ + count_;
    const std::uint32_t slot = lane_at_ + static_cast<unsigned>(at < num_slots_ ? at : at - num_slots_) * sizeof(Slot);
    const int element = element_of<false>(strip, 0);
    const bool here = element < hidden;
    const std::byte* from[Slot::kRows];
#pragma unroll
    for (int i = 0; i < Slot::kRows; ++i) from[i] = from_lane(row, i) + (here ? element * 2 : 0);
#pragma unroll
    for (int i = 0; i < Slot::kRows; ++i) {
      ptx::cp_async_if((lanes >> i & 1) != 0, slot + static_cast<unsigned>(i) * sizeof slots_->rows[0], from[i], here);
    }
    ptx::cp_async_commit_group();
    ++count_;
  }
  /// The oldest one, when it is there.
  __device__ __forceinline__ const Slot& front() const {
    if (count_ == 1) {
      ptx::cp_async_wait_group<0>();
    } else if (count_ == 2) {
      ptx::cp_async_wait_group<1>();
    } else {
      ptx::cp_async_wait_group<2>();
    }
    return slots_[first_];
  }
  __device__ __forceinline__ void pop() {
    first_ = first_ + 1 == num_slots_ ? 0 : first_ + 1;
    --count_;
  }
  __device__ __forceinline__ void clear() {
    ptx::cp_async_wait_group<0>();
    count_ = 0;
  }

 private:
  Slot* slots_;
  std::uint32_t lane_at_;  ///< this lane's part of row 0 of the first slot, in shared memory
  int num_slots_, first_ = 0, count_ = 0;
};

/// A warp's strips of an item, token by token.
struct Walk {
  int token, strip;
  int end, first_strip, end_strip, warps;

  __device__ __forceinline__ Walk(const Role& role, const Item& item)
      : strip(item.first_strip + role.warp),
        end(item.end),
        first_strip(strip),
        end_strip(item.end_strip),
        warps(role.warps) {
    token = strip < end_strip ? item.first : end;
  }
  __device__ __forceinline__ bool more() const { return token < end; }
  __device__ __forceinline__ void advance() {
    strip += warps;
    if (strip < end_strip) return;
    strip = first_strip;
    ++token;
  }
};

/// Calls use(token, strip, slot) for a warp's strips of an item; push(token, strip) sets them on their way, as many ahead as there
/// is room for. The first `begun` are.
template <class Push, class Use>
__device__ __forceinline__ void flow(Ring& ring, const Role& role, const Item& item, int begun, Push&& push,
                                     Use&& use) {
  Walk ahead(role, item), now = ahead;
  for (; begun > 0; --begun) ahead.advance();
#pragma unroll 1
  for (; now.more(); now.advance()) {
#pragma unroll 1
    for (; ahead.more() && !ring.is_full(); ahead.advance()) push(ahead.token, ahead.strip);
    use(now.token, now.strip, ring.front());
    ring.pop();
  }
}

/// Rows of this rank's slabs that a token has, for push().
__device__ __forceinline__ void push_rows(Ring& ring, const CombineParams& p, std::int32_t entry, int strip) {
  ring.push(__ballot_sync(kAllLanes, entry >= 0), row_at(p, max(entry, 0)), p.call.hidden, strip);
}

/// Rows on their way before it is known whether they are asked for: of the first token that the next home will ask about.
struct Guess {
  Item item;             ///< of each home's tokens, where it has as many as this rank
  std::int32_t entries;  ///< of the item's first token, of the homes of the lanes
  int step = 0;          ///< whose rows are on their way; 0 = none
  int begun = 0;         ///< strips
  bool one_item;         ///< the block has no other for any home

  __device__ __forceinline__ Guess(const CombineParams& p, const Item& at, bool only)
      : item(at), entries(-1), one_item(only) {
    const CallParams& call = p.call;
    const LaneOfChoices lane(call);
    if (lane.number < min(call.tokens_per_warp, call.team.num_ranks - 1) && item.first < call.max_tokens) {
      const int home = home_at(call, 1 + lane.number);
      entries = p.rows[(home * call.max_tokens + item.first) * call.top_k + lane.choice];
    }
  }
  /// The ring is empty.
  __device__ __forceinline__ void make(Ring& ring, const CombineParams& p, const Role& role, int next) {
    step = begun = 0;
    if (next >= p.call.team.num_ranks || next > p.call.tokens_per_warp || (next > 1 && !one_item)) return;
    const int from = (next - 1) * p.call.top_k + lane_index();
    const std::int32_t raw = from_lane(entries, from % kLanes);
    const std::int32_t entry = lane_index() < p.call.top_k && is_row(p, raw) ? raw : -1;
    step = next;
    Item token = item;
    token.end = min(item.end, item.first + 1);
#pragma unroll 1
    for (Walk walk(role, token); walk.more() && !ring.is_full(); walk.advance(), ++begun) {
      push_rows(ring, p, entry, walk.strip);
    }
  }
  /// Strips of a round that are on their way; else the ring is empty again.
  __device__ __forceinline__ int begun_of(Ring& ring, const Round& round) {
    const int known = begun;
    begun = 0;
    if (known == 0) return 0;
    if (round.span.count != 0 && round.span.step == step && round.span.token == item.first &&
        round.item.first_strip == item.first_strip && round.item.end_strip == item.end_strip) {
      return known;
    }
    ring.clear();
    return 0;
  }
};

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

/// answer_rounds() with rows in shared memory.
__device__ __forceinline__ void answer_staged(const CombineParams& p, Shared& shared, const Role& role,
                                              const Turn& turn, Ring& ring, Guess& guess) {
  const CallParams& call = p.call;
  for_each_round(call, shared, role, 0, [&](const Round& round) {
    const int begun = guess.begun_of(ring, round);
    const Item numbers{0, round.span.count, round.item.first_strip, round.item.end_strip};
    flow(
        ring, role, numbers, begun,
        [&](int i, int strip) { push_rows(ring, p, Question(call, round, i).entry, strip); },
        [&](int i, int strip, const Slot& slot) {
          const int home = home_at(call, round.span.step_of(i));
          if ((round.asks >> (i * call.top_k) & 1) == 0 || (shared.ranks >> home & 1) == 0) return;
          const Question question(call, round, i);
          if (!__any_sync(kAllLanes, question.asked.expert >= 0)) return;
          const Vectors<false> sum = weigh_rows(p, question.entry, question.asked, strip,
                                                [&](int row) -> const Vectors<false>& { return slot.row(row); });
          put_answer(call, turn, round.form[round.span.place_of(i)], home, round.span.token_of(i), strip, sum);
        });
    if (round.chunk >= 0 && !round.last) guess.make(ring, p, role, round.span.step + 1);
  });
}

/// A share's chunks of own tokens: handle(chunk, item).
template <class Handle>
__device__ __forceinline__ void for_each_chunk(const CallParams& call, int share, Handle&& handle) {
  const int tokens = call.routing.num_tokens;
#pragma unroll 1
  for (int at = share; at < num_chunks(tokens); at += static_cast<int>(gridDim.x)) {
    handle(at, item_of(call, true, tokens, at));
  }
}

/// Own tokens in a row, as many as the lanes have room for, loaded at once: what they ask this rank, and their rows here.
class OwnTokens {
 public:
  __device__ __forceinline__ bool has(int token) const { return token >= first_ && token < end_; }
  /// Tokens from `first` on, before `end`.
  __device__ __forceinline__ void load(const CombineParams& p, int first, int end) {
    const CallParams& call = p.call;
    const LaneOfChoices lane(call);
    const int token = first + lane.number, me = call.team.rank;
    first_ = first;
    end_ = min(end, first + call.tokens_per_warp);
    RawChoice choice;
    std::int32_t entry = -1;
    if (token < end_) {
      choice = RawChoice(call, token, lane.choice);
      entry = p.rows[(me * call.max_tokens + token) * call.top_k + lane.choice];
    }
    asked_ = choice.read(call).asked_of(me);
    entry_ = is_row(p, entry) ? entry : -1;
  }
  /// Of one of them, its choices in the first lanes.
  __device__ __forceinline__ std::int32_t entry_of(const CallParams& call, int token) const {
    const std::int32_t entry = from_lane(entry_, lane_of(call, token));
    return lane_index() < call.top_k ? entry : -1;
  }
  __device__ __forceinline__ Asked asked_of(const CallParams& call, int token) const {
    const int from = lane_of(call, token);
    const Asked asked{from_lane(asked_.expert, from), from_lane(asked_.weight, from)};
    return lane_index() < call.top_k ? asked : Asked{};
  }

 private:
  __device__ __forceinline__ int lane_of(const CallParams& call, int token) const {
    return ((token - first_) * call.top_k + lane_index()) % kLanes;
  }

  int first_ = 0, end_ = 0;
  Asked asked_;
  std::int32_t entry_ = -1;
};

/// This rank's own share of the sums of a share of its tokens, as answers to itself.
__device__ __forceinline__ void answer_self(const CombineParams& p, const Role& role, const Turn& turn, Ring& ring,
                                            int share) {
  const CallParams& call = p.call;
  OwnTokens ahead, own;
  for_each_chunk(call, share, [&](int, const Item& item) {
    flow(
        ring, role, item, 0,
        [&](int token, int strip) {
          if (!ahead.has(token)) ahead.load(p, token, item.end);
          push_rows(ring, p, ahead.entry_of(call, token), strip);
        },
        [&](int token, int strip, const Slot& slot) {
          if (!own.has(token)) {
            if (ahead.has(token)) {
              own = ahead;
            } else {
              own.load(p, token, item.end);
            }
          }
          const Vectors<false> sum = weigh_rows(p, own.entry_of(call, token), own.asked_of(call, token), strip,
                                                [&](int row) -> const Vectors<false>& { return slot.row(row); });
          put_answer(call, turn, Form::kRecords, call.team.rank, token, strip, sum);
        });
  });
}

/// receive_answers() where this rank's own shares are answers, too.
__device__ __forceinline__ void receive_staged(const CombineParams& p, Shared& shared, const Role& role,
                                               const Turn& turn, int share, Ring& ring, int& parity) {
  const CallParams& call = p.call;
  const unsigned me = 1u << call.team.rank;
  for_each_chunk(call, share, [&](int chunk, const Item& item) {
    unsigned hosts = 0;  // of token item.first + lane
#pragma unroll 1
    for (int token = item.first; token < item.end; ++token) {
      const int rank = choice_of_lane(call, token).rank;
      const unsigned bits = __reduce_or_sync(kAllLanes, rank >= 0 ? 1u << rank : 0);
      if (lane_index() == token - item.first) hosts = bits;
    }
    hosts &= await_chunk(call, shared, role, turn, chunk, ~me, parity) | me;
    const auto hosts_of = [&](int token) { return from_lane(hosts, token - item.first); };
    flow(
        ring, role, item, 0,
        [&](int token, int strip) {
          const int rank = min(lane_index(), call.team.num_ranks - 1);
          const std::byte* const record = region_from(call, turn, rank) + call.at.records + call.cut.record(token, 0);
          ring.push(hosts_of(token), record, call.hidden, strip);
        },
        [&](int token, int strip, const Slot& slot) {
          const unsigned ranks = hosts_of(token);
          Sums<false> total;
#pragma unroll
          for (int rank = 0; rank < kMaxRanks; ++rank) {
            if ((ranks >> rank & 1) != 0) add(total, slot.row(rank));
          }
          store_strip<false>(p.out + token * p.out_row_stride, call.hidden, strip, rounded(total));
        });
  });
}
static_assert(kMaxTokens <= kMaxChunks * kLanes);  // a chunk's tokens have a lane each

/// A data warp of a kernel with staged rows: own rows are records, several tokens a chunk.
__device__ __forceinline__ void run_staged(const CombineParams& p, Shared& shared, const Role& role, Slot* slots) {
  const CallParams& call = p.call;
  Block& block = shared.block;
  const int index = this_share(), tokens = call.routing.num_tokens, chunks = num_chunks(tokens);
  Ring ring(slots + warp_index() * p.slots, p.slots);
  const Item item = index < chunks ? item_of(call, true, tokens, index) : first_item(call);
  enter(call, block);
  Guess guess(p, item, index + static_cast<int>(gridDim.x) >= chunks);
  const Turn turn = find_turn(call);
  ptx::barrier_arrive(kTurnBarrier, all_threads());
  answer_self(p, role, turn, ring, index);  // while the others' asks are on their way
  guess.make(ring, p, role, 1);
  answer_staged(p, shared, role, turn, ring, guess);
  if (is_refresh(turn.number)) [[unlikely]]
    forget_unwritten(p, shared, role, turn, false);
  if (any_lane(retreats(block))) return;
  int parity = 0;
  for_each_share(block, true, [&](int share) {
    if (share != index) answer_self(p, role, turn, ring, share);
    receive_staged(p, shared, role, turn, share, ring, parity);
  });
}

}  // namespace anyep::cuda::low_latency::homeward
