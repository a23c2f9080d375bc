// The experts of the main job: small, seeded, and with the same bits whoever computes them.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace anyep::cli {

/// Expert e answers x + B_e relu(A_e x), with A_e and B_e of kRank rows, in float32 in a fixed order.
class Experts {
 public:
  static constexpr int kRank = 4;

  Experts(int num_experts, std::int64_t hidden, std::uint64_t seed);
  std::int64_t hidden() const { return hidden_; }
  /// sum += weight * (answer of `expert` to x).
  void add_answer(int expert, std::span<const float> x, float weight, std::span<float> sum) const;

 private:
  const float* row(int expert, int index) const;

  std::int64_t hidden_;
  std::vector<float> rows_;  ///< [expert][A rows, then B rows][hidden]
};

/// A row as dispatch delivers it: E4M3 and one float32 scale per 128 elements.
struct QuantisedRow {
  const std::uint8_t* x = nullptr;
  const float* scales = nullptr;
  std::int64_t scale_stride = 1;  ///< elements from one scale of the row to the next
};

void dequantise(const QuantisedRow& row, std::span<float> x);
/// To bfloat16, nearest even.
void round_row(std::span<const float> x, std::uint16_t* out);

}  // namespace anyep::cli
