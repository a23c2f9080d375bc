// The memory of one rank: what lies where in its window and in its staging area.
//
//   window    peers read and write   header, words, count board, mailboxes | low-latency regions | slots | heap | spare
//   staging   peers read only        two regions that this rank fills for peers that fetch
//
// Fixed by the budget and the number of ranks, never by a call's shape.
#pragma once

#include <anyep/config.h>

#include <cstdint>

#include "core/layout.h"
#include "core/routing.h"

namespace anyep::core {

/// The streams of handoffs that every ordered pair of ranks has.
enum Stream : int { kStreamLists = 0, kStreamDispatch = 1, kStreamCombine = 2, kNumStreams = 3 };

/// Turns in flight of every ring: one is filled while the other is read.
inline constexpr std::uint32_t kRegions = 2;
/// Low latency: enough for two ops in flight without credit words (models/low_latency_regions.py; three overwrite).
inline constexpr std::uint32_t kLowLatencyRegions = 4;
/// One shared word per pair of cache lines.
inline constexpr std::uint64_t kWordBytes = 128;
/// Plain records under a mark.
inline constexpr std::uint64_t kRecordBytes = 128;
/// A mailbox turn carries the bits of 65536 tokens.
inline constexpr std::uint64_t kMailboxBytes = 8192;
inline constexpr std::uint64_t kPageBytes = 4096;
/// Rings larger than this leave the cache between writer and reader (L2 of 1 MiB and more on the servers we target).
inline constexpr std::uint64_t kMaxSlotRegionBytes = 1 << 20;
inline constexpr std::uint64_t kMaxStagingRegionBytes = 2 << 20;

/// "Not in the window": the consumer fetches the field from the producer's staging, or the producer uses slots.
inline constexpr std::uint64_t kNotInWindow = ~std::uint64_t{0};

/// Dispatch: what a consumer tells a producer under the credit of an op's first turn.
struct GrantRecord {
  std::uint32_t call;  ///< names the op
  std::uint32_t code;
  std::int64_t room;                 ///< rows this consumer can take in all; a producer writes none at or beyond it
  std::uint64_t offset[kMaxFields];  ///< of row 0 in the consumer's window, or kNotInWindow
  std::uint64_t stride[kMaxFields];  ///< unused fields 0; 4 fields at most lie in a window
};

/// What a producer tells a consumer under the arrival of an op's first turn.
struct OfferRecord {
  std::uint32_t call;  ///< names the op
  std::uint32_t code;
  std::uint32_t turns;    ///< of this op
  std::uint32_t present;  ///< dispatch: fields in staging; combine: fields in slots
  std::uint64_t tokens_per_turn;
  std::uint64_t offset[kMaxFields];  ///< combine: of row 0 in the producer's window, or kNotInWindow
};

/// What a call asked, in words, so that a rank that differs can say in what: kind, experts, top-k, hidden, dtype, most
/// tokens, scales or extra bytes, flags (wire, hook, arithmetic).
inline constexpr std::uint64_t kDescriptionWords = 8;

struct WindowHeader {
  std::uint64_t magic;
  std::uint32_t version;
  std::uint32_t num_ranks;
  std::uint32_t rank;
  std::uint32_t generation;
  std::uint64_t bytes;
};
inline constexpr std::uint64_t kWindowMagic = 0x31574550594E41ull;  // "ANYEPW1"
inline constexpr std::uint32_t kWindowVersion = 1;

/// Offsets in every rank's window. Arrays over ranks are indexed by the other end of the pair.
struct WindowLayout {
  int num_ranks = 0;
  std::uint64_t header = 0, doorbell = 0;
  std::uint64_t announced = 0;  ///< words: the op that each peer is in; written by the peer
  std::uint64_t described = 0;  ///< kDescriptionWords words: this rank's current call; read by peers that differ
  std::uint64_t arrived[kNumStreams] = {};  ///< words, written by producers
  std::uint64_t credit[kNumStreams] = {};   ///< words, written by consumers
  std::uint64_t grant = 0;                  ///< records of the dispatch stream, written by consumers
  std::uint64_t offer[kNumStreams] = {};    ///< records [ranks][kRegions], written by producers
  std::uint64_t barrier = 0;                ///< words
  std::uint64_t low_latency_arrived = 0;    ///< words: the turn's mark, rows or records are there
  std::uint64_t low_latency_asked = 0;      ///< words: the weights of a combine turn are there
  std::uint64_t counts = 0;                 ///< [2][ranks][count_width] count words
  std::uint64_t count_width = 0;
  std::uint64_t mailboxes = 0;    ///< [ranks][kRegions][kMailboxBytes]
  std::uint64_t low_latency = 0;  ///< [kLowLatencyRegions][ranks][low_latency_region_bytes]
  std::uint64_t low_latency_region_bytes = 0;
  std::uint64_t low_latency_bytes = 0;  ///< from `low_latency` on: all of the budget, regions first
  std::uint64_t slots = 0;              ///< [ranks][kRegions][slot_region_bytes]
  std::uint64_t slot_region_bytes = 0;
  std::uint64_t heap = 0, heap_bytes = 0;
  std::uint64_t rows_bytes =
      0;  ///< from `slots` on: all of the budget; behind the heap, address space that nobody uses
  std::uint64_t bytes = 0;
  std::uint64_t staging_region_bytes = 0;

