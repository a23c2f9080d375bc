// High-throughput dispatch.
//
//   after   out row i == x_r[source[i]] for rows_until[r-1] <= i < rows_until[r], every rank r, bit for bit
//   roles   this rank sends its tokens turn by turn and, between turns, fetches what its peers have staged
//   moves   fields whose output lies in the receiver's window: x -> its place there, once per receiver (push)
//           other fields: x -> own staging, once, in turns of some tokens; receivers copy from there (fetch)
//   syncs   handoff.h, dispatch stream: the receiver's grant says which fields lie where;
//           the sender's offer says how the turns are cut. Credits never go beyond the op's last turn.
//   needs   the same handle arrays and field bytes on every rank (the call's digest)
#include <algorithm>
#include <cstring>
#include <vector>

#include "core/layout.h"
#include "core/routing.h"
#include "cpu/backend.h"
#include "cpu/fields.h"
#include "cpu/simd/kernels.h"
#include "host/op_run.h"

namespace anyep::cpu {
namespace {

using core::kFieldExperts;
using core::kFieldScales;
using core::kFieldWeights;
using core::kFieldX;
using core::kMaxFields;
using core::kNotInWindow;
using core::kStreamDispatch;

/// Own rows copied between two looks for credit, while peers are late.
constexpr std::int64_t kTokensPerLook = 16;
/// Ops that move less than this keep their rows in the cache: the reader comes next (L2 of 1 MiB and more). Larger ops write
/// around it, staging too: lines that two cores exchange through a cache that is full of other data cost three times as much
/// (bench/METRICS.md, "What bounds the CPU backend").
constexpr std::int64_t kStreamFromBytes = 1 << 20;

constexpr std::uint16_t kCode = protocol::make_code(kStreamDispatch, 0);

/// What this rank, as sender, knows of one receiver.
struct Receiver {
  core::GrantRecord grant;
  std::uint32_t pushed = 0;  ///< fields that go to its window
  std::byte* window = nullptr;
};

/// What this rank, as receiver, knows of one source.
struct Source {
  std::uint32_t turns = 1;
  std::uint32_t present = 0;
  std::int64_t tokens_per_turn = 0;
  std::int64_t next_row = 0;
  core::TurnLayout layout;
};

class Dispatch {
 public:
  Dispatch(Group& group, const backend::Call& call, const backend::DispatchCall& dispatch)
      : run_(group, call),
        group_(group),
        call_(dispatch),
        handle_(*dispatch.handle),
        kernels_(simd::kernels()),
        ranks_(group.num_ranks()),
        me_(group.rank()) {
    find_fields();
    const std::int64_t moved = handle_.num_rows() * static_cast<std::int64_t>(call_.fields.total());
    move_ = moved >= kStreamFromBytes ? kernels_.stream : kernels_.copy;
  }

  void execute() {
    for (int step = 1; step < ranks_; ++step) grant_to((me_ + step) % ranks_);
    run_.at(kBeforeSend);
    own_rows_while_peers_are_late();
    for (int step = 1; step < ranks_; ++step) take_grant((me_ + step) % ranks_);
    cut_turns();
    std::uint32_t most = own_turns_;
    for (std::uint32_t turn = 0; turn < most; ++turn) {
      if (turn < own_turns_) send(turn);
      if (turn == 0) run_.at(kAfterFlag);
      for (int step = 1; step < ranks_; ++step) {
        const int source = (me_ + step) % ranks_;
        if (turn < sources_[static_cast<std::size_t>(source)].turns) receive(source, turn);
        most = std::max(most, sources_[static_cast<std::size_t>(source)].turns);
      }
    }
    run_.finish();
    mark_rest();
  }

 private:
  // ---- fields ----

