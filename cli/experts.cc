#include "cli/experts.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "core/fp8.h"

namespace anyep::cli {
namespace {

/// Partial sums of a dot product: a fixed number, so that every machine adds in the same order.
constexpr std::int64_t kLanes = 16;

float dot(const float* a, const float* b, std::int64_t count) {
  std::array<float, kLanes> lanes{};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane)
      lanes[static_cast<std::size_t>(lane)] += a[i + lane] * b[i + lane];
  }
  for (; i < count; ++i) lanes[static_cast<std::size_t>(i % kLanes)] += a[i] * b[i];
  float sum = 0;
  for (const float lane : lanes) sum += lane;
  return sum;
}

const std::array<float, 256>& e4m3_values() {
  static const std::array<float, 256> kValues = [] {
    std::array<float, 256> values{};
    for (std::size_t code = 0; code < values.size(); ++code)
      values[code] = core::float_of_e4m3(static_cast<std::uint8_t>(code));
    return values;
  }();
  return kValues;
}

}  // namespace

Experts::Experts(int num_experts, std::int64_t hidden, std::uint64_t seed)
    : hidden_(hidden), rows_(static_cast<std::size_t>(num_experts * 2 * kRank * hidden)) {
  // Uniform in [-1, 1); A x is then about as large as x, B adds a third of it.
  const float scale_a = std::sqrt(3.0F / static_cast<float>(hidden)), scale_b = 0.3F;
  std::uint64_t state = seed * 2 + 1;
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const auto bits = static_cast<std::int32_t>(static_cast<std::uint32_t>(state >> 32));
    const bool is_a = i / static_cast<std::size_t>(hidden) % (2 * kRank) < kRank;
    rows_[i] = static_cast<float>(bits) * 0x1p-31F * (is_a ? scale_a : scale_b);
  }
}

const float* Experts::row(int expert, int index) const {
  return rows_.data() + (static_cast<std::int64_t>(expert) * 2 * kRank + index) * hidden_;
}

void Experts::add_answer(int expert, std::span<const float> x, float weight, std::span<float> sum) const {
  std::array<float, kRank> inner{};
  std::array<const float*, kRank> b{};
  for (int i = 0; i < kRank; ++i) {
    const auto at = static_cast<std::size_t>(i);
    inner[at] = std::max(0.0F, dot(row(expert, i), x.data(), hidden_));
    b[at] = row(expert, kRank + i);
  }
  const float* const in = x.data();
  float* const out = sum.data();
  for (std::int64_t i = 0; i < hidden_; ++i) {
    float answer = in[i];
    for (std::size_t at = 0; at < kRank; ++at) answer += b[at][i] * inner[at];
    out[i] += weight * answer;
  }
}

void dequantise(const QuantisedRow& row, std::span<float> x) {
  const std::array<float, 256>& values = e4m3_values();
  for (std::size_t i = 0; i < x.size(); ++i) {
    const auto block = static_cast<std::int64_t>(i) / core::kFp8Block;
    x[i] = values[row.x[i]] * row.scales[block * row.scale_stride];
  }
}

void round_row(std::span<const float> x, std::uint16_t* out) {
  for (std::size_t i = 0; i < x.size(); ++i) out[i] = core::bf16_of_float(x[i]);
}

}  // namespace anyep::cli