  static constexpr WindowLayout make(const Budget& budget, int num_ranks);

  std::uint64_t word(std::uint64_t array, int rank) const {
    return array + static_cast<std::uint64_t>(rank) * kWordBytes;
  }
  std::uint64_t grant_record(int consumer) const {
    return grant + static_cast<std::uint64_t>(consumer) * kRecordStride;
  }
  /// One per region of a ring: the next op's offer may be written before this one's is read.
  std::uint64_t offer_record(Stream stream, int producer, std::uint32_t turn) const {
    return offer[stream] + (static_cast<std::uint64_t>(producer) * kRegions + turn % kRegions) * kRecordStride;
  }
  std::uint64_t mailbox(int source, std::uint32_t turn) const {
    return mailboxes + (static_cast<std::uint64_t>(source) * kRegions + turn % kRegions) * kMailboxBytes;
  }
  std::uint64_t slot_region(int source, std::uint32_t turn) const {
    return slots + (static_cast<std::uint64_t>(source) * kRegions + turn % kRegions) * slot_region_bytes;
  }
  std::uint64_t low_latency_region(int source, std::uint32_t turn) const {
    return low_latency +
           (static_cast<std::uint64_t>(turn % kLowLatencyRegions) * static_cast<std::uint64_t>(num_ranks) +
            static_cast<std::uint64_t>(source)) *
               low_latency_region_bytes;
  }
  constexpr std::uint64_t staging_bytes() const { return kRegions * staging_region_bytes; }
  std::uint64_t staging_region(std::uint32_t turn) const { return turn % kRegions * staging_region_bytes; }

  static constexpr std::uint64_t kRecordStride = round_up(sizeof(GrantRecord), kRecordBytes);
};
static_assert(sizeof(OfferRecord) <= WindowLayout::kRecordStride);

/// The share of rows_bytes that rings take; the rest is heap.
inline constexpr std::uint64_t kRingShare = 16;

constexpr WindowLayout WindowLayout::make(const Budget& budget, int num_ranks) {
  const auto ranks = static_cast<std::uint64_t>(num_ranks);
  const auto rows_bytes = static_cast<std::uint64_t>(budget.rows_bytes);
  const auto experts = static_cast<std::uint64_t>(budget.max_experts);
  const auto down = [](std::uint64_t value) { return value / kPageBytes * kPageBytes; };
  const auto smaller = [](std::uint64_t a, std::uint64_t b) { return a < b ? a : b; };

  WindowLayout at;
  at.num_ranks = num_ranks;
  Cursor words(kWordBytes);
  at.header = words.take(sizeof(WindowHeader));
  at.doorbell = words.take(2 * kWordBytes);
  at.announced = words.take(ranks * kWordBytes);
  at.described = words.take(kDescriptionWords * sizeof(std::uint64_t));
  for (int stream = 0; stream < kNumStreams; ++stream) {
    at.arrived[stream] = words.take(ranks * kWordBytes);
    at.credit[stream] = words.take(ranks * kWordBytes);
    at.offer[stream] = words.take(ranks * kRegions * kRecordStride);
  }
  at.grant = words.take(ranks * kRecordStride);
  at.barrier = words.take(ranks * kWordBytes);
  at.low_latency_arrived = words.take(ranks * kWordBytes);
  at.low_latency_asked = words.take(ranks * kWordBytes);
  at.count_width = ranks + ceil_div(experts, ranks) + 1;  // rows to each rank, pairs per expert here, tokens
  at.counts = words.take(2 * ranks * at.count_width * sizeof(std::uint64_t));
  at.mailboxes = words.take(ranks * kRegions * kMailboxBytes);

  at.slot_region_bytes = down(smaller(rows_bytes / (kRingShare * ranks * kRegions), kMaxSlotRegionBytes));
  at.staging_region_bytes = down(smaller(rows_bytes / (kRingShare * kRegions), kMaxStagingRegionBytes));
  const std::uint64_t rings = ranks * kRegions * at.slot_region_bytes + at.staging_bytes();
  at.heap_bytes = down(rows_bytes > rings ? rows_bytes - rings : 0);
  at.low_latency_region_bytes =
      down(static_cast<std::uint64_t>(budget.low_latency_bytes) / (kLowLatencyRegions * ranks));

  Cursor pages(kPageBytes, words.bytes());
  // A caller may look at, and zero, as many bytes of payload as it has paid for; staging lies elsewhere, so that as much
  // follows the heap.
  at.low_latency_bytes = static_cast<std::uint64_t>(budget.low_latency_bytes);
  at.rows_bytes = rows_bytes;
  const std::uint64_t slot_bytes = ranks * kRegions * at.slot_region_bytes;
  at.low_latency = pages.take(at.low_latency_bytes);
  at.slots = pages.take(slot_bytes);
  at.heap = pages.take(rows_bytes - slot_bytes);
  at.bytes = pages.bytes();
  return at;
}

}  // namespace anyep::core
