// Fresh dispatches: on a GPU the rows move before the host knows how many there are.
//
//   choice    Rows were made ahead (by the caller, or because the window has free room for a guess of their number): notify and
//             dispatch follow each other on the stream; the host waits for the counts meanwhile and cuts the rows to size.
//             Else: route, wait, rows of exact size, dispatch.
//   peers     see the same two calls either way, and each rank chooses for itself: a sender writes to no receiver before its
//             grant, which says where the rows lie and for how many there is room.
//   surplus   A guess that was too small costs a launch: it finds more rows than room, grants and sends nothing and takes no
//             turn. The dispatch that follows has the room, and the same number among the calls.
#include <anyep/engine.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <thread>
#include <utility>

#include "backend/engine_core.h"
#include "core/check.h"
#include "protocol/platform.h"

namespace anyep {
namespace {

/// The first rows of all fields.
Rows front_of(Rows rows, std::int64_t num_rows) {
  const auto cut = [num_rows](TensorView& view) {
    if (view.given()) view.shape[0] = num_rows;
  };
  for (TensorView* const view : {&rows.x, &rows.scales, &rows.experts, &rows.weights}) cut(*view);
  for (TensorView& view : rows.extra) cut(view);
  return rows;
}

/// What make_rows() needs to know of rows like x.
Shape shape_like(const Rows& x, const Shape& shape) {
  Shape made;
  made.num_experts = shape.num_experts;
  made.top_k = x.experts.given() && x.experts.shape.dims == 2 ? static_cast<int>(x.experts.shape[1]) : 0;
  made.hidden = x.x.shape.dims == 2 ? x.x.shape[1] : 0;
  made.dtype = x.x.dtype;
  made.num_scales = x.scales.given() && x.scales.shape.dims == 2 ? static_cast<int>(x.scales.shape[1]) : 0;
  return made;
}

/// Fields that do not travel are left out; the elements of scales have x's name.
Rows outputs_for(const Rows& x, Rows rows) {
  if (rows.scales.given() && x.scales.given()) rows.scales.dtype = x.scales.dtype;
  if (!x.experts.given()) rows.experts = {};
  if (!x.weights.given()) rows.weights = {};
  return rows;
}

Options without_after(Options options) {
  options.after.clear();  // the route has awaited them
  return options;
}

}  // namespace

void Engine::Core::settle(const Call& call, const backend::DispatchCall& dispatch, Fresh& fresh) {
  const Handle::State& handle = *dispatch.handle;
  const std::uint64_t begin = protocol::now_ns();
  try {
    handle.routed->wait();
  } catch (const Error&) {
    seen = true;
    throw;
  }
  fresh.waited_ns = protocol::now_ns() - begin;
  backend->settle(dispatch);
  most_tokens = *std::max_element(handle.tokens.begin(), handle.tokens.end());
  fresh.dispatched = handle.num_rows() <= dispatch.room;
  if (!fresh.dispatched) number = protocol::previous_epoch(call.number);
}

std::int64_t Engine::rows_ahead(std::int64_t num_tokens) const {
  return core_->limits.num_ranks * std::max(num_tokens, core_->most_tokens);
}

OwnedRows Engine::make_rows_ahead(std::int64_t num_rows, const Shape& shape, StreamRef stream) {
  std::optional<Core::Entry> entry;
  if (core_->making_rows != std::this_thread::get_id()) entry.emplace(*core_, "make_rows");
  const bool countable = num_rows > 0 && num_rows <= INT32_MAX && shape.hidden > 0 && shape.hidden <= INT32_MAX;
  return OwnedRows(countable ? core_->backend->make_rows_if_free(num_rows, shape, stream) : nullptr);
}

Fresh Engine::dispatch_fresh(const Shape& shape, const Routing& routing, const Rows& x, StreamRef stream,
                             const Options& options) {
  const Shape made = shape_like(x, shape);
  OwnedRows ahead;
  const auto make_ahead = [&] {
    if (!core_->limits.on_device || x.x.shape.dims != 2) return Rows();
    ahead = make_rows_ahead(rows_ahead(x.x.shape[0]), made, stream);
    return ahead.num_rows() > 0 ? outputs_for(x, ahead.view()) : Rows();
  };
  Fresh fresh = dispatch_fresh(shape, routing, x, make_ahead, Surplus::kMovesLater, stream, options);
  const std::int64_t num_rows = fresh.handle.num_rows();
  if (fresh.dispatched) {
    ahead.keep_front(num_rows);
    fresh.rows = std::move(ahead);
    return fresh;
  }
  ahead = OwnedRows();  // before as much is taken again
  fresh.rows = make_rows(num_rows, made, stream);
  fresh.event = dispatch(x, fresh.handle, outputs_for(x, fresh.rows.view()), stream, without_after(options));
  fresh.dispatched = true;
  return fresh;
}

Fresh Engine::dispatch_fresh(const Shape& shape, const Routing& routing, const Rows& x, const Rows& out,
                             Surplus surplus, StreamRef stream, const Options& options) {
  return dispatch_fresh(
      shape, routing, x, [&] { return out; }, surplus, stream, options);
}

Rows Engine::Core::rows_or_refusal(const std::function<Rows()>& make, StreamRef stream, const Options& options) {
  try {
    return make();
  } catch (const Error& error) {
    Entry entry(*this, "dispatch");
    throw refused(next_call(Op::kDispatch, stream, options), error);
  }
}

Rows Engine::Core::rows_of(const std::function<Rows()>& make) {
  struct Making {
    explicit Making(Core& of) : core(of) { core.making_rows = std::this_thread::get_id(); }
    ~Making() { core.making_rows = std::thread::id(); }
    Core& core;
  };
  const Making making(*this);
  return make();
}

Fresh Engine::dispatch_fresh(const Shape& shape, const Routing& routing, const Rows& x,
                             const std::function<Rows()>& out, Surplus surplus, StreamRef stream,
                             const Options& options) {
  Fresh fresh;
  if (!core_->limits.on_device) {
    fresh.handle = route(shape, routing, stream, options);
    const Rows made = core_->rows_or_refusal(out, stream, options);
    if (!made.x.given()) {
      fresh.dispatched = false;
    } else if (surplus == Surplus::kMovesLater) {
      const Fresh sent = dispatch_ahead(x, fresh.handle, made, stream, without_after(options));
      fresh.event = sent.event;
      fresh.dispatched = sent.dispatched;
    } else {
      fresh.event = dispatch(x, fresh.handle, made, stream, without_after(options));
    }
    return fresh;
  }
  Core::Entry entry(*core_, "dispatch");
  Call route_call = core_->next_call(Op::kRoute, stream, options);
  const backend::RouteCall route = core_->checked_route(route_call, shape, routing, options);
  Call call = core_->next_call(Op::kDispatch, stream, options);
  backend::DispatchCall dispatch;
  backend::Backend::DispatchLater later{surplus == Surplus::kMovesLater, {}};
  later.make = [&]() -> const backend::DispatchCall* {
    const Rows made = core_->rows_of(out);
    if (!made.x.given()) {
      fresh.dispatched = false;
      return nullptr;
    }
    dispatch = core_->checked_dispatch(call, x, route.handle, made);
    dispatch.whole_or_nothing = later.whole_or_nothing;
    return &dispatch;
  };
  try {
    core_->hold_back_stream(options.after, route_call);
    core_->launch([&] { core_->backend->route_and_dispatch(route_call, route, call, later); });
  } catch (const Error& error) {
    if (!spares_the_engine(error.code)) throw;
    if (route.handle->routed != nullptr) throw core_->refused(call, error);
    core_->number = route_call.number;
    throw core_->refused(route_call, error);
  }
  fresh.handle = Handle(route.handle);
  fresh.event = Event(core_->backend->record(fresh.dispatched ? call : route_call));
  if (!fresh.dispatched) {
    core_->number = route_call.number;
    return fresh;
  }
  if (dispatch.whole_or_nothing) core_->settle(call, dispatch, fresh);
  if (options.wait && fresh.dispatched) fresh.event.wait();
  return fresh;
}

Fresh Engine::dispatch_ahead(const Rows& x, const Handle& handle, const Rows& out, StreamRef stream,
                             const Options& options) {
  Fresh fresh;
  const std::shared_ptr<Handle::State>& state = handle.state_;
  if (!core_->limits.on_device || state == nullptr || handle.has_counts()) {
    fresh.dispatched = state == nullptr || !out.x.given() || handle.num_rows() <= out.x.shape[0];
    if (!fresh.dispatched) return fresh;
    const Rows exact = state == nullptr ? out : front_of(out, handle.num_rows());
    fresh.event = dispatch(x, handle, exact, stream, options);
    return fresh;
  }
  Core::Entry entry(*core_, "dispatch");
  Call call = core_->next_call(Op::kDispatch, stream, options);
  backend::DispatchCall dispatch =
      core_->checked(call, options, [&] { return core_->checked_dispatch(call, x, state, out); });
  dispatch.whole_or_nothing = true;
  Options launched = options;
  launched.wait = false;
  fresh.event = core_->submit(call, launched, [&] { core_->backend->dispatch(call, dispatch); });
  core_->settle(call, dispatch, fresh);
  if (options.wait && fresh.dispatched) fresh.event.wait();
  return fresh;
}

}  // namespace anyep