  void find_fields() {
    const auto set = [&](int field, const TensorView& in, const TensorView& out) {
      if (call_.fields.bytes[field] == 0) return;
      all_fields_ |= 1u << field;
      in_[field] = FieldView(in);
      out_[field] = FieldView(out);
    };
    set(kFieldX, call_.x.x, call_.out.x);
    set(kFieldScales, call_.x.scales, call_.out.scales);
    set(kFieldExperts, call_.x.experts, call_.out.experts);
    set(kFieldWeights, call_.x.weights, call_.out.weights);
    for (std::size_t extra = 0; extra < call_.x.extra.size(); ++extra) {
      set(core::kFirstExtraField + static_cast<int>(extra), call_.x.extra[extra], call_.out.extra[extra]);
    }
    if (call_.x.experts.given()) {
      ids_ = core::ExpertIds(call_.x.experts, handle_.num_experts);
      block_ = core::expert_block(handle_.num_experts, ranks_, me_);
    }
    receivers_.resize(static_cast<std::size_t>(ranks_));
    sources_.resize(static_cast<std::size_t>(ranks_));
    for (int source = 0; source < ranks_; ++source) {
      sources_[static_cast<std::size_t>(source)].next_row = handle_.first_row(source);
    }
  }

  /// Offset of a field of `out` in this rank's window, if peers may write it there.
  std::uint64_t window_offset(int field) const {
    if (field == kFieldExperts || field == kFieldWeights) return kNotInWindow;  // the receiver edits these
    const FieldView& out = out_[field];
    const core::WindowLayout& layout = group_.layout();
    const std::byte* const heap = group_.own(layout.heap);
    const std::uint64_t bytes = static_cast<std::uint64_t>(call_.room * out.row_stride);
    const bool inside = out.data >= heap && out.data + bytes <= heap + layout.heap_bytes;
    return inside && out.packed() ? static_cast<std::uint64_t>(out.data - group_.own(0)) : kNotInWindow;
  }

  // ---- agreement: the receiver's grant, the sender's offer ----

  void grant_to(int source) {
    auto* const record = reinterpret_cast<core::GrantRecord*>(group_.peer(source, group_.layout().grant_record(me_)));
    record->call = run_.call.number;
    record->code = run_.code;
    record->room = call_.room;
    for (int field = 0; field < kMaxFields; ++field) {
      const bool travels = (all_fields_ >> field & 1u) != 0;
      record->offset[field] = travels ? window_offset(field) : kNotInWindow;
      record->stride[field] = travels ? static_cast<std::uint64_t>(out_[field].row_stride) : 0;
      if (record->offset[field] != kNotInWindow) own_window_ |= 1u << field;
    }
    consumer(source).grant(1);
  }

  void take_grant(int peer) {
    run_.must(producer(peer).wait_for_credit(run_.waiter, who(peer, kBeforeSend)), who(peer, kBeforeSend));
    Receiver& receiver = receivers_[static_cast<std::size_t>(peer)];
    receiver.grant = *reinterpret_cast<const core::GrantRecord*>(group_.own(group_.layout().grant_record(peer)));
    receiver.window = group_.peer(peer, 0);
    run_.check_record(peer, receiver.grant.call, receiver.grant.code);
    const core::WindowLayout& layout = group_.layout();
    for (int field = 0; field < kMaxFields; ++field) {
      if (receiver.grant.offset[field] == kNotInWindow || (all_fields_ >> field & 1u) == 0) continue;
      receiver.pushed |= 1u << field;
      const std::uint64_t begin = receiver.grant.offset[field], stride = receiver.grant.stride[field];
      const auto room = static_cast<std::uint64_t>(std::max<std::int64_t>(receiver.grant.room, 0));
      const bool fits = begin >= layout.heap && begin <= layout.heap + layout.heap_bytes &&
                        stride >= call_.fields.bytes[field] &&
                        (room == 0 || stride <= (layout.heap + layout.heap_bytes - begin) / room);
      if (!fits) run_.corrupt(peer, "a grant outside its heap", layout.heap, begin);
    }
    staged_ |= all_fields_ & ~receiver.pushed;
  }

