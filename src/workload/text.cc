#include "workload/text.h"

#include <cmath>
#include <unordered_map>
#include <utility>

#include "core/bfloat16.h"
#include "workload/random.h"

namespace anyep::workload {
namespace {

bool is_space(char c) {
  return c == ' ' || (c >= '\t' && c <= '\r') || c == '\0';
}

bool is_letter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
         static_cast<unsigned char>(c) >= 0x80;
}

std::uint64_t hash_of(std::string_view word) {
  std::uint64_t hash = 0xcbf29ce484222325U;  // FNV-1a
  for (const char c : word) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3U;
  return mix(hash);
}

}  // namespace

Words::Words(std::string text) : text_(std::move(text)) {
  constexpr std::size_t kMostLetters = 1 << 20;  // of one word; a longer run is cut
  std::unordered_map<std::string_view, std::uint32_t> numbers;
  const std::string_view all = text_;
  for (std::size_t begin = 0; begin < all.size();) {
    if (is_space(all[begin])) {
      ++begin;
      continue;
    }
    std::size_t end = begin + 1;
    if (is_letter(all[begin])) {
      while (end < all.size() && end - begin < kMostLetters && is_letter(all[end])) ++end;
    }
    const std::string_view word = all.substr(begin, end - begin);
    const auto [known, is_new] = numbers.try_emplace(word, static_cast<std::uint32_t>(distinct_.size()));
    if (is_new) distinct_.push_back(word);
    places_.push_back({begin, static_cast<std::uint32_t>(word.size()), known->second});
    begin = end;
  }
}

Features features_of(std::string_view word, std::uint64_t seed) {
  Stream stream(seed, Purpose::kFeatures, hash_of(word));
  Features features;
  for (float& value : features) value = static_cast<float>(stream.gaussian());
  return features;
}

Projection::Projection(std::size_t num_elements, std::uint64_t seed)
    : blocks_((num_elements + kNumFeatures - 1) / kNumFeatures) {
  const double scale = 1 / std::sqrt(static_cast<double>(kTerms));
  for (std::size_t index = 0; index < blocks_.size(); ++index) {
    Stream stream(seed, Purpose::kProjection, index);
    Block& block = blocks_[index];
    for (std::size_t term = 0; term < kTerms; ++term) {
      block.rotation[term] = stream.below(kNumFeatures);
      for (float& factor : block.factor[term]) factor = static_cast<float>(scale * stream.gaussian());
    }
  }
}

void Projection::apply(const Features& features, std::span<std::uint16_t> bf16) const {
  std::array<float, 2 * kNumFeatures> twice;  // so that a rotated range is contiguous
  for (std::size_t index = 0; index < twice.size(); ++index) twice[index] = features[index % kNumFeatures];
  for (std::size_t first = 0; first < bf16.size(); first += kNumFeatures) {
    const Block& block = blocks_[first / kNumFeatures];
    Features sums{};
    for (std::size_t term = 0; term < kTerms; ++term) {
      const float* const rotated = twice.data() + block.rotation[term];
      for (std::size_t index = 0; index < kNumFeatures; ++index)
        sums[index] += block.factor[term][index] * rotated[index];
    }
    const auto out = bf16.subspan(first, std::min(kNumFeatures, bf16.size() - first));
    for (std::size_t index = 0; index < out.size(); ++index) out[index] = core::bf16_of_float(sums[index]);
  }
}

GateMatrix::GateMatrix(std::size_t num_experts, std::uint64_t seed) : factor_(kNumFeatures * num_experts) {
  const double scale = 1 / std::sqrt(static_cast<double>(kNumFeatures));
  for (std::size_t expert = 0; expert < num_experts; ++expert) {
    Stream stream(seed, Purpose::kGateWeight, expert);
    for (std::size_t feature = 0; feature < kNumFeatures; ++feature) {
      factor_[feature * num_experts + expert] = static_cast<float>(scale * stream.gaussian());
    }
  }
}

void GateMatrix::apply(const Features& features, std::span<float> logits) const {
  std::fill(logits.begin(), logits.end(), 0.0F);
  const float* row = factor_.data();
  for (const float feature : features) {
    for (std::size_t expert = 0; expert < logits.size(); ++expert) logits[expert] += feature * row[expert];
    row += logits.size();
  }
}

}  // namespace anyep::workload
