// On GPUs: how a rank's low-latency bytes are cut: four regions by turn, in each one region per source, in each region four areas.
//
//   flags     marks, one per chunk of tokens: the chunk's records have landed
//   words     {32 bits of data, 32 of epoch}: head, counts, what one token's choices ask, rows of very small batches
//   packets   {96 bits of data, 32 of epoch}: rows of small batches
//   records   plain bytes under a flag
//
// The areas are disjoint and fixed by the bytes and the number of ranks, so that a word or packet holds its epoch at the
// same place whatever a call's shape, and plain bytes never lie where an epoch is looked for.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/hd.h"
#include "core/layout.h"

namespace anyep::cuda::low_latency {

/// Elements that one warp handles at a time: a row's unit in every form. Combine does more with each, and has smaller ones.
inline constexpr int kStripElements = 512, kSumElements = 256;
inline constexpr int kMaxHidden = 16384;
inline constexpr int kMaxTopK = 32;
inline constexpr int kMaxExperts = 1024;
inline constexpr int kMaxTokens = 4096;  ///< per rank
/// Records of up to so many equal chunks of a source's tokens are announced by one flag each.
inline constexpr int kMaxChunks = 128;
inline constexpr std::uint64_t kFlagBytes = 32;
/// Rows travel as words up to here, as packets up to there: beyond, waiting once for stores to complete is cheaper.
inline constexpr int kMostWordTokens = 16, kMostPacketTokens = 64;
inline constexpr std::uint64_t kRegions = 4;
/// Shares of a region.
inline constexpr std::uint64_t kWordShare = 16, kPacketShare = 6;
inline constexpr std::uint64_t kAlignment = 128;

enum class Form : int { kWords, kPackets, kRecords };

/// First word behind the head, 16-byte aligned.
inline constexpr std::uint32_t kCountsAt = 2;

/// What crosses the wire per row and choice; both ends compute it from the call alone.
struct Cut {
  int strips = 0;             ///< per row
  int words_per_strip = 0;    ///< as words
  int packets_per_strip = 0;  ///< as packets
  /// First word of the table [tokens][top_k][words_per_choice]; before it head and counts.
  std::uint64_t table_words = 0;
  int words_per_choice = 0;  ///< dispatch 1, combine 2
  int top_k = 0;
  std::uint64_t record_bytes = 0;  ///< stride of rows as records
  int rows_per_token = 1;
  int max_tokens = 0;
  /// First word of the rows, behind the largest table: what this rank asks and what it answers share a region, each with
  /// its own batch.
  std::uint32_t row_words = 0;

  /// Counts lie two to 16 bytes, the last one padded.
  ANYEP_HD constexpr std::uint32_t count_word(std::uint32_t local_expert) const { return kCountsAt + local_expert; }
  ANYEP_HD constexpr std::uint32_t count_pairs() const {
    return (static_cast<std::uint32_t>(table_words) - kCountsAt) / 2;
  }
  // In 32 bits: an address is on the way of every wait.
  ANYEP_HD constexpr std::uint32_t table_word(std::uint32_t token, int choice) const {
    return static_cast<std::uint32_t>(table_words) +
           (token * static_cast<unsigned>(top_k) + static_cast<unsigned>(choice)) *
               static_cast<unsigned>(words_per_choice);
  }
  /// Words before the rows: head, counts and table, for `tokens`.
  ANYEP_HD constexpr std::uint32_t control_words(std::uint32_t tokens) const {
    return static_cast<std::uint32_t>(core::round_up(table_word(tokens, 0), 16));
  }
  ANYEP_HD constexpr std::uint32_t row_word(std::uint32_t token, int strip) const {
    return row_words + (token * static_cast<unsigned>(strips) + static_cast<unsigned>(strip)) *
                           static_cast<unsigned>(words_per_strip);
  }
  ANYEP_HD constexpr std::uint32_t packet(std::uint32_t token, int strip) const {
    return (token * static_cast<unsigned>(strips) + static_cast<unsigned>(strip)) *
           static_cast<unsigned>(packets_per_strip);
  }
  ANYEP_HD constexpr std::uint64_t record(std::uint64_t token, int row) const {
    return (token * static_cast<unsigned>(rows_per_token) + static_cast<unsigned>(row)) * record_bytes;
  }
};

ANYEP_HD constexpr int num_strips(std::int64_t hidden, int elements = kStripElements) {
  return static_cast<int>((hidden + elements - 1) / elements);
}
/// Have chunks, and blocks, several of so many tokens? Otherwise a chunk is a token.
ANYEP_HD constexpr bool are_several_a_chunk(int tokens) {
  return tokens > kMaxChunks;
}
/// Tokens per chunk, when `tokens` are announced by flags.
ANYEP_HD constexpr int chunk_tokens(int tokens) {
  return are_several_a_chunk(tokens) ? (tokens + kMaxChunks - 1) / kMaxChunks : 1;
}
ANYEP_HD constexpr int num_chunks(int tokens) {
  const int each = chunk_tokens(tokens);
  return (tokens + each - 1) / each;
}

/// Dispatch: FP8 strips are 512 bytes and 4 words of scales, BF16 strips 1024 bytes.
ANYEP_HD constexpr Cut dispatch_cut(std::int64_t hidden, bool fp8, int most_local_experts, int top_k, int max_tokens) {
  Cut cut;
  cut.strips = num_strips(hidden);
  cut.words_per_strip = fp8 ? 132 : 256;
  cut.packets_per_strip = fp8 ? 44 : 86;
  cut.table_words = kCountsAt + core::round_up(static_cast<unsigned>(most_local_experts), 2u);
  cut.words_per_choice = 1;
  cut.top_k = top_k;
  cut.record_bytes = static_cast<unsigned>(cut.strips) * (fp8 ? 512u + 16u : 1024u);
  cut.max_tokens = max_tokens;
  cut.row_words = cut.control_words(static_cast<unsigned>(max_tokens));
  return cut;
}
/// Combine. One row per token where the expert rank adds, else one per choice; LogFMT rows have a word per strip in
/// front that says whether the strip is coded.
ANYEP_HD constexpr Cut combine_cut(std::int64_t hidden, bool logfmt, bool per_choice, int most_local_experts, int top_k,
                                   int max_tokens) {
  Cut cut;
  cut.strips = num_strips(hidden, logfmt ? kStripElements : kSumElements);
  cut.words_per_strip = 128;
  cut.packets_per_strip = 43;
  cut.table_words = kCountsAt;
  cut.words_per_choice = 2;
  cut.top_k = per_choice ? 0 : top_k;  // nobody asks
  cut.rows_per_token = per_choice ? (top_k < most_local_experts ? top_k : most_local_experts) : 1;
  cut.record_bytes = static_cast<unsigned>(cut.strips) * (logfmt ? 1024u : 512u) + (logfmt ? kAlignment : 0);
  cut.max_tokens = max_tokens;
  cut.row_words = cut.control_words(static_cast<unsigned>(max_tokens));
  return cut;
}

struct Layout {
  int num_ranks = 0;
  std::uint64_t region_bytes = 0;
  std::uint64_t words = 0, num_words = 0;      ///< offset in a region; number of 8 bytes
  std::uint64_t packets = 0, num_packets = 0;  ///< likewise, 16 bytes
  std::uint64_t records = 0, record_bytes = 0;