  void cut_turns() {
    const auto region_bytes = group_.layout().staging_region_bytes;
    const std::uint64_t fit = core::TurnLayout::rows_that_fit(call_.fields, staged_, region_bytes);
    if (fit == 0) {
      core::throw_capacity(run_.call.op,
                           "bytes of one staged row (1/32 of budget.rows_bytes, at most 2 MiB, is a turn)",
                           call_.fields.total() + kMaxFields * core::kArrayAlignment, region_bytes,
                           "Create the engine with a larger rows_bytes.");
    }
    const std::int64_t tokens = std::max<std::int64_t>(handle_.num_tokens, 1);
    tokens_per_turn_ = std::min(static_cast<std::int64_t>(fit), tokens);
    own_turns_ = static_cast<std::uint32_t>(
        core::ceil_div(static_cast<std::uint64_t>(tokens), static_cast<std::uint64_t>(tokens_per_turn_)));
    staging_ = core::TurnLayout::make(call_.fields, staged_, static_cast<std::uint64_t>(tokens_per_turn_));
  }

  // ---- sending ----

  std::int64_t place(std::int64_t token, int rank) const {
    return handle_.place[static_cast<std::size_t>(token * ranks_ + rank)];
  }

  /// Hides the wait for credit behind own rows; when the peers are there already, a row is read once for all of them.
  void own_rows_while_peers_are_late() {
    const auto all_there = [&] {
      for (int peer = 0; peer < ranks_; ++peer) {
        if (peer != me_ && !producer(peer).has_credit()) return false;
      }
      return true;
    };
    while (own_done_ < handle_.num_tokens && !all_there()) {
      const std::int64_t until = std::min(own_done_ + kTokensPerLook, handle_.num_tokens);
      for (; own_done_ < until; ++own_done_) keep_own(own_done_);
    }
  }

  void keep_own(std::int64_t token) {
    const std::int64_t row = place(token, me_);
    if (row < 0 || row >= call_.room) return;
    for (int field = 0; field < kMaxFields; ++field) {
      if ((all_fields_ >> field & 1u) == 0) continue;
      std::byte* const out = out_[field].row(row);
      if (field == kFieldX && in_[field].packed()) {
        move_(out, in_[field].row(token), static_cast<std::size_t>(in_[field].bytes()));
      } else if (field == kFieldExperts || field == kFieldWeights) {
        continue;
      } else {
        pack_row(in_[field], token, out);
      }
    }
    if (call_.x.experts.given()) {
      for (int choice = 0; choice < call_.top_k; ++choice) scratch_ids_[choice] = ids_.at(token, choice);
      if (in_[kFieldWeights].given()) {
        pack_row(in_[kFieldWeights], token, reinterpret_cast<std::byte*>(scratch_weights_));
      }
      write_choices(row, scratch_ids_, scratch_weights_);
    }
  }

  void send(std::uint32_t turn) {
    for (int step = 1; step < ranks_ && turn > 0; ++step) {
      const int peer = (me_ + step) % ranks_;
      run_.must(producer(peer).wait_for_credit(run_.waiter, who(peer, kMidSend)), who(peer, kMidSend));
    }
    const std::int64_t begin = static_cast<std::int64_t>(turn) * tokens_per_turn_;
    const std::int64_t end = std::min(begin + tokens_per_turn_, handle_.num_tokens);
    std::byte* const region = group_.own_memory()->staging.data() + group_.layout().staging_region(turn);
    for (std::int64_t token = begin; token < end; ++token) {
      if (token >= own_done_) keep_own(token);
      bool goes_out = false;
      for (int step = 1; step < ranks_; ++step) {
        const int peer = (me_ + step) % ranks_;
        const std::int64_t row = place(token, peer);
        const Receiver& receiver = receivers_[static_cast<std::size_t>(peer)];
        if (row < 0 || row >= receiver.grant.room) continue;
        goes_out = true;
        if (receiver.pushed != 0) push(receiver, token, row);
      }
      if (goes_out && staged_ != 0) stage(region, token, token - begin);
    }
    if (turn == 0) run_.at(kMidSend);
    simd::stream_fence();  // non-temporal stores come before the flags (memory model pitfall 20)
    for (int step = 1; step < ranks_; ++step) publish((me_ + step) % ranks_, turn);
  }

  void push(const Receiver& receiver, std::int64_t token, std::int64_t row) const {
    for (int field = 0; field < kMaxFields; ++field) {
      if ((receiver.pushed >> field & 1u) == 0) continue;
      std::byte* const to = receiver.window + receiver.grant.offset[field] +
                            static_cast<std::uint64_t>(row) * receiver.grant.stride[field];
      if (in_[field].packed()) {
        move_(to, in_[field].row(token), static_cast<std::size_t>(in_[field].bytes()));
      } else {
        pack_row(in_[field], token, to);
      }
    }
  }

