// How a dispatch moves rows of x: by bulk copies through shared memory, or by ordinary loads and stores of any alignment.
#pragma once

#include "cuda/device/bulk.cuh"
#include "cuda/device/mbarrier.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/device/words.cuh"
#include "cuda/kernels/intranode_dispatch.h"

namespace anyep::cuda {

/// How a launch cuts its work.
struct RowPlan {
  // A unit of work: `rows_per_unit` whole rows of adjacent tokens, or one of the `pieces` of a row.
  std::uint32_t rows_per_unit = 1, pieces = 1;
  std::uint32_t piece_bytes = 0;  ///< of all pieces but the last
  std::uint32_t stage_bytes = 0;  ///< of one buffer
  int row_warps = 1, side_warps = 0;
};

/// What the kernel gets.
struct DispatchLaunch {
  DispatchParams params;
  RowPlan plan;
};

/// Piles of tickets.
inline constexpr int kPileRows = 0, kPileSide = 1, kPileGrant = 2;
/// Buffers of a warp: one is loaded while the other is stored (measured: 2, 3 and 5 alike).
inline constexpr int kRowStages = 2;

/// A receiver's grant, in this rank's window under the credit; the own one in Params.
__device__ inline const Grant& grant_of(const DispatchParams& p, int receiver) {
  if (receiver == p.team.rank) return p.grant;
  return *reinterpret_cast<const Grant*>(p.team.window[p.team.rank] +
                                         p.team.layout.word(p.team.layout.grant, receiver));
}

/// One thread waits until a receiver's grant is there and its rows may be written (pattern F).
[[nodiscard]] __device__ inline bool reach_credit(const DispatchParams& p, const Turn& turn, int receiver) {
  if (receiver == p.team.rank) return true;
  return reach(p.team, turn, receiver, kWaitBeforeSend,
               word_of(p.team, p.team.rank, p.team.layout.dispatch_credit, receiver), turn.mark);
}

/// A unit of work, from its ticket.
struct RowUnit {
  std::uint32_t token, rows;    ///< adjacent tokens
  std::uint32_t offset, bytes;  ///< of each row

  __device__ static RowUnit make(const DispatchLaunch& a, std::uint32_t ticket) {
    const std::uint32_t row_bytes = a.params.row_bytes, tokens = static_cast<std::uint32_t>(a.params.places.num_tokens);
    if (a.plan.pieces == 1) {
      const std::uint32_t token = ticket * a.plan.rows_per_unit;
      return {token, min(a.plan.rows_per_unit, tokens - token), 0, row_bytes};
    }
    const std::uint32_t token = ticket / a.plan.pieces;
    const std::uint32_t offset = (ticket - token * a.plan.pieces) * a.plan.piece_bytes;
    return {token, 1, offset, min(a.plan.piece_bytes, row_bytes - offset)};
  }
  /// Tickets of all units.
  __device__ static std::uint32_t count(const DispatchLaunch& a) {
    const auto tokens = static_cast<std::uint32_t>(a.params.places.num_tokens);
    if (a.params.row_bytes == 0) return 0;
    return (tokens + a.plan.rows_per_unit - 1) / a.plan.rows_per_unit * a.plan.pieces;
  }
};

/// One warp that sends rows by bulk copies. A lane stands for a (row of the unit, receiver).
class BulkRows {
 public:
  __device__ BulkRows(const DispatchLaunch& a, const Turn& turn, std::byte* stages, std::uint64_t* loaded)
      : a_(a),
        p_(a.params),
        turn_(turn),
        stages_(stages),
        loaded_(loaded),
        units_(RowUnit::count(a)),
        tickets_(a.params.team, kPileRows) {
    const int n = p_.team.num_ranks;
    row_ = static_cast<std::uint32_t>(lane_index() / n);
    // Senders, and the warps of one, start with different receivers.
    receiver_ = (lane_index() + p_.team.rank + 1 + warp_index()) % n;
    own_ = receiver_ == p_.team.rank;
  }

  /// What needs neither turn nor places: the first row is on its way.
  __device__ void start() {
    tickets_.start(2);
    if (lane_index() == 0) mbarrier::init(loaded_, kRowStages);
    __syncwarp();  // the barriers are there
    now_ = tickets_.next();
    if (now_ < units_) load(now_, 0);
  }

