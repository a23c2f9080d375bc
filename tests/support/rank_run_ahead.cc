// Dispatches that do not wait for the number of their rows.
#include <utility>

#include "support/rank_run.h"

namespace anyep::test {
namespace {

bool makes_the_route(Ahead ahead) {
  return ahead == Ahead::kOwnRows || ahead == Ahead::kGivenRows || ahead == Ahead::kNoRoom;
}

Rows front_of(Rows rows, std::int64_t num_rows) {
  for (TensorView* const view : {&rows.x, &rows.scales, &rows.experts, &rows.weights}) {
    if (view->given()) view->shape[0] = num_rows;
  }
  for (TensorView& view : rows.extra) view.shape[0] = num_rows;
  return rows;
}

}  // namespace

Ahead RankRun::ahead_of(const DispatchStep& what) const {
  return what.ahead.empty() ? Ahead::kNo : what.ahead[static_cast<std::size_t>(rank_)];
}

bool RankRun::is_made_by_dispatch(int route_step) const {
  const auto next = static_cast<std::size_t>(route_step) + 1;
  if (next >= scenario_.steps.size()) return false;
  const auto* const dispatch = std::get_if<DispatchStep>(&scenario_.steps[next].what);
  return dispatch != nullptr && dispatch->handle == route_step && makes_the_route(ahead_of(*dispatch));
}

bool RankRun::dispatch_ahead(int step, const DispatchStep& what, const Rows& in) {
  Kept& mine = kept(step);
  Kept& route = kept(what.handle);
  const Ahead ahead = ahead_of(what);
  const RouteStep& route_step = scenario_.route_of(what.handle);
  Shape shape;
  shape.num_experts = route_step.choices.num_experts;
  shape.top_k = route_step.choices.top_k;

  Rows out;
  if (ahead != Ahead::kOwnRows) {
    const bool none = ahead == Ahead::kNoRoom || ahead == Ahead::kBehindNoRoom;
    out = dispatch_output(step, what, none ? 0 : scenario_.num_ranks * route_step.choices.most_tokens());
  }
  bool dispatched = false;
  mine.record = [&] {
    if (!dispatched) return;
    mine.received_x = out.x;
    put_received(step, what, out);
    if (mirror_->device() >= 0 && !route.has_source) put_source(what.handle);
  };
  issue(step, what.finish, [&](const Options& options) {
    Engine& with = engine(step);
    Fresh fresh;
    if (ahead == Ahead::kOwnRows) {
      fresh = with.dispatch_fresh(shape, mirror_->at(*route.routing), mirror_->at(in), stream(), options);
      mine.window_out = std::move(fresh.rows);
      out = received_in_window(step, what, mine.window_out.view());
    } else if (makes_the_route(ahead)) {
      fresh = with.dispatch_fresh(shape, mirror_->at(*route.routing), mirror_->at(in), mirror_->at(out),
                                  Surplus::kMovesLater, stream(), options);
    } else {
      fresh = with.dispatch_ahead(mirror_->at(in), *route.handle, mirror_->at(out), stream(), options);
    }
    if (makes_the_route(ahead)) route.handle = std::move(fresh.handle);
    dispatched = fresh.dispatched;
    if (dispatched) out = front_of(out, route.handle->num_rows());
    return fresh.event;
  });
  return dispatched;
}

}  // namespace anyep::test
