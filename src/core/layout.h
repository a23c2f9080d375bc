// Byte layouts. Every offset of the library is computed here or in buffers.h, once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/hd.h"

namespace anyep::core {

/// Rounds up to a multiple of `unit` (a power of two or not; unit > 0).
ANYEP_HD constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t unit) {
  return (value + unit - 1) / unit * unit;
}
ANYEP_HD constexpr std::uint64_t ceil_div(std::uint64_t value, std::uint64_t unit) {
  return (value + unit - 1) / unit;
}

/// Takes one array after another; the only code that adds offsets. Each array starts on `alignment` bytes.
class Cursor {
 public:
  ANYEP_HD explicit constexpr Cursor(std::uint64_t alignment, std::uint64_t at = 0) : alignment_(alignment), at_(at) {}
  /// Offset of the next array, which takes `bytes`.
  ANYEP_HD constexpr std::uint64_t take(std::uint64_t bytes) {
    const std::uint64_t offset = round_up(at_, alignment_);
    at_ = offset + bytes;
    return offset;
  }
  /// All bytes taken so far, rounded up to the alignment.
  ANYEP_HD constexpr std::uint64_t bytes() const { return round_up(at_, alignment_); }

 private:
  std::uint64_t alignment_;
  std::uint64_t at_;
};

/// Rows start on cache lines, so that two ranks never write one line.
inline constexpr std::uint64_t kRowAlignment = 64;
/// Arrays inside a region start on 128 bytes: two lines, the unit of the adjacent-line prefetcher.
inline constexpr std::uint64_t kArrayAlignment = 128;

// ---- fields of a row -----------------------------------------------------------------------------------------------

/// What travels with a row in a high-throughput dispatch or combine, in this order.
inline constexpr int kFieldX = 0, kFieldScales = 1, kFieldExperts = 2, kFieldWeights = 3, kFirstExtraField = 4;
/// x, scales, experts, weights and four extra payloads.
inline constexpr int kMaxFields = 8;

/// Bytes of each field of one row; 0 = the field does not travel.
struct RowFields {
  std::uint32_t bytes[kMaxFields] = {};

  ANYEP_HD constexpr std::uint64_t total() const {
    std::uint64_t sum = 0;
    for (const std::uint32_t one : bytes) sum += one;
    return sum;
  }
};

/// Chosen fields of `rows` rows, one dense array per field: a turn's share of a staging area, or of a slot region.
struct TurnLayout {
  std::uint64_t offset[kMaxFields] = {};  ///< from the region's start
  std::uint64_t stride[kMaxFields] = {};  ///< bytes from row to row; 0 = the field is not here
  std::uint64_t bytes = 0;

  /// `present`: bit f = field f is here.
  ANYEP_HD static constexpr TurnLayout make(const RowFields& fields, std::uint32_t present, std::uint64_t rows) {
    Cursor at(kArrayAlignment);
    TurnLayout layout;
    for (int field = 0; field < kMaxFields; ++field) {
      if ((present >> field & 1u) == 0 || fields.bytes[field] == 0) continue;
      layout.stride[field] = fields.bytes[field];
      layout.offset[field] = at.take(rows * layout.stride[field]);
    }
    layout.bytes = at.bytes();
    return layout;
  }
  /// Most rows whose chosen fields fit `region_bytes`; 0 = not even one.
  ANYEP_HD static constexpr std::uint64_t rows_that_fit(const RowFields& fields, std::uint32_t present,
                                                        std::uint64_t region_bytes) {
    std::uint64_t row_bytes = 0;
    for (int field = 0; field < kMaxFields; ++field) row_bytes += (present >> field & 1u) ? fields.bytes[field] : 0;
    if (row_bytes == 0) return ~std::uint64_t{0} >> 1;
    // Each array may lose up to one alignment unit.
    const std::uint64_t slack = kMaxFields * kArrayAlignment;
    return region_bytes > slack ? (region_bytes - slack) / row_bytes : 0;
  }
};

