// High-throughput combine.
//
//   after   out[t] == bias + the sum, over ranks ascending, of that rank's row for token t: FP32, rounded once
//   roles   this rank sends the rows of its peers' tokens and, chunk by chunk of its own tokens, adds up
//   moves   x in this rank's window: peers gather it. Own rows go through no slot.
//           Any other x, and weights: to slot [rank][token mod chunk] at the token's home, a chunk of tokens per turn.
//   syncs   handoff.h, combine stream: a ring of two slot regions, granted two turns ahead for good;
//           the sender's offer says which fields lie where.
//           A sender whose x is gathered stays until every reader has taken its last turn.
//   needs   the same handle arrays and field bytes on every rank (the call's digest)
#include <algorithm>
#include <cstring>
#include <vector>

#include "core/layout.h"
#include "cpu/backend.h"
#include "cpu/fields.h"
#include "cpu/simd/kernels.h"
#include "host/op_run.h"

namespace anyep::cpu {
namespace {

using core::kFieldWeights;
using core::kFieldX;
using core::kNotInWindow;
using core::kStreamCombine;

constexpr std::uint16_t kCode = protocol::make_code(kStreamCombine, 0);
/// As in dispatch: slots and results of small ops stay in the cache, those of large ones go around it.
constexpr std::int64_t kStreamFromBytes = 1 << 20;

/// What this rank, as a token's home, knows of one expert rank.
struct Expert {
  std::uint32_t slotted = 0;          ///< fields in slots
  const std::byte* rows = nullptr;    ///< of x: row 0 in its window, or null
  const std::byte* region = nullptr;  ///< slots of the current turn
  core::TurnLayout slots;
};

class Combine {
 public:
  Combine(Group& group, const backend::Call& call, const backend::CombineCall& combine)
      : run_(group, call),
        group_(group),
        call_(combine),
        handle_(*combine.handle),
        kernels_(simd::kernels()),
        ranks_(group.num_ranks()),
        me_(group.rank()),
        x_(combine.in.x),
        weights_(combine.in.weights) {
    find_fields();
  }

  void execute() {
    run_.at(kBeforeSend);
    const std::uint32_t own_turns = turns_of(me_);
    std::uint32_t most = own_turns;
    for (int home = 0; home < ranks_; ++home) most = std::max(most, turns_of(home));
    for (std::uint32_t turn = 0; turn < most; ++turn) {
      for (int step = 1; step < ranks_; ++step) {
        const int home = (me_ + step) % ranks_;
        if (turn < sent_turns_to(home)) send(home, turn);
      }
      if (turn == 0) run_.at(kAfterFlag);
      if (turn < own_turns) reduce(turn);
      if (turn == 0) run_.at(kInReceive);
    }
    simd::stream_fence();
    take_gathered();
    if (gathered_) {
      for (int step = 1; step < ranks_; ++step) {
        const int home = (me_ + step) % ranks_;
        run_.must(producer(home).wait_until_taken(run_.waiter, who(home, kAfterFlag), core::kRegions),
                  who(home, kAfterFlag));
      }
    }
    run_.finish();
  }

 private:
  void find_fields() {
    all_fields_ = 1u << kFieldX;
    if (call_.fields.bytes[kFieldWeights] != 0) all_fields_ |= 1u << kFieldWeights;
    const core::WindowLayout& layout = group_.layout();
    const std::byte* const heap = group_.own(layout.heap);
    const std::uint64_t bytes = static_cast<std::uint64_t>(handle_.num_rows() * x_.row_stride);
    gathered_ = x_.dense() && x_.data >= heap && x_.data + bytes <= heap + layout.heap_bytes;
    slotted_ = gathered_ ? all_fields_ & ~(1u << kFieldX) : all_fields_;
    const std::uint64_t fit = core::TurnLayout::rows_that_fit(call_.fields, all_fields_, layout.slot_region_bytes);
    if (fit == 0 && ranks_ > 1) {
      core::throw_capacity(run_.call.op,
                           "bytes of one slot (1/32 of budget.rows_bytes over the ranks, at most 1 MiB, is a turn)",
                           call_.fields.total() + core::kMaxFields * core::kArrayAlignment, layout.slot_region_bytes,
                           "Create the engine with a larger rows_bytes.");
    }
    tokens_per_turn_ = ranks_ > 1 ? static_cast<std::int64_t>(fit) : std::max<std::int64_t>(handle_.num_tokens, 1);
    slots_ = core::TurnLayout::make(call_.fields, slotted_, static_cast<std::uint64_t>(tokens_per_turn_));
    experts_.resize(static_cast<std::size_t>(ranks_));
    next_row_.resize(static_cast<std::size_t>(ranks_));
    rows_.resize(static_cast<std::size_t>(ranks_));
    for (int home = 0; home < ranks_; ++home) next_row_[static_cast<std::size_t>(home)] = handle_.first_row(home);
    stream_out_ = handle_.num_tokens * x_.bytes() >= kStreamFromBytes;
    fill_ = handle_.num_rows() * x_.bytes() >= kStreamFromBytes ? kernels_.stream : kernels_.copy;
  }

