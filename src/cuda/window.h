// The window of a CUDA rank: GPU memory that its peers read and write. What lies where.
//
//   words | count boards | grants, offers | low-latency words and regions | slots | heap | handles
//
// Fixed by the budget and the number of ranks, never by a call's shape. All of it but the heap is zero when it is
// exported. Host code keeps a window of its own (src/host) for what hosts tell each other: announcements, descriptions.
#pragma once

#include <anyep/config.h>

#include <cstdint>

#include "core/layout.h"
#include "core/routing.h"

namespace anyep::cuda {

/// Ranks of one NVLink domain that kernels serve: one bit each in a token's set of ranks, one entry each in Params.
inline constexpr int kMaxRanks = 8;
/// Words of different pairs of ranks share no cache line pair.
inline constexpr std::uint64_t kWordBytes = 128;
inline constexpr std::uint64_t kPageBytes = 4096;
/// Slot regions per ordered pair of ranks: one is filled while the other is read.
inline constexpr std::uint32_t kSlotRegions = 2;
/// Rows per word of a combine by slots: fewer rows cost a release each, more delay the reader (measured: 2 to 8 alike, 4 best).
inline constexpr std::uint32_t kRowsPerChunk = 4;
/// The smallest row of a slot; bounds the number of chunk words.
inline constexpr std::uint64_t kLeastSlotBytes = 256;
/// Low latency: enough for two ops in flight without credit words (models/low_latency_regions.py; three overwrite).
inline constexpr std::uint32_t kLowLatencyRegions = 4;

/// What a receiver tells a sender under the credit of a dispatch: where in the receiver's window row 0 of each field lies.
struct Grant {
  static constexpr int kMaxExtra = 4;
  static constexpr std::uint64_t kNone = ~std::uint64_t{0};
  std::uint64_t x, scales, experts, weights, source;  ///< kNone = the field is not wanted
  std::uint64_t extra[kMaxExtra];
  std::uint64_t room;      ///< rows; a sender writes none at or beyond it
  std::uint64_t wide_ids;  ///< 1 = experts of 8 bytes, 0 = of 4
};

/// What the holder of expert outputs tells a token's home at the start of a combine.
struct Offer {
  std::uint64_t x;          ///< of its row 0 in its window: the home gathers; Grant::kNone = rows come in slots
  std::uint64_t weights;    ///< likewise
  std::uint64_t first_row;  ///< its first row from this home (in this turn)
};

/// Offsets in every rank's window. Arrays over ranks are indexed by the other end of the pair.
struct WindowLayout {
  int num_ranks = 0;
  // Words, kWordBytes apart: word(array, rank).
  std::uint64_t dispatch_credit = 0;   ///< written by receivers: this turn's grant is there and its rows may be written
  std::uint64_t dispatch_arrived = 0;  ///< written by senders: this turn's rows have landed
  std::uint64_t combine_offered = 0;   ///< written by expert ranks: this turn's offer is there
  std::uint64_t combine_read = 0;      ///< written by homes: this turn's rows, in slots or gathered, have been read
  std::uint64_t barrier = 0;
  std::uint64_t low_latency_mark = 0;  ///< written by every peer in every turn, whatever the form of the rows
  // Records, kWordBytes apart: word(array, rank).
  std::uint64_t grant = 0;   ///< Grant
  std::uint64_t offer = 0;   ///< [kSlotRegions][ranks] Offer
  std::uint64_t counts = 0;  ///< [2][ranks][count_width] count words
  std::uint64_t count_width = 0;
  std::uint64_t chunks =
      0;  ///< [kSlotRegions][ranks][chunks_per_region] words: the chunk's rows have landed in their slots
  std::uint64_t chunks_per_region = 0;
  std::uint64_t low_latency = 0, low_latency_bytes = 0;  ///< cut by core/gpu_low_latency.h
  std::uint64_t slots = 0;                               ///< [kSlotRegions][ranks][slot_region_bytes]
  std::uint64_t slot_region_bytes = 0;
  std::uint64_t heap = 0, heap_bytes = 0;        ///< heap_bytes: backed from the start; the heap may grow behind it
  std::uint64_t handles = 0, handles_bytes = 0;  ///< arrays of handles: a caller who clears his payload keeps them
  std::uint64_t bytes = 0;

  static constexpr WindowLayout make(const Budget& budget, int num_ranks);

