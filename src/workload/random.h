// Numbers that depend on a key and a counter only, and are the same on every platform: integer arithmetic, and of
// floating point only + - * / and square root. Philox4x32 with ten rounds after Salmon et al., "Parallel random
// numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once

#include <array>
#include <cstdint>

namespace anyep::workload {

/// What a stream is drawn for, so that no two uses share numbers.
enum class Purpose : std::uint32_t {
  kChoices = 1,
  kWeights,
  kPopularity,
  kShuffle,
  kTokensPerRank,
  kDrop,
  kGateBias,
  kGateWeight,
  kWord,
  kRequest,
  kFeatures,
  kProjection
};

/// A bijective mix of 64 bits (the finaliser of SplitMix64).
constexpr std::uint64_t mix(std::uint64_t value) {
  value += 0x9e3779b97f4a7c15U;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9U;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebU;
  return value ^ (value >> 31);
}

constexpr std::uint64_t mix(std::uint64_t first, std::uint64_t second) {
  return mix(mix(first) ^ second);
}

/// One block of Philox4x32-10.
std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::uint64_t key);

/// The numbers of one (key, purpose, item). Two streams share nothing unless all three are equal.
class Stream {
 public:
  Stream(std::uint64_t key, Purpose purpose, std::uint64_t item)
      : key_(key),
        counter_{0, static_cast<std::uint32_t>(purpose), static_cast<std::uint32_t>(item),
                 static_cast<std::uint32_t>(item >> 32)} {}

  std::uint32_t bits32() {
    if (used_ == 4) refill();
    return block_[used_++];
  }
  std::uint64_t bits64() {
    const std::uint64_t high = bits32();
    return high << 32 | bits32();
  }
  /// In (0, 1).
  double uniform() { return (static_cast<double>(bits64() >> 12) + 0.5) * 0x1p-52; }
  /// In [0, bound), 1 <= bound; its bias is below bound / 2^32.
  std::uint32_t below(std::uint32_t bound) {
    return static_cast<std::uint32_t>(static_cast<std::uint64_t>(bits32()) * bound >> 32);
  }
  /// Standard normal (Marsaglia's polar method).
  double gaussian();

 private:
  void refill();

  std::uint64_t key_;
  std::array<std::uint32_t, 4> counter_;
  std::array<std::uint32_t, 4> block_{};
  unsigned used_ = 4;
  bool has_spare_ = false;
  double spare_ = 0;
};

}  // namespace anyep::workload