  void stage(std::byte* region, std::int64_t token, std::int64_t slot) {
    for (int field = 0; field < kMaxFields; ++field) {
      if ((staged_ >> field & 1u) == 0) continue;
      std::byte* const to = region + staging_.offset[field] + static_cast<std::uint64_t>(slot) * staging_.stride[field];
      if (field == kFieldExperts) {
        for (int choice = 0; choice < call_.top_k; ++choice) scratch_ids_[choice] = ids_.at(token, choice);
        std::memcpy(to, scratch_ids_, staging_.stride[field]);
      } else if (in_[field].packed()) {
        move_(to, in_[field].row(token), static_cast<std::size_t>(in_[field].bytes()));
      } else {
        pack_row(in_[field], token, to);
      }
    }
  }

  void publish(int peer, std::uint32_t turn) {
    if (turn == 0) {
      auto* const offer = reinterpret_cast<core::OfferRecord*>(
          group_.peer(peer, group_.layout().offer_record(kStreamDispatch, me_, producer(peer).turn())));
      offer->call = run_.call.number;
      offer->code = run_.code;
      offer->turns = own_turns_;
      offer->present = staged_;
      offer->tokens_per_turn = static_cast<std::uint64_t>(tokens_per_turn_);
    }
    producer(peer).publish();
  }

  // ---- receiving ----

  void receive(int from, std::uint32_t turn) {
    Source& source = sources_[static_cast<std::size_t>(from)];
    protocol::Consumer in = consumer(from);
    run_.must(in.wait_for_arrival(run_.waiter, who(from, kInReceive)), who(from, kInReceive));
    if (turn == 0) {
      read_offer(from, source);
      if (source.turns > 1) in.grant(std::min(core::kRegions, source.turns));
      run_.at(kInReceive);
    }
    const std::byte* const region = group_.memory(from).staging.data() + group_.layout().staging_region(turn);
    const std::int64_t begin = static_cast<std::int64_t>(turn) * source.tokens_per_turn;
    const std::int64_t last_row = std::min(handle_.last_row(from), call_.room);
    for (; source.next_row < last_row; ++source.next_row) {
      const std::int64_t slot = handle_.source[static_cast<std::size_t>(source.next_row)] - begin;
      if (slot >= source.tokens_per_turn) break;
      fetch(source, region, slot, source.next_row);
    }
    in.take();
    const std::uint32_t left = source.turns - 1 - turn;
    if (left > 0) in.grant(std::min(core::kRegions, left));
  }

  void read_offer(int from, Source& source) {
    const auto offer = *reinterpret_cast<const core::OfferRecord*>(
        group_.own(group_.layout().offer_record(kStreamDispatch, from, consumer(from).turn())));
    run_.check_record(from, offer.call, offer.code);
    const std::int64_t tokens = std::max<std::int64_t>(handle_.tokens[static_cast<std::size_t>(from)], 1);
    const std::uint32_t needed = all_fields_ & ~own_window_;
    const std::uint64_t fit =
        core::TurnLayout::rows_that_fit(call_.fields, offer.present, group_.layout().staging_region_bytes);
    const bool right = offer.tokens_per_turn >= 1 && offer.tokens_per_turn <= static_cast<std::uint64_t>(tokens) &&
                       (offer.present == 0 || offer.tokens_per_turn <= fit) && (offer.present & ~all_fields_) == 0 &&
                       (needed & ~offer.present) == 0 &&
                       offer.turns == core::ceil_div(static_cast<std::uint64_t>(tokens), offer.tokens_per_turn);
    if (!right)
      run_.corrupt(from, "an offer that does not fit the handle", static_cast<std::uint64_t>(tokens), offer.turns);
    source.turns = offer.turns;
    source.present = needed;
    source.tokens_per_turn = static_cast<std::int64_t>(offer.tokens_per_turn);
    source.layout = core::TurnLayout::make(call_.fields, offer.present, offer.tokens_per_turn);
  }

