#include <algorithm>
#include <cstring>

#include "support/rank_run.h"

namespace anyep::test {
namespace {

Bytes leading_rows(const TensorView& view, std::int64_t rows) {
  const auto bytes = static_cast<std::size_t>(rows * view.shape[1]) * size_of(view.dtype);
  return {view.as<std::byte>(), view.as<std::byte>() + bytes};
}

Bytes all_of(const TensorView& view) {
  const auto bytes = static_cast<std::size_t>(view.num_elements()) * size_of(view.dtype);
  return {view.as<std::byte>(), view.as<std::byte>() + bytes};
}

std::vector<std::int64_t> ids_of(const TensorView& view) {
  std::vector<std::int64_t> ids;
  for (std::int64_t i = 0; i < view.num_elements(); ++i) {
    ids.push_back(view.dtype == DType::kI32 ? view.as<std::int32_t>()[i] : view.as<std::int64_t>()[i]);
  }
  return ids;
}

Memory memory_of(const std::vector<Memory>& per_rank, int rank) {
  return per_rank.empty() ? Memory::kTensor : per_rank[static_cast<std::size_t>(rank)];
}

}  // namespace

void RankRun::put_handle(int step) {
  const Handle& handle = *kept(step).handle;
  outputs_.put(step, "rows_until", mirror_->fetch(handle.rows_until()));
  outputs_.put(step, "place", mirror_->fetch(handle.place()));
  outputs_.put(step, "tokens", mirror_->fetch(handle.tokens()));
  if (mirror_->device() < 0) put_source(step);
}

void RankRun::put_source(int step) {
  const Handle& handle = *kept(step).handle;
  TensorView source = handle.source();
  if (source.shape[0] < handle.num_rows()) return;  // dispatch had less room
  source.shape[0] = handle.num_rows();
  outputs_.put(step, "source", mirror_->fetch(source));
  kept(step).has_source = true;
}

/// Of a handle that no dispatch has used, at the same place on every rank: one is made up.
void RankRun::put_missing_source(int step) {
  if (mirror_->device() < 0 || kept(step).has_source) return;
  constexpr std::int64_t kHidden = 16;
  const Handle& handle = *kept(step).handle;
  Tensors& tensors = *made_up_.emplace_back(std::make_unique<Tensors>());
  Rows in, out;
  in.x = tensors.add(DType::kU8, {handle.num_tokens(), kHidden});
  out.x = tensors.add(DType::kU8, {handle.num_rows(), kHidden});
  mirror_->upload(tensors);
  Options options;
  options.wait = true;
  (void)engine(step).dispatch(mirror_->at(in), handle, mirror_->at(out), stream(), options);
  put_source(step);
}

void RankRun::put_missing_sources() {
  for (int step = 0; step < static_cast<int>(kept_.size()); ++step) {
    if (kept(step).handle.has_value()) put_missing_source(step);
  }
}

void RankRun::play(int step, const RouteStep& what) {
  Kept& mine = kept(step);
  const Routing routing = routing_input(mine.in, scenario_, step, rank_);
  Shape shape;
  shape.num_experts = what.choices.num_experts;
  shape.top_k = what.choices.top_k;
  mine.record = [this, step] {
    const Handle& handle = *kept(step).handle;
    put_handle(step);
    outputs_.put_values<std::int64_t>(step, "pairs", handle.pairs_per_expert());
    outputs_.put_values<std::int64_t>(step, "pairs aligned", handle.aligned_pairs_per_expert(128));
  };
  if (is_made_by_dispatch(step)) {
    mine.in.seal();
    mirror_->upload(mine.in);
    mine.routing = routing;
    returned_.set(step, rank_);
    return;
  }
  issue(step, what.finish, [&](const Options& options) {
    mine.handle = engine(step).route(shape, mirror_->at(routing), stream(), options);
    return Event();
  });
  if (what.given != RouteStep::Given::kExperts || what.finish == Finish::kLater) return;
  const Layout layout = engine(step).layout(shape, mirror_->at(routing), stream());
  outputs_.put_values<std::int32_t>(step, "layout tokens", layout.tokens_per_rank);
  outputs_.put_values<std::int32_t>(step, "layout pairs", layout.pairs_per_expert);
  outputs_.put_values<std::uint8_t>(step, "layout token_in_rank", layout.token_in_rank);
}

void RankRun::play(int step, const AdoptStep& what) {
  put_missing_source(what.handle);
  const Handle& from = *kept(what.handle).handle;
  Kept& mine = kept(step);
  const auto copy = [&](TensorView array) {
    const std::vector<std::byte> bytes = mirror_->fetch(array);
    const TensorView here = mine.in.add(array.dtype, array.shape);
    std::copy(bytes.begin(), bytes.end(), here.as<std::byte>());
    return here;
  };
  TensorView source = from.source();
  source.shape[0] = from.num_rows();
  const HandleArrays arrays{copy(from.rows_until()), copy(from.place()), copy(source), copy(from.tokens())};
  mine.in.seal();
  if (mirror_->device() < 0) {
    mine.handle = Handle::adopt(scenario_.num_ranks, rank_, arrays);
  } else {
    mirror_->upload(mine.in);
    const HandleArrays there{mirror_->at(arrays.rows_until), mirror_->at(arrays.place), mirror_->at(arrays.source),
                             mirror_->at(arrays.tokens)};
    mine.handle = engine(step).adopt(there, nullptr, stream());
  }
  put_handle(step);
  if (mirror_->device() >= 0) {
    outputs_.put(step, "source", mirror_->fetch(mine.handle->source()));
    mine.has_source = true;
  }
}

Rows RankRun::dispatch_output(int step, const DispatchStep& what, std::int64_t num_rows) {
  Kept& mine = kept(step);
  const RouteStep& route = scenario_.route_of(what.handle);
  if (num_rows < 0) {
    num_rows =
        what.out_rows.empty() ? kept(what.handle).handle->num_rows() : what.out_rows[static_cast<std::size_t>(rank_)];
  }
  Rows out;
  if (memory_of(what.out, rank_) == Memory::kWindow) {
    Shape shape{route.choices.num_experts, route.choices.top_k, what.hidden};
    shape.dtype = what.dtype;
    shape.num_scales = what.num_scales;
    mine.window_out = engine(step).make_rows(num_rows, shape);
    out = received_in_window(step, what, mine.window_out.view());
    if (mirror_->device() < 0) {
      std::memset(out.x.data, 0xFF, static_cast<std::size_t>(out.x.num_elements()) * size_of(out.x.dtype));
    }
  } else {
    out.x = mine.out.add(what.dtype, {num_rows, what.hidden}, what.misaligned);
    if (what.num_scales > 0) out.scales = mine.out.add(what.scale_type, {num_rows, what.num_scales});
    const DType id_type = route.ids == Ids::kInt32 ? DType::kI32 : DType::kI64;
    if (what.with_experts) out.experts = mine.out.add(id_type, {num_rows, route.choices.top_k});
    if (what.with_experts && what.with_weights) {
      out.weights = mine.out.add(DType::kF32, {num_rows, route.choices.top_k});
    }
  }
  for (const std::int64_t bytes : what.extra) out.extra.push_back(mine.out.add(DType::kU8, {num_rows, bytes}));
  return out;
}

Rows RankRun::received_in_window(int step, const DispatchStep& what, const Rows& theirs) {
  Tensors& tensors = kept(step).out;
  Rows out;
  out.x = mirror_->stand_in(tensors, theirs.x);
  if (theirs.scales.given()) out.scales = mirror_->stand_in(tensors, theirs.scales);
  out.scales.dtype = what.scale_type;
  if (theirs.experts.given() && what.with_experts) out.experts = mirror_->stand_in(tensors, theirs.experts);
  if (theirs.weights.given() && what.with_experts && what.with_weights) {
    out.weights = mirror_->stand_in(tensors, theirs.weights);
  }
  return out;
}

void RankRun::put_received(int step, const DispatchStep& what, const Rows& out) {
  const std::int64_t rows = std::min(kept(what.handle).handle->num_rows(), out.x.shape[0]);
  outputs_.put(step, "x", leading_rows(out.x, rows));
  if (what.num_scales > 0) outputs_.put(step, "scales", leading_rows(out.scales, rows));
  for (std::size_t i = 0; i < out.extra.size(); ++i) {
    outputs_.put(step, "extra" + std::to_string(i), leading_rows(out.extra[i], rows));
  }
  if (what.with_experts) outputs_.put_values<std::int64_t>(step, "experts", ids_of(out.experts));
  if (what.with_experts && what.with_weights) outputs_.put(step, "weights", leading_rows(out.weights, rows));
}

void RankRun::play(int step, const DispatchStep& what) {
  Kept& mine = kept(step);
  const Rows in = dispatch_input(mine.in, scenario_, step, rank_);
  if (ahead_of(what) != Ahead::kNo && dispatch_ahead(step, what, in)) return;
  const Rows out = dispatch_output(step, what);
  mine.received_x = out.x;
  mine.record = [this, step, &what, out] {
    put_received(step, what, out);
    if (mirror_->device() >= 0 && !kept(what.handle).has_source) put_source(what.handle);
  };
  issue(step, what.finish, [&](const Options& options) {
    return engine(step).dispatch(mirror_->at(in), *kept(what.handle).handle, mirror_->at(out), stream(), options);
  });
}

TensorView RankRun::combine_rows(int step, const CombineStep& what) {
  if (what.rows_of >= 0) return kept(what.rows_of).received_x;
  Kept& mine = kept(step);
  const std::int64_t num_rows = kept(what.handle).handle->num_rows();
  TensorView x;
  if (memory_of(what.in, rank_) == Memory::kWindow) {
    const Choices& choices = scenario_.route_of(what.handle).choices;
    Shape shape{choices.num_experts, choices.top_k, what.hidden};
    shape.dtype = what.dtype;
    mine.window_in = engine(step).make_rows(num_rows + what.surplus_rows, shape);
    x = mirror_->stand_in(mine.in, mine.window_in.view().x);
    std::memset(x.data, 0xFF, static_cast<std::size_t>(x.num_elements()) * size_of(x.dtype));
  } else {
    x = mine.in.add(what.dtype, {num_rows + what.surplus_rows, what.hidden}, what.misaligned);
  }
  fill_combine_rows(scenario_, step, rank_, num_rows, x);
  return x;
}

void RankRun::play(int step, const CombineStep& what) {
  Kept& mine = kept(step);
  const Handle& handle = *kept(what.handle).handle;
  CombineInput in = combine_sides(mine.in, scenario_, step, rank_, handle.num_rows(), handle.num_tokens());
  in.x = combine_rows(step, what);
  Rows out;
  out.x = mine.out.add(what.dtype, {handle.num_tokens(), what.hidden}, what.misaligned);
  if (what.weights > 0) out.weights = mine.out.add(DType::kF32, {handle.num_tokens(), what.weights});
  mine.record = [this, step, out] {
    outputs_.put(step, "x", all_of(out.x));
    if (out.weights.given()) outputs_.put(step, "weights", all_of(out.weights));
  };
  issue(step, what.finish, [&](const Options& options) {
    return engine(step).combine(mirror_->at(in), handle, mirror_->at(out), stream(), options);
  });
}

}  // namespace anyep::test
