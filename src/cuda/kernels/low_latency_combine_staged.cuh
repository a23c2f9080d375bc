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

  __device__ __forceinline__ Ring(Slot* slots, int num_slots) : slots_(slots), num_slots_(num_slots) {}

  __device__ __forceinline__ bool is_full() const { return count_ == num_slots_; }

  /// Sets a strip of the first lanes' rows on its way, of those in `lanes`; there must be room.
  __device__ __forceinline__ void push(unsigned lanes, const std::byte* row, std::int64_t hidden, int strip) {
    const int at = first_ + count_;
    Slot& slot = slots_[at < num_slots_ ? at : at - num_slots_];
    const int element = element_of<false>(strip, 0);
    const bool here = element < hidden;
#pragma unroll
    for (int i = 0; i < Slot::kRows; ++i) {
      if ((lanes >> i & 1) == 0) continue;
      ptx::cp_async(&slot.rows[i][lane_index()], from_lane(row, i) + (here ? element * 2 : 0), here);
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

/// Rows on their way before it is known whether they are asked for: of the first home's token that comes next.
struct Guess {
  LaneOfChoices lane;
  Item item;             ///< of each home's tokens, where it has as many as this rank
  std::int32_t entries;  ///< of the item's first token, of the homes of the lanes
  int step = 0;          ///< whose rows are on their way; 0 = none
  int begun = 0;         ///< strips
  bool one_item;         ///< the block has no other

  __device__ __forceinline__ Guess(const CombineParams& p, const Item& at, bool only)
      : lane(p.call), item(at), entries(-1), one_item(only) {
    const CallParams& call = p.call;
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

/// answer_rounds() with rows in shared memory.
__device__ __forceinline__ void answer_staged(const CombineParams& p, Shared& shared, const Role& role,
                                              const Turn& turn, Ring& ring, Guess& guess) {
  const CallParams& call = p.call;
  int releases = 0;
#pragma unroll 1
  for (int parity = 0;; parity ^= 1) {
    ptx::barrier_sync(kRoundBarrier, role.answer_threads());  // and whoever is here is through with the round before
    const Round& round = shared.round[parity];
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
          put_answer(p, turn, round.form[round.span.of_tokens ? 0 : i], home, round.span.token_of(i), strip, sum);
        });
    if (round.chunk >= 0 && !round.last) guess.make(ring, p, role, round.span.step + 1);
    if (round.chunk >= 0) tell_release(role, shared, home_at(call, round.span.step), round.chunk, releases);
    if (round.last) break;
  }
  ring.clear();
  tell_no_more(role, shared, releases);
}

/// This rank's own share of a share of its tokens, as answers to itself.
__device__ __forceinline__ void answer_self(const CombineParams& p, const Role& role, const Turn& turn, Ring& ring,
                                            int share) {
  const CallParams& call = p.call;
  const bool in_records = own_form(call, turn) == Form::kRecords;
  const int tokens = call.routing.num_tokens;
  OwnToken ahead, own;
#pragma unroll 1
  for (int at = share; at < num_items(call, in_records, tokens); at += static_cast<int>(gridDim.x)) {
    const Item item = item_of(call, in_records, tokens, at);
    flow(
        ring, role, item, 0,
        [&](int token, int strip) {
          if (token != ahead.token) ahead.load(p, token);
          push_rows(ring, p, ahead.entry, strip);
        },
        [&](int token, int strip, const Slot& slot) {
          if (token != own.token) {
            if (token == ahead.token) {
              own = ahead;
            } else {
              own.load(p, token);
            }
          }
          Asked asked = own.choice.ask;
          if (own.choice.rank != call.team.rank) asked.expert = -1;
          const Vectors<false> sum =
              weigh_rows(p, own.entry, asked, strip, [&](int row) -> const Vectors<false>& { return slot.row(row); });
          put_answer(p, turn, Form::kRecords, call.team.rank, token, strip, sum);
        });
  }
}

/// receive_answers() where this rank's own shares are answers, too.
__device__ __forceinline__ void receive_staged(const CombineParams& p, Shared& shared, const Role& role,
                                               const Turn& turn, int share, Ring& ring, int& parity) {
  const CallParams& call = p.call;
  Block& block = shared.block;
  const int tokens = call.routing.num_tokens, me = call.team.rank;
  const Form form = own_form(call, turn);
  const bool in_records = form == Form::kRecords;
#pragma unroll 1
  for (int at = share; at < num_items(call, in_records, tokens); at += static_cast<int>(gridDim.x)) {
    const Item item = item_of(call, in_records, tokens, at);
    unsigned hosts = 0;  // of token item.first + lane: chunks have at most a warp's worth
#pragma unroll 1
    for (int token = item.first; token < item.end; ++token) {
      const int rank = choice_of_lane(call, token).rank;
      const unsigned bits = __reduce_or_sync(kAllLanes, rank >= 0 ? 1u << rank : 0);
      if (lane_index() == token - item.first) hosts = bits;
    }
    unsigned present = block.present;
    if (in_records) present = await_chunk(call, shared, role, turn, at, ~(1u << me), parity) | 1u << me;
    hosts &= present;
    const auto hosts_of = [&](int token) { return from_lane(hosts, token - item.first); };
    const auto record_of = [&](int token, int rank) {
      return region_from(call, turn, rank) + call.at.records + call.cut.record(static_cast<unsigned>(token), 0);
    };
    if (in_records) {
      flow(
          ring, role, item, 0,
          [&](int token, int strip) {
            ring.push(hosts_of(token), record_of(token, min(lane_index(), call.team.num_ranks - 1)), call.hidden,
                      strip);
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
      continue;
    }
    for (Walk walk(role, item); walk.more(); walk.advance()) {
      OwnToken own;
      own.load(p, walk.token);
      Vectors<false> mine;
      load_strip<false>(record_of(walk.token, me), call.hidden, walk.strip, mine);
      add_answers(p, block, turn, form, present, own, walk.strip, mine);
    }
  }
}
static_assert(kMaxTokens <= kMaxChunks * kLanes);

/// A data warp of a kernel with staged rows.
__device__ __forceinline__ void run_staged(const CombineParams& p, Shared& shared, const Role& role, Slot* slots) {
  const CallParams& call = p.call;
  Block& block = shared.block;
  const int index = static_cast<int>(blockIdx.x), tokens = call.routing.num_tokens;
  const bool in_records = call.own_form == Form::kRecords;
  Ring ring(slots + warp_index() * p.slots, p.slots);
  const int items = num_items(call, in_records, tokens);
  const Item item = index < items ? item_of(call, in_records, tokens, index) : first_item(call);
  enter(call, block);
  Guess guess(p, item, index + static_cast<int>(gridDim.x) >= items);
  const Turn turn = find_turn(call);
  ptx::barrier_arrive(kTurnBarrier, all_threads());
  // Own shares are made while others' asks are on their way, or one token's while its answers are.
  const bool self_first = item.end > item.first + 1;
  if (self_first) answer_self(p, role, turn, ring, index);
  guess.make(ring, p, role, 1);
  answer_staged(p, shared, role, turn, ring, guess);
  if (is_refresh(turn.number)) [[unlikely]]
    forget_unwritten(p, shared, role, turn, false);
  if (any_lane(retreats(block))) return;
  int parity = 0;
  for_each_share(block, true, [&](int share) {
    if (share != index || !self_first) answer_self(p, role, turn, ring, share);
    receive_staged(p, shared, role, turn, share, ring, parity);
  });
}

}  // namespace anyep::cuda::low_latency::homeward
