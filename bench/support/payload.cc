#include "bench/support/payload.h"

#include <cmath>
#include <numbers>

#include "core/bfloat16.h"

namespace anyep::bench {
namespace {

/// Steele, Lea and Flood's SplitMix64: a counter through a mixer.
std::uint64_t next(std::uint64_t& state) {
  std::uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

/// In (0, 1].
double uniform(std::uint64_t& state) {
  return (static_cast<double>(next(state) >> 11) + 1) * 0x1p-53;
}

template <class T>
std::int64_t count_differing(std::span<const T> got, std::span<const T> want) {
  std::int64_t wrong = 0;
  for (std::size_t i = 0; i < want.size(); ++i) wrong += got[i] != want[i] ? 1 : 0;
  return wrong;
}

}  // namespace

Payload::Payload(std::int64_t hidden, std::uint64_t seed)
    : hidden_(hidden), table_(kNumKeys + static_cast<std::size_t>(hidden) + 1) {
  for (std::size_t i = 0; i + 1 < table_.size(); i += 2) {
    const double radius = std::sqrt(-2 * std::log(uniform(seed)));
    const double angle = 2 * std::numbers::pi * uniform(seed);
    table_[i] = core::bf16_of_float(static_cast<float>(radius * std::cos(angle)));
    table_[i + 1] = core::bf16_of_float(static_cast<float>(radius * std::sin(angle)));
  }
}

std::span<const std::uint16_t> Payload::row(std::uint64_t key) const {
  // An odd factor permutes the keys, and keeps neighbours from being the same numbers one element further.
  const std::uint64_t start = key * 0x9e3779b1u % kNumKeys;
  return {table_.data() + start, static_cast<std::size_t>(hidden_)};
}

std::int64_t count_wrong(std::span<const std::uint16_t> got, std::span<const std::uint16_t> want) {
  return count_differing(got, want);
}

std::int64_t count_wrong(std::span<const std::uint8_t> got, std::span<const std::uint8_t> want) {
  return count_differing(got, want);
}

}  // namespace anyep::bench