  static constexpr Layout make(std::uint64_t bytes, int num_ranks) {
    constexpr auto down = [](std::uint64_t value) { return value / kAlignment * kAlignment; };
    constexpr std::uint64_t flag_bytes = kMaxChunks * kFlagBytes;
    Layout at;
    at.num_ranks = num_ranks;
    at.region_bytes = down(bytes / (kRegions * static_cast<unsigned>(num_ranks)));
    if (at.region_bytes < 2 * flag_bytes) return at;
    const std::uint64_t rest = at.region_bytes - flag_bytes;
    const std::uint64_t word_bytes = down(rest / kWordShare), packet_bytes = down(rest / kPacketShare);
    at.words = flag_bytes;
    at.num_words = word_bytes / 8;
    at.packets = at.words + word_bytes;
    at.num_packets = packet_bytes / 16;
    at.records = at.packets + packet_bytes;
    at.record_bytes = at.region_bytes - at.records;
    return at;
  }
  /// From the start of the low-latency bytes.
  ANYEP_HD constexpr std::uint64_t region(int source, std::uint32_t turn) const {
    return (static_cast<std::uint64_t>(turn % kRegions) * static_cast<unsigned>(num_ranks) +
            static_cast<unsigned>(source)) *
           region_bytes;
  }

  /// Does a call of this cut fit, in every form it may need?
  constexpr bool holds(const Cut& cut) const {
    const auto tokens = static_cast<std::uint32_t>(cut.max_tokens);
    return cut.control_words(tokens) <= num_words && cut.record(tokens, 0) <= record_bytes;
  }
  /// How a source's rows travel. `plain`: the call asks for records (a hook's send half, rows per choice), or the turn is
  /// one in which words and packets are cleared.
  ANYEP_HD constexpr Form form(const Cut& cut, int tokens, bool plain) const {
    if (plain || tokens > kMostPacketTokens) return Form::kRecords;
    const auto count = static_cast<std::uint32_t>(tokens);
    if (tokens <= kMostWordTokens && cut.row_word(count, 0) <= num_words) return Form::kWords;
    return cut.packet(count, 0) <= num_packets ? Form::kPackets : Form::kRecords;
  }
};

/// Bytes of one region in which every form of a call of `max_tokens` finds room, words and packets included.
constexpr std::uint64_t region_bytes_for(std::int64_t hidden, int most_local_experts, int top_k, int max_tokens) {
  std::uint64_t words = 0, packets = 0, records = 0;
  const auto tokens = static_cast<std::uint32_t>(max_tokens);
  const auto add = [&](const Cut& cut) {
    const std::uint32_t in_words = std::min<std::uint32_t>(tokens, kMostWordTokens);
    const std::uint32_t in_packets = std::min<std::uint32_t>(tokens, kMostPacketTokens);
    words = std::max<std::uint64_t>({words, cut.control_words(tokens), cut.row_word(in_words, 0)});
    packets = std::max<std::uint64_t>(packets, cut.packet(in_packets, 0));
    records = std::max(records, cut.record(tokens, 0));
  };
  for (const bool yes : {false, true}) {
    add(dispatch_cut(hidden, yes, most_local_experts, top_k, max_tokens));
    add(combine_cut(hidden, false, yes, most_local_experts, top_k, max_tokens));
  }
  if (hidden % 128 == 0) add(combine_cut(hidden, true, true, most_local_experts, top_k, max_tokens));
  // The areas are rounded down to kAlignment each: one unit more per area.
  constexpr std::uint64_t kRest = kWordShare * kPacketShare;
  const std::uint64_t rest =
      std::max({(words * 8 + kAlignment) * kWordShare, (packets * 16 + kAlignment) * kPacketShare,
                core::ceil_div(records * kRest, kRest - kWordShare - kPacketShare)});
  return core::round_up(kMaxChunks * kFlagBytes + rest, kAlignment);
}

}  // namespace anyep::cuda::low_latency
