#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "support/rank_run.h"

namespace anyep::test {
namespace {

constexpr std::int32_t kReceivedBefore = 1000;  // what statistics hold before an op adds to them
constexpr std::int64_t kWaitedBefore = 5;

LowLatencyOptions with(const Options& options, bool hook, Wire wire) {
  LowLatencyOptions more;
  static_cast<Options&>(more) = options;
  if (hook) more.wait = false;
  more.hook = hook;
  more.wire = wire;
  return more;
}

std::int64_t scale_columns(const LowLatencyDispatchStep& what) {
  if (what.wire == Wire::kFP8) return (what.hidden + 127) / 128;
  return what.wire == Wire::kUE8M0 ? (what.hidden + 511) / 512 : 0;
}

int local_experts(int num_experts, int num_ranks, int rank) {
  return num_experts / num_ranks + (rank < num_experts % num_ranks ? 1 : 0);
}

}  // namespace

ExpertSlabs RankRun::slabs_for(int step, const LowLatencyDispatchStep& what) {
  Tensors& out = kept(step).out;
  const std::int64_t local = local_experts(what.choices.num_experts, scenario_.num_ranks, rank_);
  const std::int64_t rows = scenario_.num_ranks * scenario_.shape_of(what).max_tokens;
  const std::int64_t columns = scale_columns(what);
  ExpertSlabs slabs;
  slabs.x = out.add(what.wire == Wire::kBF16 ? DType::kBF16 : DType::kF8E4M3, {local, rows, what.hidden});
  if (columns > 0) {
    slabs.scales = out.add(what.wire == Wire::kFP8 ? DType::kF32 : DType::kI32, {local, rows, columns});
    slabs.scales.strides = {columns * rows, 1, rows};
  }
  slabs.counts = out.add(DType::kI32, {local});
  slabs.source = out.add(DType::kI32, {local, rows});
  slabs.range = out.add(DType::kI64, {local, scenario_.num_ranks});
  // Combine on GPUs finds rows by itself where a handle lacks the table.
  if (step % 4 < 2) {
    slabs.rows = out.add(DType::kI32, {scenario_.num_ranks, scenario_.shape_of(what).max_tokens, what.choices.top_k});
  }
  return slabs;
}

void RankRun::put_slabs(int step, const LowLatencyDispatchStep& what) {
  const ExpertSlabs& slabs = kept(step).slabs;
  const std::int64_t rows = slabs.source.shape[1];
  const std::size_t row_bytes = static_cast<std::size_t>(what.hidden) * size_of(slabs.x.dtype);
  const std::int64_t columns = scale_columns(what);
  Bytes x, scales;
  std::vector<std::int32_t> source;
  const std::span counts(slabs.counts.as<std::int32_t>(), static_cast<std::size_t>(slabs.counts.shape[0]));
  for (std::int64_t expert = 0; expert < slabs.counts.shape[0]; ++expert) {
    const std::int64_t count = std::clamp<std::int64_t>(counts[static_cast<std::size_t>(expert)], 0, rows);
    for (std::int64_t row = 0; row < count; ++row) {
      const std::byte* from = slabs.x.as<std::byte>() + static_cast<std::size_t>(expert * rows + row) * row_bytes;
      x.insert(x.end(), from, from + row_bytes);
      source.push_back(slabs.source.as<std::int32_t>()[expert * rows + row]);
      for (std::int64_t column = 0; column < columns; ++column) {
        const std::byte* scale = slabs.scales.as<std::byte>() + 4 * ((expert * columns + column) * rows + row);
        scales.insert(scales.end(), scale, scale + 4);
      }
    }
  }
  outputs_.put(step, "x", std::move(x));
  if (columns > 0) outputs_.put(step, "scales", std::move(scales));
  outputs_.put_values<std::int32_t>(step, "counts", counts);
  outputs_.put_values<std::int32_t>(step, "source", source);
  const std::span range(slabs.range.as<std::int64_t>(), static_cast<std::size_t>(slabs.range.num_elements()));
  outputs_.put_values<std::int64_t>(step, "range", range);
}

TensorView RankRun::waited_statistics(int step) {
  const TensorView waited = kept(step).out.add(DType::kI64, {scenario_.num_ranks});
  std::fill_n(waited.as<std::int64_t>(), scenario_.num_ranks, kWaitedBefore);
  return waited;
}

void RankRun::put_waited(int step, const TensorView& waited) {
  const std::int64_t hour = std::int64_t{3600} * 1'000'000'000;
  const bool sane = std::all_of(waited.as<std::int64_t>(), waited.as<std::int64_t>() + scenario_.num_ranks,
                                [&](std::int64_t ns) { return ns >= kWaitedBefore && ns < hour; });
  outputs_.put_text(step, "waited", sane ? "added" : "not added to what was there");
}

void RankRun::play(int step, const LowLatencyDispatchStep& what) {
  Kept& mine = kept(step);
  const Routing routing = low_latency_routing(mine.in, scenario_, step, rank_);
  const TensorView x = low_latency_x(mine.in, scenario_, step, rank_);
  mine.slabs = slabs_for(step, what);
  TensorView received, waited;
  if (what.statistics) {
    received = mine.out.add(DType::kI32, {mine.slabs.counts.shape[0]});
    for (std::int64_t i = 0; i < received.shape[0]; ++i) {
      received.as<std::int32_t>()[i] = kReceivedBefore + static_cast<std::int32_t>(i);
    }
    waited = waited_statistics(step);
  }
  mine.record = [this, step, &what, received, waited] {
    put_slabs(step, what);
    if (!what.statistics) return;
    outputs_.put_values<std::int32_t>(
        step, "received", std::span(received.as<std::int32_t>(), static_cast<std::size_t>(received.shape[0])));
    put_waited(step, waited);
  };
  issue(step, what.hook ? Finish::kLater : what.finish, [&](const Options& options) {
    LowLatencyOptions more = with(options, what.hook, what.wire);
    more.round_scale = what.round_scale;
    more.received = mirror_->at(received);
    more.waited = mirror_->at(waited);
    mine.pending = engine(step).low_latency_dispatch(scenario_.shape_of(what), mirror_->at(x), mirror_->at(routing),
                                                     mirror_->at(mine.slabs), stream(), more);
    return what.hook ? Event() : mine.pending->receive(stream());
  });
}

void RankRun::play(int step, const LowLatencyCombineStep& what) {
  Kept& mine = kept(step);
  const Shape shape = scenario_.shape_of(what);
  const ExpertSlabs& dispatched = kept(what.dispatch).slabs;
  const std::int64_t local = dispatched.counts.shape[0];
  const std::span counts(dispatched.counts.as<std::int32_t>(), static_cast<std::size_t>(local));
  const Routing routing = low_latency_routing(mine.in, scenario_, what.dispatch, rank_);
  const Extents slab_shape = {local, scenario_.num_ranks * shape.max_tokens, shape.hidden};

  ExpertSlabs in = dispatched;
  in.scales = {};
  if (what.zero_copy) {
    fill_slab(scenario_, step, rank_, counts, mirror_->stand_in(mine.in, engine(step).combine_buffer(shape)));
    in.x = TensorView::dense(nullptr, DType::kBF16, slab_shape);
  } else {
    in.x = mine.in.add(DType::kBF16, slab_shape);
    fill_slab(scenario_, step, rank_, counts, in.x);
  }
  const TensorView out = mine.out.add(DType::kBF16, {routing.experts.shape[0], shape.hidden});
  TensorView waited;
  if (what.statistics) waited = waited_statistics(step);
  mine.record = [this, step, out, waited] {
    const auto* data = out.as<std::uint16_t>();
    outputs_.put_values<std::uint16_t>(step, "x", std::span(data, static_cast<std::size_t>(out.num_elements())));
    if (waited.given()) put_waited(step, waited);
  };
  issue(step, what.hook ? Finish::kLater : what.finish, [&](const Options& options) {
    LowLatencyOptions more = with(options, what.hook, what.wire);
    more.zero_copy = what.zero_copy;
    more.waited = mirror_->at(waited);
    ExpertSlabs there = mirror_->at(in);
    if (what.zero_copy) there.x = in.x;
    mine.pending =
        engine(step).low_latency_combine(shape, there, mirror_->at(routing), mirror_->at(out), stream(), more);
    return what.hook ? Event() : mine.pending->receive(stream());
  });
}

}  // namespace anyep::test