  ANYEP_HD constexpr std::uint64_t word(std::uint64_t array, int rank) const {
    return array + static_cast<std::uint64_t>(rank) * kWordBytes;
  }
  ANYEP_HD constexpr std::uint64_t offer_record(int rank, std::uint32_t turn) const {
    return offer + (static_cast<std::uint64_t>(turn % kSlotRegions) * static_cast<std::uint64_t>(num_ranks) +
                    static_cast<std::uint64_t>(rank)) *
                       kWordBytes;
  }
  ANYEP_HD constexpr std::uint64_t chunk_word(int rank, std::uint32_t turn, std::uint64_t chunk) const {
    return chunks + ((static_cast<std::uint64_t>(turn % kSlotRegions) * static_cast<std::uint64_t>(num_ranks) +
                      static_cast<std::uint64_t>(rank)) *
                         chunks_per_region +
                     chunk) *
                        sizeof(std::uint64_t);
  }
  ANYEP_HD constexpr std::uint64_t slot_region(int rank, std::uint32_t turn) const {
    return slots + (static_cast<std::uint64_t>(turn % kSlotRegions) * static_cast<std::uint64_t>(num_ranks) +
                    static_cast<std::uint64_t>(rank)) *
                       slot_region_bytes;
  }
};
static_assert(sizeof(Grant) <= kWordBytes && sizeof(Offer) <= kWordBytes);

/// Slot regions larger than this hold 4096 rows of 16 KiB, a whole operation of the sizes that are trained with today.
inline constexpr std::uint64_t kMaxSlotRegionBytes = std::uint64_t{64} << 20;
/// What words and packets, which carry their flags, need beyond the records that low_latency_bytes_for() counts: a share, and
/// the least in which small batches find room. With less, small batches travel as records.
inline constexpr std::uint64_t kFlaggedShare = 4, kFlaggedBytes = std::uint64_t{4} << 20;
/// Backed for handles from the start: 60 handles of 4096 tokens on 8 ranks. More are grown for.
inline constexpr std::uint64_t kHandleBytes = std::uint64_t{16} << 20;
/// The share of rows_bytes that slots take, at most; the rest is heap.
inline constexpr std::uint64_t kSlotShare = 2;

constexpr WindowLayout WindowLayout::make(const Budget& budget, int num_ranks) {
  const auto ranks = static_cast<std::uint64_t>(num_ranks);
  const auto rows_bytes = static_cast<std::uint64_t>(budget.rows_bytes);
  const auto experts = static_cast<std::uint64_t>(budget.max_experts);
  const auto down = [](std::uint64_t value) { return value / kPageBytes * kPageBytes; };
  WindowLayout at;
  at.num_ranks = num_ranks;
  core::Cursor words(kWordBytes);
  at.dispatch_credit = words.take(ranks * kWordBytes);
  at.dispatch_arrived = words.take(ranks * kWordBytes);
  at.combine_offered = words.take(ranks * kWordBytes);
  at.combine_read = words.take(ranks * kWordBytes);
  at.barrier = words.take(ranks * kWordBytes);
  at.low_latency_mark = words.take(ranks * kWordBytes);
  at.grant = words.take(ranks * kWordBytes);
  at.offer = words.take(kSlotRegions * ranks * kWordBytes);
  at.count_width = ranks + core::ceil_div(experts, ranks) + 1;  // rows to each rank, tokens, pairs per expert here
  at.counts = words.take(2 * ranks * at.count_width * sizeof(std::uint64_t));
  const std::uint64_t share = rows_bytes / (kSlotShare * ranks * kSlotRegions);
  at.slot_region_bytes = down(share < kMaxSlotRegionBytes ? share : kMaxSlotRegionBytes);
  at.chunks_per_region = core::ceil_div(at.slot_region_bytes / kLeastSlotBytes, kRowsPerChunk);
  at.chunks = words.take(kSlotRegions * ranks * at.chunks_per_region * sizeof(std::uint64_t));
  core::Cursor pages(kPageBytes, words.bytes());
  const auto low_latency_bytes = static_cast<std::uint64_t>(budget.low_latency_bytes);
  at.low_latency_bytes =
      low_latency_bytes == 0 ? 0 : low_latency_bytes + low_latency_bytes / kFlaggedShare + ranks * kFlaggedBytes;
  at.low_latency = pages.take(at.low_latency_bytes);
  const std::uint64_t slot_bytes = kSlotRegions * ranks * at.slot_region_bytes;
  at.slots = pages.take(slot_bytes);
  at.heap_bytes = core::round_up(rows_bytes - slot_bytes, kPageBytes);
  at.heap = pages.take(at.heap_bytes);
  at.handles_bytes = kHandleBytes;
  at.handles = pages.take(at.handles_bytes);
  at.bytes = pages.bytes();
  return at;
}

}  // namespace anyep::cuda
