// The sender's side of a combine by slots: rows of x to the slots at their tokens' homes, chunk by chunk, each followed by
// its word.
#pragma once

#include "cuda/device/mbarrier.cuh"
#include "cuda/kernels/combine_turn.cuh"

namespace anyep::cuda {

inline constexpr int kSendStages = 2;

/// Chunks by ticket, homes in turn, so that every home gets its first tokens first.
class Chunks {
 public:
  struct Chunk {
    int home;
    std::uint32_t number;
    std::int32_t row, end;  ///< of x
  };

  __device__ Chunks(const CombineParams& p, const TurnRows& rows, const Tickets& tickets)
      : p_(p), rows_(rows), tickets_(tickets), peers_(static_cast<std::uint32_t>(p.team.num_ranks) - 1) {
    std::int32_t most = 0;
    for (int home = 0; home < p.team.num_ranks; ++home) {
      if (home != p.team.rank) most = max(most, rows.end[home] - rows.first[home]);
    }
    end_ = (static_cast<std::uint32_t>(most) + kRowsPerChunk - 1) / kRowsPerChunk * peers_;
  }

  /// All lanes. False: no more.
  __device__ bool next(Chunk& chunk) {
    for (std::uint32_t ticket = tickets_.next(); ticket < end_; ticket = tickets_.next()) {
      chunk.number = ticket / peers_;
      const int step = static_cast<int>(ticket - chunk.number * peers_) + 1, n = p_.team.num_ranks;
      chunk.home = p_.team.rank + step < n ? p_.team.rank + step : p_.team.rank + step - n;
      chunk.row = rows_.first[chunk.home] + static_cast<std::int32_t>(chunk.number * kRowsPerChunk);
      chunk.end = min(chunk.row + static_cast<std::int32_t>(kRowsPerChunk), rows_.end[chunk.home]);
      if (chunk.row < chunk.end) return true;
    }
    return false;
  }

 private:
  const CombineParams& p_;
  const TurnRows& rows_;
  Tickets tickets_;
  const std::uint32_t peers_;
  std::uint32_t end_;
};

/// What bulk and plain senders share.
class Sender {
 public:
  __device__ Sender(const CombineLaunch& a, const Turn& turn, const TurnRows& rows)
      : a_(a), p_(a.params), turn_(turn), rows_(rows) {}

 protected:
  /// All lanes, before the first row to a home in this warp.
  [[nodiscard]] __device__ bool reach_home(int home) {
    if ((credited_ >> home & 1u) != 0) return true;
    bool ok = true;
    if (lane_index() == 0) {
      ok = reach_slots(p_.team, turn_, home);
      bulk::acquired_for_stores();  // pattern L, in the lane that stores
    }
    ok = __all_sync(kAllLanes, ok) != 0;
    __syncwarp();  // pattern F: lane 0 has acquired, others store
    credited_ |= 1u << home;
    return ok;
  }

  __device__ std::byte* slot(int home, std::int32_t row) const {
    return p_.team.window[home] + p_.team.layout.slot_region(p_.team.rank, turn_.number) +
           static_cast<std::int64_t>(row - rows_.first[home]) * a_.plan.slot_bytes;
  }

  __device__ void store_weights(std::byte* slot, std::int32_t row) const {
    if (p_.weights == nullptr) return;
    auto* const to = reinterpret_cast<float*>(slot + a_.plan.row_bytes);
    for (int i = lane_index(); i < p_.num_weights; i += kLanes) {
      to[i] = p_.weights[static_cast<std::int64_t>(row) * p_.num_weights + i];
    }
  }

  /// One lane; a barrier of the warp lies between its lanes' stores and this (pattern A; I' for bulk copies).
  __device__ void publish_chunk(int home, std::uint32_t chunk) const {
    const std::uint64_t at = p_.team.layout.chunk_word(p_.team.rank, turn_.number, chunk);
    publish(*reinterpret_cast<std::uint64_t*>(p_.team.window[home] + at), turn_.mark);
  }

  const CombineLaunch& a_;
  const CombineParams& p_;
  const Turn& turn_;
  const TurnRows& rows_;
  unsigned credited_ = 0;
};

/// One warp: lane 0 copies row after row through two buffers; a chunk's word follows while the next row flies.
class BulkSender : Sender {
 public:
  __device__ BulkSender(const CombineLaunch& a, const Turn& turn, const TurnRows& rows, const Tickets& tickets,
                        std::byte* stages, std::uint64_t* loaded)
      : Sender(a, turn, rows), chunks_(a.params, rows, tickets), stages_(stages), loaded_(loaded) {}

