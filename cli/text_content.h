// What rows of the main job carry, computed from the text alone: for the sending rank, and for the check.
#pragma once

#include <anyep/workload.h>

#include <cstdint>
#include <vector>

#include "bench/support/content.h"
#include "cli/experts.h"

namespace anyep::cli {

/// Rows of one batch of the text. Keeps the last token's numbers: one thread at a time.
class TextContent final : public bench::RowContent {
 public:
  TextContent(const workload::TextWorkload& text, const Experts& experts, const workload::Batch& batch,
              std::int64_t first_token);
  Row token(int source, std::int64_t token, Scratch scratch) const override;
  /// The weighted sum of the answers of that rank's experts.
  Row answer_of_rank(int source, std::int64_t token, int reader, Scratch scratch) const override;
  Row answer_of_expert(int source, std::int64_t token, int expert, Scratch scratch) const override;

 private:
  /// What an expert sees: the row after its way through FP8.
  const std::vector<float>& seen_by_experts(int source, std::int64_t token) const;

  const workload::TextWorkload* text_;
  const Experts* experts_;
  const workload::Batch* batch_;
  std::int64_t first_token_;
  mutable std::int64_t kept_token_ = -1;
  mutable std::vector<std::uint16_t> row_;
  mutable std::vector<std::uint8_t> cast_;
  mutable std::vector<float> scales_, kept_, sum_;
};

}  // namespace anyep::cli
