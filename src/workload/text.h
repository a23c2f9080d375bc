// The parts of TextWorkload: words, their features, and the two projections that leave from the features.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace anyep::workload {

inline constexpr std::size_t kNumFeatures = 64;
using Features = std::array<float, kNumFeatures>;

/// A text cut into words: runs of letters, digits, underscores and bytes of other alphabets; any other byte that is no
/// space is a word of its own.
class Words {
 public:
  explicit Words(std::string text);
  Words(const Words&) = delete;  // views into text_
  Words& operator=(const Words&) = delete;

  std::size_t size() const { return places_.size(); }
  std::string_view at(std::size_t index) const {
    const Place& place = places_[index];
    return std::string_view(text_).substr(place.offset, place.length);
  }
  /// Which distinct word it is, numbered by first appearance.
  std::size_t number_of(std::size_t index) const { return places_[index].number; }
  const std::vector<std::string_view>& distinct() const { return distinct_; }

 private:
  struct Place {
    std::uint64_t offset;
    std::uint32_t length, number;
  };
  std::string text_;
  std::vector<Place> places_;
  std::vector<std::string_view> distinct_;  ///< into text_
};

/// Standard normal features of one word: a function of its letters and the seed.
Features features_of(std::string_view word, std::uint64_t seed);

/// Elements of a row from features: each is a weighted sum of three of them, whatever its index.
class Projection {
 public:
  Projection(std::size_t num_elements, std::uint64_t seed);
  void apply(const Features& features, std::span<std::uint16_t> bf16) const;

 private:
  static constexpr std::size_t kTerms = 3;
  struct Block {
    std::array<std::uint32_t, kTerms> rotation;  ///< element i of the block takes feature (i + rotation) % kNumFeatures
    std::array<Features, kTerms> factor;
  };
  std::vector<Block> blocks_;  ///< of kNumFeatures elements, the last one cut
};

/// Logits of a gate: a dense matrix of normal numbers times the features, each about standard normal.
class GateMatrix {
 public:
  GateMatrix(std::size_t num_experts, std::uint64_t seed);
  void apply(const Features& features, std::span<float> logits) const;

 private:
  std::vector<float> factor_;  ///< [feature][expert]
};

}  // namespace anyep::workload
