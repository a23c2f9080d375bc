#include "bench/gpu/low_latency.h"

#include <vector>

#include "bench/probes/check.h"
#include "core/fp8.h"

namespace anyep::bench {

GpuLowLatency::GpuLowLatency(Engine& engine, const LowLatencyData& data, int num_sms, cudaStream_t stream)
    : engine_(&engine), data_(&data), num_sms_(num_sms), stream_(stream) {
  const std::int64_t experts = data.local_experts(), ranks = data.num_ranks(), rows = ranks * data.max_tokens();
  const std::int64_t hidden = data.hidden();
  const bool fp8 = data.wire() == Wire::kFP8;
  x_ = DeviceTensor(data.x());
  const Routing routing = data.routing();
  experts_ = DeviceTensor(routing.experts);
  weights_ = DeviceTensor(routing.weights);
  slab_ = DeviceTensor(fp8 ? DType::kF8E4M3 : DType::kBF16, {experts, rows, hidden});
  counts_ = DeviceTensor(DType::kI32, {experts});
  source_ = DeviceTensor(DType::kI32, {experts, rows});
  range_ = DeviceTensor(DType::kI64, {experts, ranks});
  slabs_.x = slab_.view();
  slabs_.counts = counts_.view();
  slabs_.source = source_.view();
  slabs_.range = range_.view();
  if (fp8) {
    const std::int64_t columns = core::num_fp8_scales(hidden);
    scales_ = DeviceTensor(DType::kF32, {experts, columns, rows});
    slabs_.scales = TensorView::dense(scales_.view().data, DType::kF32, {experts, rows, columns});
    slabs_.scales.strides = {columns * rows, 1, rows};
  }
  rows_ = DeviceTensor(DType::kI32, {data.num_ranks(), data.shape().max_tokens, data.shape().top_k});
  slabs_.rows = rows_.view();
  answers_ = DeviceTensor(DType::kBF16, {experts, rows, hidden});
  sums_ = DeviceTensor(DType::kBF16, {data.num_tokens(), hidden});
  dispatch();
  finish();
  fill_answers();
}

LowLatencyOptions GpuLowLatency::options(Wire wire, bool hook) const {
  LowLatencyOptions options;
  options.wire = wire;
  options.hook = hook;
  options.num_sms = num_sms_;
  return options;
}

/// Only rows that dispatch has filled: slabs are large and mostly empty.
void GpuLowLatency::fill_answers() {
  const TensorView& view = answers_.view();
  const Buffer host = Buffer::untouched(bytes_of(view));
  const HostTensor source(source_.view()), range(range_.view()), counts(counts_.view());
  ExpertSlabs ranges;
  ranges.source = source.view();
  ranges.range = range.view();
  data_->fill_answers(ranges, host.as<std::uint16_t>());
  const std::size_t of_expert = as_size(view.strides[0]) * sizeof(std::uint16_t);
  for (std::int64_t expert = 0; expert < view.shape[0]; ++expert) {
    const std::int64_t rows = counts.view().as<std::int32_t>()[expert];
    copy_to_device(static_cast<std::byte*>(view.data) + as_size(expert) * of_expert,
                   host.data() + as_size(expert) * of_expert, as_size(rows * view.shape[2]) * sizeof(std::uint16_t));
  }
}

ExpertSlabs GpuLowLatency::answers_view() const {
  ExpertSlabs answers = slabs_;
  answers.x = answers_.view();
  answers.scales = {};
  return answers;
}

void GpuLowLatency::dispatch() {
  Routing routing;
  routing.experts = experts_.view();
  (void)engine_->low_latency_dispatch(data_->shape(), x_.view(), routing, slabs_, stream(),
                                      options(data_->wire(), false));
}

void GpuLowLatency::combine() {
  Routing routing;
  routing.experts = experts_.view();
  routing.weights = weights_.view();
  (void)engine_->low_latency_combine(data_->shape(), answers_view(), routing, sums_.view(), stream(),
                                     options(Wire::kBF16, false));
}

void GpuLowLatency::dispatch_send() {
  Routing routing;
  routing.experts = experts_.view();
  pending_.emplace(engine_->low_latency_dispatch(data_->shape(), x_.view(), routing, slabs_, stream(),
                                                 options(data_->wire(), true)));
}

void GpuLowLatency::combine_send() {
  Routing routing;
  routing.experts = experts_.view();
  routing.weights = weights_.view();
  pending_.emplace(engine_->low_latency_combine(data_->shape(), answers_view(), routing, sums_.view(), stream(),
                                                options(Wire::kBF16, true)));
}

void GpuLowLatency::receive() {
  (void)pending_->receive(stream());
  pending_.reset();
}

void GpuLowLatency::pair_by_hooks() {
  dispatch_send();
  receive();
  combine_send();
  receive();
}

void GpuLowLatency::finish() const {
  check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  engine_->check();
}

std::int64_t GpuLowLatency::wrong_slabs() const {
  const TensorView& slab = slabs_.x;
  const HostTensor counts(slabs_.counts), source(slabs_.source), range(slabs_.range), scales(scales_.view());
  const Buffer x = Buffer::untouched(bytes_of(slab));
  ExpertSlabs host = slabs_;
  host.x.data = x.data();
  host.counts = counts.view();
  host.source = source.view();
  host.range = range.view();
  if (slabs_.scales.given()) host.scales.data = scales.view().data;
  const std::size_t of_expert = as_size(slab.strides[0]) * size_of(slab.dtype);
  for (std::int64_t expert = 0; expert < slab.shape[0]; ++expert) {
    const std::int64_t rows = counts.view().as<std::int32_t>()[expert];
    if (rows < 0 || rows > slab.shape[1]) return slab.shape[2];  // poison: dispatch has not come
    copy_to_host(x.data() + as_size(expert) * of_expert, slab.as<std::byte>() + as_size(expert) * of_expert,
                 as_size(rows * slab.shape[2]) * size_of(slab.dtype));
  }
  return data_->wrong_slabs(host);
}

std::int64_t GpuLowLatency::wrong(bool by_hooks) {
  for (const TensorView& view : {slabs_.x, scales_.view(), slabs_.counts, slabs_.source, slabs_.range, sums_.view()}) {
    poison(view);
  }
  by_hooks ? pair_by_hooks() : pair();
  finish();
  const HostTensor sums(sums_.view());
  return wrong_slabs() + data_->wrong_sums(sums.view().as<std::uint16_t>());
}

}  // namespace anyep::bench
