#include "cli/text_content.h"

#include <algorithm>

#include "core/fp8.h"
#include "core/routing.h"

namespace anyep::cli {

TextContent::TextContent(const workload::TextWorkload& text, const Experts& experts, const workload::Batch& batch,
                         std::int64_t first_token)
    : text_(&text),
      experts_(&experts),
      batch_(&batch),
      first_token_(first_token),
      row_(static_cast<std::size_t>(text.hidden())),
      cast_(row_.size()),
      scales_(static_cast<std::size_t>(core::num_fp8_scales(text.hidden()))),
      kept_(row_.size()),
      sum_(row_.size()) {}

bench::RowContent::Row TextContent::token(int source, std::int64_t token, Scratch scratch) const {
  text_->embed(first_token_ + batch_->first_token(source) + token, scratch);
  return scratch;
}

const std::vector<float>& TextContent::seen_by_experts(int source, std::int64_t token) const {
  const std::int64_t global = batch_->first_token(source) + token;
  if (global == kept_token_) return kept_;
  const Row row = this->token(source, token, row_);
  core::cast_fp8_row({.x = row.data(), .hidden = text_->hidden(), .out = cast_.data(), .scales = scales_.data()});
  dequantise({cast_.data(), scales_.data()}, kept_);
  kept_token_ = global;
  return kept_;
}

bench::RowContent::Row TextContent::answer_of_rank(int source, std::int64_t token, int reader, Scratch scratch) const {
  const std::vector<float>& x = seen_by_experts(source, token);
  const core::ExpertBlock block = core::expert_block(batch_->num_experts, batch_->num_ranks(), reader);
  const std::int64_t first = (batch_->first_token(source) + token) * batch_->top_k;
  std::fill(sum_.begin(), sum_.end(), 0.0F);
  for (int choice = 0; choice < batch_->top_k; ++choice) {
    const auto at = static_cast<std::size_t>(first + choice);
    const auto id = static_cast<int>(batch_->experts[at]);
    if (id >= block.first && id < block.first + block.count) experts_->add_answer(id, x, batch_->weights[at], sum_);
  }
  round_row(sum_, scratch.data());
  return scratch;
}

bench::RowContent::Row TextContent::answer_of_expert(int source, std::int64_t token, int expert,
                                                     Scratch scratch) const {
  const std::vector<float>& x = seen_by_experts(source, token);
  std::fill(sum_.begin(), sum_.end(), 0.0F);
  experts_->add_answer(expert, x, 1.0F, sum_);
  round_row(sum_, scratch.data());
  return scratch;
}

}  // namespace anyep::cli
