#include "bench/gpu/high_throughput.h"

#include <algorithm>
#include <utility>

#include "bench/probes/check.h"
#include "bench/support/memory_copy.h"

namespace anyep::bench {
namespace {

/// More than any L2 of a GPU that this was written for: inputs and outputs that a batch of calls goes through.
constexpr std::int64_t kColdBytes = 120 << 20;
constexpr std::int64_t kMostCopies = 24;

}  // namespace

GpuHighThroughput::GpuHighThroughput(Engine& engine, const HighThroughputData& data, Memory memory, int num_sms,
                                     cudaStream_t stream)
    : engine_(&engine), data_(&data), memory_(memory), num_sms_(num_sms), stream_(stream) {
  const std::int64_t touched = (data.num_tokens() + data.num_rows()) * data.row_bytes();
  const std::int64_t copies =
      std::clamp<std::int64_t>(kColdBytes / std::max<std::int64_t>(touched, 1) + 1, 1, kMostCopies);
  const Rows host = data.input();
  experts_ = DeviceTensor(host.experts);
  weights_ = DeviceTensor(host.weights);
  sums_ = DeviceTensor(DType::kBF16, {data.num_tokens(), data.hidden()});
  for (std::int64_t i = 0; i < copies; ++i) {
    inputs_.push_back({DeviceTensor(host.x), DeviceTensor(host.scales)});
    outputs_.push_back(make_output());
    fresh_.push_back(memory_ == Memory::kWindow ? Output() : make_output());
  }
  Routing routing;
  routing.experts = experts_.view();
  handle_ = engine_->route(data_->shape(), routing, this->stream(), options());
  (void)handle_.num_rows();
  dispatch_cached(0);  // a handle learns the rows' sources from its first dispatch; combine needs them
  dispatch(0);
  finish();
}

Options GpuHighThroughput::options() const {
  Options options;
  options.num_sms = num_sms_;
  return options;
}

GpuHighThroughput::Output GpuHighThroughput::make_output() const {
  const HighThroughputData& data = *data_;
  Output output;
  if (memory_ == Memory::kWindow) {
    output.owned = engine_->make_rows(data.num_rows(), data.shape());
    output.rows = output.owned.view();
    return output;
  }
  const std::int64_t rows = data.num_rows(), top_k = data.batch().top_k;
  output.x = DeviceTensor(data.shape().dtype, {rows, data.hidden()});
  output.experts = DeviceTensor(DType::kI64, {rows, top_k});
  output.weights = DeviceTensor(DType::kF32, {rows, top_k});
  if (data.num_scales() > 0) output.scales = DeviceTensor(DType::kF32, {rows, data.num_scales()});
  output.rows.x = output.x.view();
  output.rows.scales = output.scales.view();
  output.rows.experts = output.experts.view();
  output.rows.weights = output.weights.view();
  return output;
}

Rows GpuHighThroughput::input(int i) const {
  const Input& input = inputs_[static_cast<std::size_t>(i % num_copies())];
  Rows rows;
  rows.x = input.x.view();
  rows.scales = input.scales.view();
  return rows;
}

Rows GpuHighThroughput::routed_input(int i) const {
  Rows rows = input(i);
  rows.experts = experts_.view();
  rows.weights = weights_.view();
  return rows;
}

Routing GpuHighThroughput::routing() const {
  Routing routing;
  routing.experts = experts_.view();
  return routing;
}

void GpuHighThroughput::dispatch(int i) {
  Output& output = fresh_[static_cast<std::size_t>(i % num_copies())];
  const Rows rows = routed_input(i);
  const double begin = now_us();
  if (memory_ == Memory::kWindow) {
    Fresh fresh = engine_->dispatch_fresh(data_->shape(), routing(), rows, stream(), options());
    host_us_ = now_us() - begin - static_cast<double>(fresh.waited_ns) * 1e-3;
    output.owned = std::move(fresh.rows);
    output.rows = output.owned.view();
    return;
  }
  const Handle handle = engine_->route(data_->shape(), routing(), stream(), options());
  const double routed = now_us();
  (void)handle.num_rows();
  const double counted = now_us();
  engine_->dispatch(rows, handle, output.rows, stream(), options());
  host_us_ = routed - begin + (now_us() - counted);
}

void GpuHighThroughput::dispatch_ahead(int i) {
  Output& output = fresh_[static_cast<std::size_t>(i % num_copies())];
  const Rows rows = routed_input(i);
  const double begin = now_us();
  output.owned = engine_->make_rows(data_->num_ranks() * data_->shape().max_tokens, data_->shape());
  const Fresh fresh = engine_->dispatch_fresh(data_->shape(), routing(), rows, output.owned.view(), Surplus::kDropped,
                                              stream(), options());
  host_us_ = now_us() - begin;
  output.owned.keep_front(fresh.handle.num_rows());
  output.rows = output.owned.view();
}

void GpuHighThroughput::dispatch_cached(int i) {
  const Output& output = outputs_[static_cast<std::size_t>(i % num_copies())];
  Rows out;
  out.x = output.rows.x;
  out.scales = output.rows.scales;
  engine_->dispatch(input(i), handle_, out, stream(), options());
}

void GpuHighThroughput::make_answers() {
  Shape shape = data_->shape();
  shape.dtype = DType::kBF16;
  shape.num_scales = 0;
  shape.top_k = 0;
  const std::int64_t rows = data_->num_rows();
  if (memory_ == Memory::kWindow) {
    owned_answers_ = engine_->make_rows(rows, shape);
    answers_view_ = owned_answers_.view().x;
  } else {
    answers_ = DeviceTensor(DType::kBF16, {rows, data_->hidden()});
    answers_view_ = answers_.view();
  }
  const Buffer host(bytes_of(answers_view_));
  data_->fill_answers(host.as<std::uint16_t>());
  copy_to_device(answers_view_.data, host.data(), bytes_of(answers_view_));
}

void GpuHighThroughput::combine(int) {
  if (!answers_view_.given()) make_answers();
  CombineInput in;
  in.x = answers_view_;
  Rows out;
  out.x = sums_.view();
  engine_->combine(in, handle_, out, stream(), options());
}

void GpuHighThroughput::finish() const {
  check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  engine_->check();
}

std::int64_t GpuHighThroughput::wrong_rows(const Output& output, bool with_side_data) const {
  const HostTensor x(output.rows.x), scales(output.rows.scales);
  const HostTensor experts(with_side_data ? output.rows.experts : TensorView());
  const HostTensor weights(with_side_data ? output.rows.weights : TensorView());
  Rows host;
  host.x = x.view();
  host.scales = scales.view();
  host.experts = experts.view();
  host.weights = weights.view();
  return data_->wrong_rows(host);
}

/// Rows in the window are made in the call: the block that it gets is most likely one of these.
void GpuHighThroughput::poison_fresh() {
  for (Output& output : fresh_) {
    poison(output.rows.x);
    poison(output.rows.scales);
    poison(output.rows.experts);
    poison(output.rows.weights);
  }
}

std::int64_t GpuHighThroughput::wrong_dispatch() {
  poison_fresh();
  dispatch(0);
  finish();
  return wrong_rows(fresh_[0], true);
}

std::int64_t GpuHighThroughput::wrong_dispatch_ahead() {
  poison_fresh();
  dispatch_ahead(0);
  finish();
  return wrong_rows(fresh_[0], true);
}

std::int64_t GpuHighThroughput::wrong_dispatch_cached() {
  poison(outputs_[0].rows.x);
  poison(outputs_[0].rows.scales);
  dispatch_cached(0);
  finish();
  return wrong_rows(outputs_[0], false);
}

std::int64_t GpuHighThroughput::wrong_combine() {
  poison(sums_.view());
  combine(0);
  finish();
  const HostTensor sums(sums_.view());
  return data_->wrong_sums(sums.view().as<std::uint16_t>());
}

}  // namespace anyep::bench
