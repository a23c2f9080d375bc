// Random rows that need no storage: row `key` is a stretch of one table of normal numbers, at a place that the key
// fixes. Keys below kNumKeys give different rows, so that a row at a wrong place is seen.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace anyep::bench {

class Payload {
 public:
  static constexpr std::uint64_t kNumKeys = 1 << 20;

  /// Rows of up to `hidden` elements.
  Payload(std::int64_t hidden, std::uint64_t seed);
  std::int64_t hidden() const { return hidden_; }
  /// Bits of `hidden` bfloat16 elements.
  std::span<const std::uint16_t> row(std::uint64_t key) const;

 private:
  std::int64_t hidden_;
  std::vector<std::uint16_t> table_;
};

/// Elements of `got` that differ from `want`, compared as bits.
std::int64_t count_wrong(std::span<const std::uint16_t> got, std::span<const std::uint16_t> want);
std::int64_t count_wrong(std::span<const std::uint8_t> got, std::span<const std::uint8_t> want);

}  // namespace anyep::bench