  void fetch(const Source& source, const std::byte* region, std::int64_t slot, std::int64_t row) {
    for (int field = 0; field < kMaxFields; ++field) {
      if ((source.present >> field & 1u) == 0 || field == kFieldExperts || field == kFieldWeights) continue;
      move_(out_[field].row(row), staged(source, region, field, slot), source.layout.stride[field]);
    }
    if ((source.present >> kFieldExperts & 1u) == 0) return;
    std::memcpy(scratch_ids_, staged(source, region, kFieldExperts, slot), source.layout.stride[kFieldExperts]);
    if ((source.present >> kFieldWeights & 1u) != 0) {
      std::memcpy(scratch_weights_, staged(source, region, kFieldWeights, slot), source.layout.stride[kFieldWeights]);
    }
    write_choices(row, scratch_ids_, scratch_weights_);
  }

  static const std::byte* staged(const Source& source, const std::byte* region, int field, std::int64_t slot) {
    return region + source.layout.offset[field] + static_cast<std::uint64_t>(slot) * source.layout.stride[field];
  }

  /// Local ids, and weights that are 0 where the expert lives elsewhere.
  void write_choices(std::int64_t row, const std::int32_t* experts, const float* weights) {
    std::byte* const ids_out = out_[kFieldExperts].row(row);
    const bool wide = call_.out.experts.dtype == DType::kI64;
    for (int choice = 0; choice < call_.top_k; ++choice) {
      const int local = experts[choice] - block_.first;
      const bool here = experts[choice] >= 0 && local >= 0 && local < block_.count;
      const std::int64_t id = here ? local : -1;
      if (wide) {
        std::memcpy(ids_out + choice * 8, &id, 8);
      } else {
        const auto narrow = static_cast<std::int32_t>(id);
        std::memcpy(ids_out + choice * 4, &narrow, 4);
      }
      if (!in_[kFieldWeights].given()) continue;
      const float weight = here ? weights[choice] : 0.0f;
      std::memcpy(out_[kFieldWeights].row(row) + choice * 4, &weight, 4);
    }
  }

  /// Rows past the last one have no experts; too few rows are an error of this op alone.
  void mark_rest() {
    const std::int64_t rows = handle_.num_rows();
    simd::stream_fence();  // own rows and fetched rows come before whatever the caller's event orders
    if (call_.x.experts.given()) {
      const std::size_t bytes = static_cast<std::size_t>(out_[kFieldExperts].bytes());
      for (std::int64_t row = rows; row < call_.room; ++row) std::memset(out_[kFieldExperts].row(row), 0xFF, bytes);
    }
    if (rows > call_.room) {
      core::throw_capacity(run_.call.op, "rows of out", static_cast<std::uint64_t>(rows),
                           static_cast<std::uint64_t>(call_.room), "The surplus was dropped.");
    }
  }

  protocol::Producer producer(int peer) const {
    return {group_.producer_end(kStreamDispatch, peer), group_.generation(), kCode};
  }
  protocol::Consumer consumer(int peer) const {
    return {group_.consumer_end(kStreamDispatch, peer), group_.generation(), kCode};
  }
  static protocol::Who who(int peer, Phase phase) { return {peer, phase}; }

  OpRun run_;
  Group& group_;
  const backend::DispatchCall& call_;
  const Handle::State& handle_;
  const simd::Kernels& kernels_;
  const int ranks_, me_;
  void (*move_)(void*, const void*, std::size_t) = nullptr;
  FieldView in_[kMaxFields], out_[kMaxFields];
  std::uint32_t all_fields_ = 0, own_window_ = 0, staged_ = 0;
  core::ExpertIds ids_;
  core::ExpertBlock block_;
  std::vector<Receiver> receivers_;
  std::vector<Source> sources_;
  core::TurnLayout staging_;
  std::int64_t tokens_per_turn_ = 1, own_done_ = 0;
  std::uint32_t own_turns_ = 1;
  std::int32_t scratch_ids_[32] = {};
  float scratch_weights_[32] = {};
};

}  // namespace

void CpuBackend::dispatch(const backend::Call& call, const backend::DispatchCall& dispatch) {
  Dispatch(*group_, call, dispatch).execute();
}

}  // namespace anyep::cpu