  /// False: a wait has failed. Nothing is in flight afterwards.
  __device__ bool run() {
    if (turn_.left) {
      if (now_ < units_) mbarrier::wait(loaded_[0], 0);
      return false;
    }
    std::uint32_t now = now_, next = now + 1;
    std::int32_t place = place_in(now);
    bool granted = p_.team.num_ranks == 1, ok = true;
    if (granted) take_grant();
    for (std::uint32_t turn = 0; now < units_; ++turn) {
      const std::int32_t next_place = place_in(next);
      bulk::wait_source_reusable();  // of the other stage; no flag follows
      __syncwarp();                  // every lane has waited before lane 0 loads
      if (next < units_) load(next, turn + 1);
      mbarrier::wait(loaded_[turn % kRowStages], turn / kRowStages % 2);
      if (!granted) {
        if (own_) take_grant();
        store(now, turn, own_ ? place : -1);  // hides a part of the wait
        ok = __all_sync(kAllLanes, row_ != 0 || reach_credit(p_, turn_, receiver_));
        __syncwarp();  // pattern F: one lane has acquired, others read the grant and store
        if (!ok) {
          bulk::commit();
          if (next < units_) mbarrier::wait(loaded_[(turn + 1) % kRowStages], (turn + 1) / kRowStages % 2);
          break;
        }
        bulk::acquired_for_stores();  // pattern L, in the lane that stores
        take_grant();
        granted = true;
        place = own_ ? -1 : place;
      }
      store(now, turn, place);
      bulk::commit();
      now = next;
      place = next_place;
      next = tickets_.next();
    }
    bulk::wait_delivered();  // pattern I': each lane that stored, before the block's barrier
    return ok;
  }

 private:
  __device__ std::byte* stage(std::uint32_t turn) const { return stages_ + turn % kRowStages * a_.plan.stage_bytes; }

  __device__ void load(std::uint32_t ticket, std::uint32_t turn) {
    const RowUnit unit = RowUnit::make(a_, ticket);
    std::uint64_t& loaded = loaded_[turn % kRowStages];
    const std::byte* const from = p_.x + static_cast<std::int64_t>(unit.token) * p_.x_row_stride + unit.offset;
    if (lane_index() == 0) mbarrier::expect(loaded, unit.rows * unit.bytes);
    if (unit.rows == 1 || p_.x_row_stride == p_.row_bytes) {
      if (lane_index() == 0) bulk::load(stage(turn), from, unit.rows * unit.bytes, loaded);
    } else if (static_cast<std::uint32_t>(lane_index()) < unit.rows) {
      bulk::load(stage(turn) + static_cast<std::uint32_t>(lane_index()) * unit.bytes,
                 from + lane_index() * p_.x_row_stride, unit.bytes, loaded);
    }
  }

  /// Where this lane's row of the unit goes; -1 = nowhere.
  __device__ std::int32_t place_in(std::uint32_t ticket) const {
    if (ticket >= units_) return -1;
    const RowUnit unit = RowUnit::make(a_, ticket);
    return row_ < unit.rows ? p_.places.row(unit.token + row_, receiver_, p_.team.num_ranks) : -1;
  }

  __device__ void take_grant() {
    const Grant& grant = grant_of(p_, receiver_);
    to_ = p_.team.window[receiver_] + grant.x;
    room_ = grant.x == Grant::kNone ? 0 : grant.room;
    aligned_ = address_bits(to_) % 16 == 0;
  }

  __device__ void store(std::uint32_t ticket, std::uint32_t turn, std::int32_t place) {
    const RowUnit unit = RowUnit::make(a_, ticket);
    const bool goes = place >= 0 && static_cast<std::uint64_t>(place) < room_;  // never beyond the granted room
    std::byte* const to = to_ + static_cast<std::int64_t>(place) * p_.row_bytes + unit.offset;
    const std::byte* const from = stage(turn) + row_ * unit.bytes;
    if (goes && aligned_) bulk::store(to, from, unit.bytes);
    unsigned rest = __ballot_sync(kAllLanes, goes && !aligned_);
    if (rest == 0) return;
    for (; rest != 0; rest &= rest - 1) {
      const int lane = __ffs(static_cast<int>(rest)) - 1;
      copy_bytes(from_lane(to, lane), from_lane(from, lane), unit.bytes);
    }
    bulk::used_before_copy();  // pattern J; the warp's barrier stands in front of the load
  }

