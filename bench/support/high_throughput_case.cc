#include "bench/support/high_throughput_case.h"

#include <algorithm>
#include <cstring>

#include "bench/support/parallel.h"
#include "core/fp8.h"
#include "core/routing.h"

namespace anyep::bench {
namespace {

std::int64_t id_at(const TensorView& ids, std::int64_t row, int choice) {
  const std::int64_t index = row * ids.strides[0] + choice * ids.strides[1];
  return ids.dtype == DType::kI64 ? ids.as<std::int64_t>()[index] : ids.as<std::int32_t>()[index];
}

std::size_t as_size(std::int64_t value) {
  return static_cast<std::size_t>(value);
}

Options waiting() {
  Options options;
  options.wait = true;
  return options;
}

}  // namespace

const char* name_of(Memory memory) {
  return memory == Memory::kWindow ? "window" : "caller";
}
const char* name_of(RowType type) {
  return type == RowType::kFP8 ? "fp8" : "bf16";
}

HighThroughputData::HighThroughputData(const workload::Batch& batch, int rank, std::int64_t hidden, RowType type,
                                       const RowContent& content)
    : batch_(batch), rank_(rank), hidden_(hidden), type_(type), content_(&content) {
  for (int source = 0; source < num_ranks(); ++source) {
    const std::int64_t first = batch_.first_token(source);
    most_tokens_ = std::max(most_tokens_, batch_.num_tokens(source));
    for (std::int64_t token = 0; token < batch_.num_tokens(source); ++token) {
      if (goes_to(first + token, rank_)) origins_.push_back({source, token});
      if (source != rank_) continue;
      for (int reader = 0; reader < num_ranks(); ++reader) {
        if (goes_to(first + token, reader)) (reader == rank_ ? own_rows_ : sent_rows_) += 1;
      }
    }
  }
  fill_input();
}

bool HighThroughputData::goes_to(std::int64_t global_token, int rank) const {
  const core::ExpertBlock block = core::expert_block(batch_.num_experts, num_ranks(), rank);
  const std::int64_t* const ids = batch_.experts.data() + global_token * batch_.top_k;
  return std::any_of(ids, ids + batch_.top_k,
                     [&](std::int64_t id) { return id >= block.first && id < block.first + block.count; });
}

void HighThroughputData::cast_row(RowContent::Row row, std::uint8_t* x, float* scales) const {
  core::cast_fp8_row({.x = row.data(), .hidden = hidden_, .out = x, .scales = scales});
}

void HighThroughputData::fill_input() {
  x_ = Buffer(as_size(num_tokens() * row_bytes()));
  scales_ = Buffer(as_size(num_tokens() * num_scales()) * sizeof(float));
  std::vector<std::uint16_t> scratch(as_size(hidden_));
  for (std::int64_t token = 0; token < num_tokens(); ++token) {
    const RowContent::Row row = content_->token(rank_, token, scratch);
    std::byte* const out = x_.data() + token * row_bytes();
    if (type_ == RowType::kFP8) {
      cast_row(row, reinterpret_cast<std::uint8_t*>(out), scales_.as<float>() + token * num_scales());
    } else {
      std::memcpy(out, row.data(), as_size(row_bytes()));
    }
  }
}

std::int64_t HighThroughputData::row_bytes() const {
  return type_ == RowType::kFP8 ? hidden_ : 2 * hidden_;
}

Shape HighThroughputData::shape() const {
  return {.num_experts = batch_.num_experts,
          .top_k = batch_.top_k,
          .hidden = hidden_,
          .max_tokens = most_tokens_,
          .dtype = type_ == RowType::kFP8 ? DType::kF8E4M3 : DType::kBF16,
          .num_scales = static_cast<int>(num_scales())};
}

Rows HighThroughputData::input() const {
  Rows rows;
  rows.x = TensorView::dense(x_.data(), shape().dtype, {num_tokens(), hidden_});
  if (num_scales() > 0) {
    rows.scales = TensorView::dense(scales_.data(), DType::kF32, {num_tokens(), num_scales()});
  }
  rows.experts = routing().experts;
  rows.weights = routing().weights;
  return rows;
}

Routing HighThroughputData::routing() const {
  Routing routing;
  routing.experts = TensorView::dense(batch_.experts_of(rank_).data(), DType::kI64, {num_tokens(), batch_.top_k});
  routing.weights = TensorView::dense(batch_.weights_of(rank_).data(), DType::kF32, {num_tokens(), batch_.top_k});
  return routing;
}

void HighThroughputData::fill_answers(std::uint16_t* x) const {
  std::vector<std::uint16_t> scratch(as_size(hidden_));
  for (std::int64_t row = 0; row < num_rows(); ++row) {
    const Origin& origin = origins_[as_size(row)];
    std::memcpy(x + row * hidden_, content_->answer_of_rank(origin.source, origin.token, rank_, scratch).data(),
                as_size(2 * hidden_));
  }
}

std::int64_t HighThroughputData::wrong_side_data(const Rows& got, std::int64_t row) const {
  const Origin& origin = origins_[as_size(row)];
  const core::ExpertBlock block = core::expert_block(batch_.num_experts, num_ranks(), rank_);
  const std::int64_t first = (batch_.first_token(origin.source) + origin.token) * batch_.top_k;
  std::int64_t wrong = 0;
  for (int choice = 0; choice < batch_.top_k; ++choice) {
    const std::int64_t id = batch_.experts[as_size(first + choice)];
    const bool here = id >= block.first && id < block.first + block.count;
    const float weight = here ? batch_.weights[as_size(first + choice)] : 0;
    wrong += id_at(got.experts, row, choice) != (here ? id - block.first : -1) ? 1 : 0;
    wrong += got.weights.as<float>()[row * batch_.top_k + choice] != weight ? 1 : 0;
  }
  return wrong;
}

std::int64_t HighThroughputData::wrong_rows(const Rows& got) const {
  if (got.x.shape[0] != num_rows()) return std::max(got.x.shape[0], num_rows()) * hidden_;
  return parallel_sum(num_rows(), num_ranks(),
                      [&](std::int64_t begin, std::int64_t end) { return wrong_rows(got, begin, end); });
}

std::int64_t HighThroughputData::wrong_rows(const Rows& got, std::int64_t begin, std::int64_t end) const {
  std::vector<std::uint8_t> want(as_size(hidden_));
  std::vector<float> want_scales(as_size(num_scales()));
  std::vector<std::uint16_t> scratch(as_size(hidden_));
  std::int64_t wrong = 0;
  for (std::int64_t row = begin; row < end; ++row) {
    const Origin& origin = origins_[as_size(row)];
    const RowContent::Row token = content_->token(origin.source, origin.token, scratch);
    if (type_ == RowType::kFP8) {
      cast_row(token, want.data(), want_scales.data());
      wrong += count_wrong(std::span(got.x.as<std::uint8_t>() + row * hidden_, as_size(hidden_)), want);
      const float* const scales = got.scales.as<float>() + row * num_scales();
      wrong += std::memcmp(scales, want_scales.data(), want_scales.size() * sizeof(float)) != 0 ? 1 : 0;
    } else {
      wrong += count_wrong(std::span(got.x.as<std::uint16_t>() + row * hidden_, as_size(hidden_)), token);
    }
    if (got.experts.given()) wrong += wrong_side_data(got, row);
  }
  return wrong;
}

std::int64_t HighThroughputData::wrong_sums(const std::uint16_t* got) const {
  return parallel_sum(num_tokens(), num_ranks(),
                      [&](std::int64_t begin, std::int64_t end) { return wrong_sums(got, begin, end); });
}

std::int64_t HighThroughputData::wrong_sums(const std::uint16_t* got, std::int64_t begin, std::int64_t end) const {
  std::vector<float> sum(as_size(hidden_));
  std::vector<std::uint16_t> want(as_size(hidden_)), scratch(as_size(hidden_));
  std::int64_t wrong = 0;
  for (std::int64_t token = begin; token < end; ++token) {
    std::fill(sum.begin(), sum.end(), 0.0F);
    for (int reader = 0; reader < num_ranks(); ++reader) {
      if (!goes_to(batch_.first_token(rank_) + token, reader)) continue;
      const RowContent::Row row = content_->answer_of_rank(rank_, token, reader, scratch);
      for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += core::float_of_bf16(row[i]);
    }
    for (std::size_t i = 0; i < sum.size(); ++i) want[i] = core::bf16_of_float(sum[i]);
    wrong += count_wrong(std::span(got + token * hidden_, as_size(hidden_)), want);
  }
  return wrong;
}

HighThroughputCase::HighThroughputCase(Engine& engine, const HighThroughputData& data, Memory memory)
    : engine_(&engine), data_(&data), memory_(memory), sums_(as_size(data.num_tokens() * data.hidden() * 2)) {
  route();
  make_output();
}

void HighThroughputCase::make_output() {
  const HighThroughputData& data = *data_;
  const std::int64_t rows = data.num_rows(), top_k = data.batch().top_k;
  if (memory_ == Memory::kWindow) {
    window_output_ = engine_->make_rows(rows, data.shape());
    output_ = window_output_.view();
  } else {
    x_ = Buffer(as_size(rows * data.row_bytes()));
    scales_ = Buffer(as_size(rows * data.num_scales()) * sizeof(float));
    output_.x = TensorView::dense(x_.data(), data.shape().dtype, {rows, data.hidden()});
    if (data.num_scales() > 0) {
      output_.scales = TensorView::dense(scales_.data(), DType::kF32, {rows, data.num_scales()});
    }
  }
  experts_ = Buffer(as_size(rows * top_k) * sizeof(std::int64_t));
  weights_ = Buffer(as_size(rows * top_k) * sizeof(float));
  output_.experts = TensorView::dense(experts_.data(), DType::kI64, {rows, top_k});
  output_.weights = TensorView::dense(weights_.data(), DType::kF32, {rows, top_k});
  poison();
}

void HighThroughputCase::make_answers() {
  Shape shape = data_->shape();
  shape.dtype = DType::kBF16;
  shape.num_scales = 0;
  const std::int64_t rows = data_->num_rows();
  if (memory_ == Memory::kWindow) {
    window_answers_ = engine_->make_rows(rows, shape);
    answers_view_ = window_answers_.view().x;
  } else {
    answers_ = Buffer(as_size(rows * data_->hidden() * 2));
    answers_view_ = TensorView::dense(answers_.data(), DType::kBF16, {rows, data_->hidden()});
  }
  data_->fill_answers(answers_view_.as<std::uint16_t>());
}

void HighThroughputCase::dispatch() {
  route();
  dispatch_cached();
}

void HighThroughputCase::route() {
  handle_ = engine_->route(data_->shape(), data_->routing(), {}, waiting());
}

void HighThroughputCase::dispatch_cached() {
  engine_->dispatch(data_->input(), handle_, output_, {}, waiting());
}

void HighThroughputCase::combine() {
  if (!answers_view_.given()) make_answers();
  CombineInput in;
  in.x = answers_view_;
  Rows out;
  out.x = TensorView::dense(sums_.data(), DType::kBF16, {data_->num_tokens(), data_->hidden()});
  engine_->combine(in, handle_, out, {}, waiting());
}

void HighThroughputCase::poison() {
  const auto fill = [](const TensorView& view) {
    if (view.given()) std::memset(view.data, 0xA5, as_size(view.num_elements()) * size_of(view.dtype));
  };
  fill(output_.x);
  fill(output_.scales);
  fill(output_.experts);
  fill(output_.weights);
  std::memset(sums_.data(), 0xA5, sums_.size());
}

}  // namespace anyep::bench