  /// Chunks of a home's tokens; cut alike for every sender, so that two ranks never wait for each other's chunks.
  std::uint32_t turns_of(int home) const {
    const auto tokens = std::max<std::int64_t>(handle_.tokens[static_cast<std::size_t>(home)], 1);
    return static_cast<std::uint32_t>((tokens + tokens_per_turn_ - 1) / tokens_per_turn_);
  }
  /// A sender with nothing in slots takes one turn.
  std::uint32_t sent_turns_to(int home) const { return slotted_ == 0 ? 1 : turns_of(home); }

  // ---- sending ----

  void send(int home, std::uint32_t turn) {
    protocol::Producer out = producer(home);
    run_.must(out.wait_for_credit(run_.waiter, who(home, kMidSend)), who(home, kMidSend));
    if (slotted_ != 0) fill_slots(home, turn, group_.peer(home, group_.layout().slot_region(me_, out.turn())));
    if (turn == 0) {
      auto* const offer = reinterpret_cast<core::OfferRecord*>(
          group_.peer(home, group_.layout().offer_record(kStreamCombine, me_, out.turn())));
      offer->call = run_.call.number;
      offer->code = run_.code;
      offer->turns = sent_turns_to(home);
      offer->present = slotted_;
      offer->tokens_per_turn = static_cast<std::uint64_t>(tokens_per_turn_);
      offer->offset[kFieldX] = gathered_ ? static_cast<std::uint64_t>(x_.data - group_.own(0)) : kNotInWindow;
      run_.at(kMidSend);
    }
    simd::stream_fence();  // slots come before the flag (memory model pitfall 20)
    out.publish();
  }

  void fill_slots(int home, std::uint32_t turn, std::byte* region) {
    const std::int64_t begin = static_cast<std::int64_t>(turn) * tokens_per_turn_;
    std::int64_t& row = next_row_[static_cast<std::size_t>(home)];
    for (; row < handle_.last_row(home); ++row) {
      const std::int64_t slot = handle_.source[static_cast<std::size_t>(row)] - begin;
      if (slot >= tokens_per_turn_) break;
      const auto index = static_cast<std::uint64_t>(slot);
      if ((slotted_ >> kFieldX & 1u) != 0) {
        std::byte* const to = region + slots_.offset[kFieldX] + index * slots_.stride[kFieldX];
        if (x_.packed()) {
          fill_(to, x_.row(row), slots_.stride[kFieldX]);
        } else {
          pack_row(x_, row, to);
        }
      }
      if ((slotted_ >> kFieldWeights & 1u) != 0) {
        pack_row(weights_, row, region + slots_.offset[kFieldWeights] + index * slots_.stride[kFieldWeights]);
      }
    }
  }

  // ---- adding up ----

  void reduce(std::uint32_t turn) {
    for (int step = 1; step < ranks_; ++step) {
      const int rank = (me_ + step) % ranks_;
      const Expert& expert = experts_[static_cast<std::size_t>(rank)];
      if (turn == 0 || expert.slotted != 0) arrive(rank, turn);
    }
    const std::int64_t begin = static_cast<std::int64_t>(turn) * tokens_per_turn_;
    const std::int64_t end = std::min(begin + tokens_per_turn_, handle_.num_tokens);
    for (std::int64_t token = begin; token < end; ++token) {
      add_rows(token, token - begin);
      if ((all_fields_ >> kFieldWeights & 1u) != 0) add_weights(token, token - begin);
    }
    for (int step = 1; step < ranks_; ++step) {
      const int rank = (me_ + step) % ranks_;
      if (experts_[static_cast<std::size_t>(rank)].slotted == 0) continue;
      // A rank whose x is gathered too is released only when everything has been read.
      const bool last = turn + 1 == turns_of(me_) && experts_[static_cast<std::size_t>(rank)].rows != nullptr;
      if (!last) give_back(rank);
    }
  }

  void arrive(int rank, std::uint32_t turn) {
    protocol::Consumer in = consumer(rank);
    run_.must(in.wait_for_arrival(run_.waiter, who(rank, kInReceive)), who(rank, kInReceive));
    Expert& expert = experts_[static_cast<std::size_t>(rank)];
    if (turn == 0) read_offer(rank, expert);
    expert.region = group_.own(group_.layout().slot_region(rank, in.turn()));
  }