  const DispatchLaunch& a_;
  const DispatchParams& p_;
  const Turn& turn_;
  std::byte* const stages_;
  std::uint64_t* const loaded_;
  const std::uint32_t units_;
  Tickets tickets_;
  std::uint32_t now_ = 0, row_;
  int receiver_;
  bool own_, aligned_ = true;
  std::byte* to_ = nullptr;
  std::uint64_t room_ = 0;
};

/// One warp that sends rows by ordinary accesses: reads each once, writes it to every receiver. Lane d holds receiver d's
/// place. Any alignment.
class PlainRows {
 public:
  __device__ PlainRows(const DispatchLaunch& a, const Turn& turn) : a_(a), p_(a.params), turn_(turn) {}

  __device__ bool run() {
    const std::uint32_t units = RowUnit::count(a_);
    Tickets tickets(p_.team, kPileRows);
    tickets.start(2);
    const bool receives = lane_index() < p_.team.num_ranks;
    const bool ok = !turn_.left && (!receives || reach_credit(p_, turn_, lane_index()));
    if (!__all_sync(kAllLanes, ok)) return false;
    __syncwarp();  // pattern F: one lane has acquired, all store
    std::byte* base = nullptr;
    std::uint64_t room = 0;
    if (receives) {
      const Grant& grant = grant_of(p_, lane_index());
      base = p_.team.window[lane_index()] + grant.x;
      room = grant.x == Grant::kNone ? 0 : grant.room;
    }
    const std::uint64_t row_strides = static_cast<std::uint64_t>(p_.x_row_stride) | p_.row_bytes;
    const auto bits = static_cast<std::uint32_t>((address_bits(p_.x) | row_strides | address_bits(base)) % 16);
    const std::uint32_t width = common_alignment(__reduce_or_sync(kAllLanes, bits));
    std::uint32_t now = tickets.next(), next = now + 1;
    std::int32_t place = place_of(now, units);
    while (now < units) {
      const std::int32_t next_place = place_of(next, units);
      const bool goes = place >= 0 && static_cast<std::uint64_t>(place) < room;
      std::byte* const to = goes ? base + static_cast<std::int64_t>(place) * p_.row_bytes : nullptr;
      with_word(width, [&](auto word) { copy<decltype(word)>(now, to); });
      now = next;
      place = next_place;
      next = tickets.next();
    }
    return true;
  }

 private:
  __device__ std::int32_t place_of(std::uint32_t token, std::uint32_t tokens) const {
    return token < tokens && lane_index() < p_.team.num_ranks ? p_.places.row(token, lane_index(), p_.team.num_ranks)
                                                              : -1;
  }

  template <class Word>
  __device__ void copy(std::uint32_t token, std::byte* to) const {
    constexpr std::uint32_t kUnroll = 4, kStep = kUnroll * kLanes;
    const auto* const from = reinterpret_cast<const Word*>(p_.x + static_cast<std::int64_t>(token) * p_.x_row_stride);
    const auto count = static_cast<std::uint32_t>(p_.row_bytes / sizeof(Word));
    const unsigned receivers = __ballot_sync(kAllLanes, to != nullptr);
    for (std::uint32_t step = 0; step < count; step += kStep) {
      const std::uint32_t first = step + static_cast<std::uint32_t>(lane_index());
      Word words[kUnroll];
#pragma unroll
      for (std::uint32_t i = 0; i < kUnroll; ++i) {
        if (first + i * kLanes < count) words[i] = from[first + i * kLanes];
      }
      for (unsigned rest = receivers; rest != 0; rest &= rest - 1) {
        auto* const at = reinterpret_cast<Word*>(from_lane(to, __ffs(static_cast<int>(rest)) - 1));
#pragma unroll
        for (std::uint32_t i = 0; i < kUnroll; ++i) {
          if (first + i * kLanes < count) at[first + i * kLanes] = words[i];
        }
      }
    }
  }

  const DispatchLaunch& a_;
  const DispatchParams& p_;
  const Turn& turn_;
};

}  // namespace anyep::cuda