  /// False: a wait has failed. Nothing is in flight afterwards.
  __device__ bool run() {
    if (lane_index() == 0) mbarrier::init(loaded_, kSendStages);
    __syncwarp();  // the barriers are there
    Position now{}, next{};
    bool more = chunks_.next(next.chunk), ok = true;
    if (more) load(next, 0);
    int landing_home = -1;  // the chunk whose last piece is on its way
    std::uint32_t landing_chunk = 0;
    for (std::uint32_t turn = 0; more; ++turn) {
      now = next;
      more = advance(next);
      if (lane_index() == 0) bulk::wait_source_reusable<kSendStages - 2>();  // of the next stage; no flag follows
      if (more) load(next, turn + 1);
      ok = reach_home(now.chunk.home);
      if (!ok) {
        if (more) mbarrier::wait(loaded_[(turn + 1) % kSendStages], (turn + 1) / kSendStages % 2);
        mbarrier::wait(loaded_[turn % kSendStages], turn / kSendStages % 2);
        break;
      }
      std::byte* const to = slot(now.chunk.home, now.chunk.row);
      if (now.piece == 0) store_weights(to, now.chunk.row);
      if (lane_index() == 0) {
        mbarrier::wait(loaded_[turn % kSendStages], turn / kSendStages % 2);
        bulk::store(to + now.piece * a_.plan.piece_bytes, stage(turn), bytes_of(now));  // pattern M
        bulk::commit();
        if (landing_home >= 0) {
          bulk::wait_delivered<1>();  // all but the piece just stored
          publish_chunk(landing_home, landing_chunk);
        }
      }
      const bool last = now.piece + 1 == a_.plan.pieces && now.chunk.row + 1 == now.chunk.end;
      landing_home = last ? now.chunk.home : -1;
      landing_chunk = now.chunk.number;
      __syncwarp();  // pattern A: the lanes' weights come before the chunk's word
    }
    if (lane_index() == 0) {
      bulk::wait_delivered();
      if (ok && landing_home >= 0) publish_chunk(landing_home, landing_chunk);
    }
    return ok;
  }

 private:
  struct Position {
    Chunks::Chunk chunk;
    std::uint32_t piece;
  };

  __device__ bool advance(Position& at) {
    if (++at.piece < a_.plan.pieces) return true;
    at.piece = 0;
    if (++at.chunk.row < at.chunk.end) return true;
    return chunks_.next(at.chunk);
  }
  __device__ std::byte* stage(std::uint32_t turn) const { return stages_ + turn % kSendStages * a_.plan.piece_bytes; }
  __device__ std::uint32_t bytes_of(const Position& at) const {
    return min(a_.plan.piece_bytes, a_.plan.row_bytes - at.piece * a_.plan.piece_bytes);
  }
  __device__ void load(const Position& at, std::uint32_t turn) {
    if (lane_index() != 0) return;
    std::uint64_t& loaded = loaded_[turn % kSendStages];
    mbarrier::expect(loaded, bytes_of(at));
    bulk::load(stage(turn), p_.x + at.chunk.row * p_.x_row_stride + at.piece * a_.plan.piece_bytes, bytes_of(at),
               loaded);
  }

  Chunks chunks_;
  std::byte* const stages_;
  std::uint64_t* const loaded_;
};

/// One warp: ordinary loads and stores, any alignment of x.
class PlainSender : Sender {
 public:
  __device__ PlainSender(const CombineLaunch& a, const Turn& turn, const TurnRows& rows) : Sender(a, turn, rows) {}

  __device__ bool run(const Tickets& tickets) {
    Chunks chunks(p_, rows_, tickets);
    Chunks::Chunk chunk;
    while (chunks.next(chunk)) {
      if (!reach_home(chunk.home)) return false;
      for (std::int32_t row = chunk.row; row < chunk.end; ++row) {
        std::byte* const to = slot(chunk.home, row);
        copy_bytes(to, p_.x + row * p_.x_row_stride, a_.plan.row_bytes);
        store_weights(to, row);
      }
      __syncwarp();  // pattern A
      if (lane_index() == 0) publish_chunk(chunk.home, chunk.number);
    }
    return true;
  }
};

}  // namespace anyep::cuda