  void read_offer(int rank, Expert& expert) {
    const core::WindowLayout& layout = group_.layout();
    const auto offer = *reinterpret_cast<const core::OfferRecord*>(
        group_.own(layout.offer_record(kStreamCombine, rank, consumer(rank).turn())));
    run_.check_record(rank, offer.call, offer.code);
    const std::uint32_t without_x = all_fields_ & ~(1u << kFieldX);
    const bool gather = offer.offset[kFieldX] != kNotInWindow;
    const bool right = offer.present == (gather ? without_x : all_fields_) &&
                       offer.tokens_per_turn == static_cast<std::uint64_t>(tokens_per_turn_) &&
                       offer.turns == (offer.present == 0 ? 1 : turns_of(me_));
    if (!right) run_.corrupt(rank, "an offer that does not fit the handle", all_fields_, offer.present);
    expert.slotted = offer.present;
    expert.slots = core::TurnLayout::make(call_.fields, offer.present, offer.tokens_per_turn);
    if (!gather) return;
    std::int64_t most = -1;
    for (std::int64_t token = 0; token < handle_.num_tokens; ++token) most = std::max(most, place(token, rank));
    const std::uint64_t bytes = static_cast<std::uint64_t>(most + 1) * call_.fields.bytes[kFieldX];
    const std::uint64_t at = offer.offset[kFieldX];
    if (at < layout.heap || at > layout.heap + layout.heap_bytes || bytes > layout.heap + layout.heap_bytes - at) {
      run_.corrupt(rank, "an offer outside its heap", layout.heap, at);
    }
    expert.rows = group_.peer(rank, at);
  }

  std::int64_t place(std::int64_t token, int rank) const {
    return handle_.place[static_cast<std::size_t>(token * ranks_ + rank)];
  }

  /// Where `rank`'s share of a token lies; null when the token was not sent there.
  const std::byte* share(std::int64_t token, std::int64_t slot, int rank, int field) const {
    const std::int64_t row = place(token, rank);
    if (row < 0) return nullptr;
    if (rank == me_) return (field == kFieldX ? x_ : weights_).row(row);
    const Expert& expert = experts_[static_cast<std::size_t>(rank)];
    if (field == kFieldX && expert.rows != nullptr) {
      return expert.rows + static_cast<std::uint64_t>(row) * call_.fields.bytes[kFieldX];
    }
    return expert.region + expert.slots.offset[field] + static_cast<std::uint64_t>(slot) * expert.slots.stride[field];
  }

  void add_rows(std::int64_t token, std::int64_t slot) {
    simd::SumRows sum;
    sum.dtype = call_.in.x.dtype;
    sum.out = FieldView(call_.out.x).row(token);
    sum.hidden = call_.hidden;
    sum.stream_out = stream_out_;
    sum.rows = rows_.data();
    for (std::size_t bias = 0; bias < 2; ++bias) {
      if (call_.in.bias[bias].given()) sum.bias[bias] = FieldView(call_.in.bias[bias]).row(token);
    }
    for (int rank = 0; rank < ranks_; ++rank) {
      const std::byte* const row = share(token, slot, rank, kFieldX);
      if (row != nullptr) rows_[static_cast<std::size_t>(sum.num_rows++)] = row;
    }
    kernels_.sum_rows(sum);
  }

  void add_weights(std::int64_t token, std::int64_t slot) {
    const FieldView out(call_.out.weights);
    auto* const sums = reinterpret_cast<float*>(out.row(token));
    std::fill_n(sums, out.num_elements, 0.0f);
    for (int rank = 0; rank < ranks_; ++rank) {
      const std::byte* const row = share(token, slot, rank, kFieldWeights);
      if (row == nullptr) continue;
      const std::int64_t stride = rank == me_ ? weights_.element_stride : 4;
      for (std::int64_t at = 0; at < out.num_elements; ++at) {
        float weight;
        std::memcpy(&weight, row + at * stride, sizeof weight);
        sums[at] += weight;
      }
    }
  }

  void give_back(int rank) {
    protocol::Consumer in = consumer(rank);
    in.take();
    in.grant(core::kRegions);  // pattern F: what was read lies before this
  }

  /// The last turn of every rank whose rows this rank gathered.
  void take_gathered() {
    for (int step = 1; step < ranks_; ++step) {
      const int rank = (me_ + step) % ranks_;
      if (experts_[static_cast<std::size_t>(rank)].rows == nullptr) continue;
      run_.must_not_have_left(rank, kInReceive);  // else its rows may have been other rows by now
      give_back(rank);
    }
  }

  protocol::Producer producer(int peer) const {
    return {group_.producer_end(kStreamCombine, peer), group_.generation(), kCode};
  }
  protocol::Consumer consumer(int peer) const {
    return {group_.consumer_end(kStreamCombine, peer), group_.generation(), kCode};
  }
  static protocol::Who who(int peer, Phase phase) { return {peer, phase}; }

  OpRun run_;
  Group& group_;
  const backend::CombineCall& call_;
  const Handle::State& handle_;
  const simd::Kernels& kernels_;
  const int ranks_, me_;
  const FieldView x_, weights_;
  std::uint32_t all_fields_ = 0, slotted_ = 0;
  bool gathered_ = false, stream_out_ = false;
  void (*fill_)(void*, const void*, std::size_t) = nullptr;  ///< of slots
  std::int64_t tokens_per_turn_ = 1;
  core::TurnLayout slots_;
  std::vector<Expert> experts_;
  std::vector<std::int64_t> next_row_;  ///< [home] next row to send
  std::vector<const void*> rows_;       ///< of one token, ranks ascending
};

}  // namespace

void CpuBackend::combine(const backend::Call& call, const backend::CombineCall& combine) {
  Combine(*group_, call, combine).execute();
}

}  // namespace anyep::cpu
