#include "bench/support/low_latency_case.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/fp8.h"
#include "core/routing.h"

namespace anyep::bench {
namespace {

std::size_t as_size(std::int64_t value) {
  return static_cast<std::size_t>(value);
}

LowLatencyOptions options_of(Wire wire, bool hook) {
  LowLatencyOptions options;
  options.wire = wire;
  options.hook = hook;
  options.wait = !hook;
  return options;
}

}  // namespace

SlabMemory::SlabMemory(int local_experts, int num_ranks, std::int64_t max_tokens, std::int64_t hidden, Wire wire)
    : rows_(num_ranks * max_tokens) {
  const std::int64_t experts = local_experts;
  const bool fp8 = wire == Wire::kFP8 || wire == Wire::kUE8M0;
  const DType dtype = fp8 ? DType::kF8E4M3 : DType::kBF16;
  x_ = Buffer::untouched(as_size(experts * rows_ * hidden) * size_of(dtype));
  counts_ = Buffer(as_size(experts) * sizeof(std::int32_t));
  source_ = Buffer(as_size(experts * rows_) * sizeof(std::int32_t));
  range_ = Buffer(as_size(experts * num_ranks) * sizeof(std::int64_t));
  view_.x = TensorView::dense(x_.data(), dtype, {experts, rows_, hidden});
  view_.counts = TensorView::dense(counts_.data(), DType::kI32, {experts});
  view_.source = TensorView::dense(source_.data(), DType::kI32, {experts, rows_});
  view_.range = TensorView::dense(range_.data(), DType::kI64, {experts, num_ranks});
  if (!fp8) return;
  const std::int64_t columns = wire == Wire::kFP8 ? core::num_fp8_scales(hidden) : core::num_packed_scales(hidden);
  scales_ = Buffer::untouched(as_size(experts * columns * rows_) * 4);
  view_.scales =
      TensorView::dense(scales_.data(), wire == Wire::kFP8 ? DType::kF32 : DType::kI32, {experts, rows_, columns});
  view_.scales.strides = {columns * rows_, 1, rows_};
}

LowLatencyData::LowLatencyData(const workload::Batch& batch, int rank, std::int64_t hidden, Wire dispatch_wire,
                               const RowContent& content, std::int64_t max_tokens)
    : batch_(batch), rank_(rank), hidden_(hidden), max_tokens_(max_tokens), wire_(dispatch_wire), content_(&content) {
  for (const std::int64_t tokens : batch_.tokens_per_rank) max_tokens_ = std::max(max_tokens_, tokens);
  x_ = Buffer(as_size(num_tokens() * hidden_) * sizeof(std::uint16_t));
  std::vector<std::uint16_t> scratch(as_size(hidden_));
  for (std::int64_t token = 0; token < num_tokens(); ++token) {
    std::memcpy(x_.as<std::uint16_t>() + token * hidden_, content_->token(rank_, token, scratch).data(),
                as_size(hidden_) * sizeof(std::uint16_t));
  }
}

int LowLatencyData::local_experts() const {
  return core::expert_block(batch_.num_experts, num_ranks(), rank_).count;
}
int LowLatencyData::first_expert() const {
  return core::expert_block(batch_.num_experts, num_ranks(), rank_).first;
}

Shape LowLatencyData::shape() const {
  return {.num_experts = batch_.num_experts,
          .top_k = batch_.top_k,
          .hidden = hidden_,
          .max_tokens = max_tokens_,
          .dtype = DType::kBF16,
          .num_scales = 0};
}

TensorView LowLatencyData::x() const {
  return TensorView::dense(x_.data(), DType::kBF16, {num_tokens(), hidden_});
}

Routing LowLatencyData::routing() const {
  Routing routing;
  routing.experts = TensorView::dense(batch_.experts_of(rank_).data(), DType::kI64, {num_tokens(), batch_.top_k});
  routing.weights = TensorView::dense(batch_.weights_of(rank_).data(), DType::kF32, {num_tokens(), batch_.top_k});
  return routing;
}

std::int64_t LowLatencyData::wire_rows() const {
  std::int64_t out = 0, in = 0;
  for (int source = 0; source < num_ranks(); ++source) {
    for (std::int64_t token = 0; token < batch_.num_tokens(source); ++token) {
      const std::int64_t* const ids = batch_.experts.data() + (batch_.first_token(source) + token) * batch_.top_k;
      std::vector<bool> at(as_size(num_ranks()), false);
      for (int choice = 0; choice < batch_.top_k; ++choice) {
        if (ids[choice] < 0) continue;
        const int rank = core::rank_of_expert(batch_.num_experts, num_ranks(), static_cast<int>(ids[choice]));
        at[as_size(rank)] = true;
      }
      if (source != rank_) {
        in += at[as_size(rank_)] ? 1 : 0;
      } else {
        out += std::count(at.begin(), at.end(), true) - (at[as_size(rank_)] ? 1 : 0);
      }
    }
  }
  return std::max(in, out);
}

bool LowLatencyData::chose(int source, std::int64_t token, std::int64_t expert) const {
  const std::int64_t* const ids = batch_.experts.data() + (batch_.first_token(source) + token) * batch_.top_k;
  return std::find(ids, ids + batch_.top_k, expert) != ids + batch_.top_k;
}

void LowLatencyData::fill_answers(const ExpertSlabs& ranges, std::uint16_t* x) const {
  const std::int64_t rows = num_ranks() * max_tokens_;
  std::vector<std::uint16_t> scratch(as_size(hidden_));
  for (int expert = 0; expert < local_experts(); ++expert) {
    for (int source = 0; source < num_ranks(); ++source) {
      const std::int64_t range = ranges.range.as<std::int64_t>()[expert * num_ranks() + source];
      const std::int64_t begin = range >> 32, count = range & 0xffffffff;
      for (std::int64_t row = begin; row < begin + count; ++row) {
        const std::int32_t token = ranges.source.as<std::int32_t>()[expert * rows + row];
        std::memcpy(x + (expert * rows + row) * hidden_,
                    content_->answer_of_expert(source, token, first_expert() + expert, scratch).data(),
                    as_size(hidden_) * sizeof(std::uint16_t));
      }
    }
  }
}

std::int64_t LowLatencyData::wrong_row(const ExpertSlabs& got, std::int64_t row, RowContent::Row want) const {
  if (wire_ == Wire::kBF16) {
    return count_wrong(std::span(got.x.as<std::uint16_t>() + row * hidden_, as_size(hidden_)), want);
  }
  std::vector<std::uint8_t> cast(as_size(hidden_));
  std::vector<std::uint32_t> scales(as_size(core::num_fp8_scales(hidden_)));
  const auto form = wire_ == Wire::kUE8M0 ? core::ScaleForm::kUE8M0 : core::ScaleForm::kF32;
  core::cast_fp8_row({.x = want.data(), .hidden = hidden_, .out = cast.data(), .scales = scales.data(), .form = form});
  std::int64_t wrong =
      count_wrong(std::span(got.x.as<std::uint8_t>() + row * hidden_, as_size(hidden_)), std::span(cast));
  const std::int64_t rows = num_ranks() * max_tokens_;
  for (std::int64_t column = 0; column < got.scales.shape[2]; ++column) {
    const std::int64_t at = row / rows * got.scales.strides[0] + row % rows + column * got.scales.strides[2];
    wrong += got.scales.as<std::uint32_t>()[at] != scales[as_size(column)] ? 1 : 0;
  }
  return wrong;
}

std::int64_t LowLatencyData::wrong_expert(const ExpertSlabs& got, int expert) const {
  const std::int64_t rows = num_ranks() * max_tokens_;
  std::vector<std::uint16_t> scratch(as_size(hidden_));
  std::int64_t count = 0, wrong = 0;
  for (int source = 0; source < num_ranks(); ++source) {
    const std::int64_t begin = count;
    for (std::int64_t token = 0; token < batch_.num_tokens(source); ++token) {
      if (!chose(source, token, first_expert() + expert)) continue;
      const std::int64_t row = expert * rows + count++;
      wrong += got.source.as<std::int32_t>()[row] != token ? 1 : 0;
      wrong += wrong_row(got, row, content_->token(source, token, scratch));
    }
    const std::int64_t range = begin << 32 | (count - begin);
    wrong += got.range.as<std::int64_t>()[expert * num_ranks() + source] != range ? 1 : 0;
  }
  return wrong + (got.counts.as<std::int32_t>()[expert] != count ? 1 : 0);
}

std::int64_t LowLatencyData::wrong_slabs(const ExpertSlabs& got) const {
  std::int64_t wrong = 0;
  for (int expert = 0; expert < local_experts(); ++expert) wrong += wrong_expert(got, expert);
  return wrong;
}

void LowLatencyData::sum_of_rank(std::int64_t token, int reader, std::vector<float>& sum) const {
  const core::ExpertBlock block = core::expert_block(batch_.num_experts, num_ranks(), reader);
  const std::int64_t first = (batch_.first_token(rank_) + token) * batch_.top_k;
  std::vector<std::uint16_t> scratch(as_size(hidden_));
  std::vector<float> of_rank(as_size(hidden_), 0.0F);
  bool any = false;
  for (int choice = 0; choice < batch_.top_k; ++choice) {
    const std::int64_t id = batch_.experts[as_size(first + choice)];
    if (id < block.first || id >= block.first + block.count) continue;
    any = true;
    const float weight = batch_.weights[as_size(first + choice)];
    const RowContent::Row row = content_->answer_of_expert(rank_, token, static_cast<int>(id), scratch);
    for (std::size_t i = 0; i < sum.size(); ++i) of_rank[i] = std::fma(weight, core::float_of_bf16(row[i]), of_rank[i]);
  }
  if (!any) return;
  for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += core::float_of_bf16(core::bf16_of_float(of_rank[i]));
}

std::int64_t LowLatencyData::wrong_sums(const std::uint16_t* got) const {
  std::vector<float> sum(as_size(hidden_));
  std::vector<std::uint16_t> want(as_size(hidden_));
  std::int64_t wrong = 0;
  for (std::int64_t token = 0; token < num_tokens(); ++token) {
    std::fill(sum.begin(), sum.end(), 0.0F);
    for (int reader = 0; reader < num_ranks(); ++reader) sum_of_rank(token, reader, sum);
    for (std::size_t i = 0; i < sum.size(); ++i) want[i] = core::bf16_of_float(sum[i]);
    wrong += count_wrong(std::span(got + token * hidden_, as_size(hidden_)), want);
  }
  return wrong;
}

LowLatencyCase::LowLatencyCase(Engine& engine, const LowLatencyData& data)
    : engine_(&engine),
      data_(&data),
      slabs_(data.local_experts(), data.num_ranks(), data.max_tokens(), data.hidden(), data.wire()),
      answers_(Buffer::untouched(as_size(data.local_experts() * slabs_.rows_per_expert() * data.hidden() * 2))),
      sums_(as_size(data.num_tokens() * data.hidden() * 2)) {
  dispatch();
  data.fill_answers(slabs_.view(), answers_.as<std::uint16_t>());
}

ExpertSlabs LowLatencyCase::answers_view() const {
  ExpertSlabs answers = slabs_.view();
  answers.x = TensorView::dense(answers_.data(), DType::kBF16, answers.x.shape);
  answers.scales = {};
  return answers;
}

void LowLatencyCase::dispatch() {
  engine_->low_latency_dispatch(data_->shape(), data_->x(), data_->routing(), slabs_.view(), {},
                                options_of(data_->wire(), false));
}

void LowLatencyCase::combine() {
  engine_->low_latency_combine(data_->shape(), answers_view(), data_->routing(),
                               TensorView::dense(sums_.data(), DType::kBF16, {data_->num_tokens(), data_->hidden()}),
                               {}, options_of(Wire::kBF16, false));
}

Pending LowLatencyCase::dispatch_send() {
  return engine_->low_latency_dispatch(data_->shape(), data_->x(), data_->routing(), slabs_.view(), {},
                                       options_of(data_->wire(), true));
}

Pending LowLatencyCase::combine_send() {
  return engine_->low_latency_combine(
      data_->shape(), answers_view(), data_->routing(),
      TensorView::dense(sums_.data(), DType::kBF16, {data_->num_tokens(), data_->hidden()}), {},
      options_of(Wire::kBF16, true));
}

}  // namespace anyep::bench
