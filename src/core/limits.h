// The numbers that bound a call, each with its reason.
#pragma once

#include <anyep/config.h>

#include <chrono>
#include <cstdint>
#include <string_view>

namespace anyep::core {

/// Ranks of one group. A process holds up to three descriptors per peer (link, process, window): 1024 ranks stay below
/// 4096, the usual hard limit of descriptors.
inline constexpr int kMaxRanks = 1024;
/// Top-k of every mode: V1's bound for high throughput, kept for all.
inline constexpr int kMaxTopK = 32;
/// Experts of one group; local ids and counts are 32 bits, boards and tables of this size stay small.
inline constexpr int kMaxExperts = 65536;
/// Elements of a row: rows up to 256 KiB of float32.
inline constexpr std::int64_t kMaxHidden = 65536;
/// Tokens of one rank in one call: places and counts are 32 bits with sign.
inline constexpr std::int64_t kMaxTokens = INT32_MAX;
/// Rows of one rank, likewise.
inline constexpr std::int64_t kMaxRows = INT32_MAX;
/// Bytes of a row's field are a multiple of this.
inline constexpr std::int64_t kRowGranule = 16;

}  // namespace anyep::core