// ---- low-latency records -------------------------------------------------------------------------------------------

/// Head of every low-latency region, under the turn's mark. Names the op it belongs to.
struct LowLatencyHead {
  std::uint32_t call;         ///< number of the call
  std::uint32_t code;         ///< kind and digest of the call, as in the mark
  std::uint32_t num_tokens;   ///< of the sending rank
  std::uint32_t num_entries;  ///< records or weights that follow
};

/// One (local expert, position) pair of a record: the row is begin[expert][source] + position.
struct LowLatencyChoice {
  std::int32_t expert;
  std::int32_t position;
};

/// A source's dispatch region at one destination: head, counts per local expert, then one record per token sent there,
/// in token order. A record: {token, number of choices}, choices, scales, payload.
struct DispatchRegionLayout {
  std::uint64_t counts = 0;   ///< int32 per local expert
  std::uint64_t records = 0;  ///< first record
  std::uint64_t stride = 0;   ///< bytes of a record
  std::uint64_t choices = 0;  ///< in a record
  std::uint64_t scales = 0;   ///< in a record
  std::uint64_t payload = 0;  ///< in a record
  std::uint64_t bytes = 0;    ///< of the whole region at `max_tokens` records

  ANYEP_HD static constexpr DispatchRegionLayout make(std::uint64_t local_experts, std::uint64_t max_choices,
                                                      std::uint64_t scale_bytes, std::uint64_t payload_bytes,
                                                      std::uint64_t max_tokens) {
    DispatchRegionLayout layout;
    Cursor record(16);
    record.take(2 * sizeof(std::int32_t));
    layout.choices = record.take(max_choices * sizeof(LowLatencyChoice));
    layout.scales = record.take(scale_bytes);
    layout.payload = record.take(payload_bytes);
    layout.stride = round_up(record.bytes(), kRowAlignment);
    Cursor at(kArrayAlignment);
    at.take(sizeof(LowLatencyHead));
    layout.counts = at.take(local_experts * sizeof(std::int32_t));
    layout.records = at.take(max_tokens * layout.stride);
    layout.bytes = at.bytes();
    return layout;
  }
};

/// One weighted choice that a token's home asks an expert rank to add up.
struct LowLatencyWeight {
  std::int32_t token;     ///< at the home; choices of one token are adjacent, in top-k order
  std::int32_t expert;    ///< local
  std::int32_t position;  ///< among the home's tokens of that expert
  float weight;
};

/// A sender's combine region at one destination. The first half is what a home asks (head, weights), the second what an
/// expert rank answers (head, rows): rows[token] when it sums, rows[token][index among the token's experts there]
/// otherwise.
struct CombineRegionLayout {
  std::uint64_t weights = 0;  ///< LowLatencyWeight entries
  std::uint64_t answer = 0;   ///< LowLatencyHead of the answer
  std::uint64_t rows = 0;     ///< first row
  std::uint64_t row_stride = 0;
  std::uint64_t rows_per_token = 1;
  std::uint64_t bytes = 0;

  ANYEP_HD static constexpr CombineRegionLayout make(std::uint64_t top_k, std::uint64_t rows_per_token,
                                                     std::uint64_t row_bytes, std::uint64_t max_tokens) {
    CombineRegionLayout layout;
    Cursor at(kArrayAlignment);
    at.take(sizeof(LowLatencyHead));
    layout.weights = at.take(max_tokens * top_k * sizeof(LowLatencyWeight));
    layout.answer = at.take(sizeof(LowLatencyHead));
    layout.row_stride = round_up(row_bytes, kRowAlignment);
    layout.rows_per_token = rows_per_token;
    layout.rows = at.take(max_tokens * rows_per_token * layout.row_stride);
    layout.bytes = at.bytes();
    return layout;
  }
};

}  // namespace anyep::core
