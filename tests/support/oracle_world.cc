#include <algorithm>

#include "reference/high_throughput.h"
#include "reference/low_latency.h"
#include "reference/routing.h"
#include "support/inputs.h"
#include "support/world.h"

namespace anyep::test {
namespace {

using reference::Route;

class Oracle {
 public:
  explicit Oracle(const Scenario& scenario)
      : scenario_(scenario),
        outputs_(static_cast<std::size_t>(scenario.num_ranks)),
        routes_(scenario.steps.size()),
        received_(scenario.steps.size()),
        slabs_(scenario.steps.size()) {}

  Outputs play() {
    for (int step = 0; step < static_cast<int>(scenario_.steps.size()); ++step) {
      const Step& each = scenario_.steps[static_cast<std::size_t>(step)];
      std::visit([&](const auto& what) { play(step, what); }, each.what);
      if (each.pace.held >= 0) out(each.pace.held).put_text(step, "released", "by the other rank");
      for (int rank = 0; each.pace.after_manual && rank < scenario_.num_ranks; ++rank) {
        out(rank).put_text(step, "before the event", "waiting");
      }
    }
    for (int rank = 0; scenario_.counts_ids && rank < scenario_.num_ranks; ++rank) {
      out(rank).put_text(static_cast<int>(scenario_.steps.size()), "ids out of range", std::to_string(strays(rank)));
    }
    return std::move(outputs_);
  }

 private:
  std::uint64_t strays(int rank) const {
    std::uint64_t count = 0;
    for (const std::vector<Route>& routes : routes_) {
      if (!routes.empty()) count += routes[static_cast<std::size_t>(rank)].ids_out_of_range;
    }
    return count;
  }

  RankOutputs& out(int rank) { return outputs_[static_cast<std::size_t>(rank)]; }
  std::vector<Route>& routes(int step) { return routes_[static_cast<std::size_t>(step)]; }

  void put_route(int step) {
    for (const Route& route : routes(step)) {
      RankOutputs& to = out(route.rank);
      to.put_values<std::int32_t>(step, "rows_until", route.rows_until);
      to.put_values<std::int32_t>(step, "place", route.place);
      to.put_values<std::int32_t>(step, "source", route.source);
      to.put_values<std::int32_t>(step, "tokens", route.tokens);
    }
  }

  void play(int step, const RouteStep& what) {
    Tensors tensors;
    std::vector<Routing> routing;
    for (int rank = 0; rank < scenario_.num_ranks; ++rank) {
      routing.push_back(routing_input(tensors, scenario_, step, rank));
    }
    routes(step) = reference::route(what.choices.num_experts, routing);
    put_route(step);
    for (const Route& route : routes(step)) {
      out(route.rank).put_values<std::int64_t>(step, "pairs", route.pairs_per_expert);
      std::vector<std::int64_t> aligned;
      for (const std::int64_t pairs : route.pairs_per_expert) aligned.push_back((pairs + 127) / 128 * 128);
      out(route.rank).put_values<std::int64_t>(step, "pairs aligned", aligned);
    }
    if (what.given != RouteStep::Given::kExperts || what.finish == Finish::kLater) return;
    for (int rank = 0; rank < scenario_.num_ranks; ++rank) {
      const Layout layout =
          reference::layout(scenario_.num_ranks, what.choices.num_experts, routing[static_cast<std::size_t>(rank)]);
      out(rank).put_values<std::int32_t>(step, "layout tokens", layout.tokens_per_rank);
      out(rank).put_values<std::int32_t>(step, "layout pairs", layout.pairs_per_expert);
      out(rank).put_values<std::uint8_t>(step, "layout token_in_rank", layout.token_in_rank);
    }
  }

  void play(int step, const AdoptStep& what) {
    routes(step) = routes(what.handle);
    put_route(step);
  }

  void play(int step, const DispatchStep& what) {
    Tensors tensors;
    std::vector<Rows> in;
    for (int rank = 0; rank < scenario_.num_ranks; ++rank) {
      in.push_back(dispatch_input(tensors, scenario_, step, rank));
    }
    auto& received = received_[static_cast<std::size_t>(step)];
    received = reference::dispatch(routes(what.handle), in, what.out_rows);
    for (int rank = 0; rank < scenario_.num_ranks; ++rank) {
      const reference::ReceivedRows& rows = received[static_cast<std::size_t>(rank)];
      RankOutputs& to = out(rank);
      to.put(step, "x", rows.x);
      if (what.num_scales > 0) to.put(step, "scales", rows.scales);
      for (std::size_t i = 0; i < rows.extra.size(); ++i) to.put(step, "extra" + std::to_string(i), rows.extra[i]);
      if (what.with_experts) to.put_values<std::int64_t>(step, "experts", rows.experts);
      if (what.with_experts && what.with_weights) to.put_values<float>(step, "weights", rows.weights);
      const std::int64_t need = routes(what.handle)[static_cast<std::size_t>(rank)].num_rows;
      if (rows.num_rows < need) {
        to.put_text(step, "error", "kCapacity need " + std::to_string(need) + " have " + std::to_string(rows.num_rows));
      }
    }
  }

  void play(int step, const CombineStep& what) {
    Tensors tensors;
    std::vector<CombineInput> in;
    const std::vector<Route>& routed = routes(what.handle);
    for (int rank = 0; rank < scenario_.num_ranks; ++rank) {
      const Route& route = routed[static_cast<std::size_t>(rank)];
      CombineInput& mine =
          in.emplace_back(combine_sides(tensors, scenario_, step, rank, route.num_rows, route.num_tokens));
      if (what.rows_of >= 0) {
        const auto& rows = received_[static_cast<std::size_t>(what.rows_of)][static_cast<std::size_t>(rank)];
        mine.x = TensorView::dense(rows.x.data(), what.dtype, {rows.num_rows, what.hidden});
      } else {
        mine.x = tensors.add(what.dtype, {route.num_rows + what.surplus_rows, what.hidden});
        fill_combine_rows(scenario_, step, rank, route.num_rows, mine.x);
      }
    }
    const auto combined = reference::combine(routed, in);
    for (int rank = 0; rank < scenario_.num_ranks; ++rank) {
      out(rank).put(step, "x", combined[static_cast<std::size_t>(rank)].x);
      if (what.weights > 0)
        out(rank).put_values<float>(step, "weights", combined[static_cast<std::size_t>(rank)].weights);
    }
  }

  void play(int step, const LowLatencyDispatchStep& what) {
    Tensors tensors;
    std::vector<Routing> routing;
    std::vector<TensorView> x;
    for (int rank = 0; rank < scenario_.num_ranks; ++rank) {
      routing.push_back(low_latency_routing(tensors, scenario_, step, rank));
      x.push_back(low_latency_x(tensors, scenario_, step, rank));
    }
    auto& slabs = slabs_[static_cast<std::size_t>(step)];
    slabs = reference::low_latency_dispatch(scenario_.shape_of(what), x, routing, {what.wire, what.round_scale});
    for (int rank = 0; rank < scenario_.num_ranks; ++rank) put_slabs(step, what, rank);
  }

  void put_slabs(int step, const LowLatencyDispatchStep& what, int rank) {
    const reference::Slabs& slabs = slabs_[static_cast<std::size_t>(step)][static_cast<std::size_t>(rank)];
    const std::size_t row_bytes = static_cast<std::size_t>(what.hidden) * (what.wire == Wire::kBF16 ? 2 : 1);
    const std::int64_t columns = reference::scale_columns(what.wire, what.hidden);
    RankOutputs& to = out(rank);
    Bytes x, scales;
    std::vector<std::int32_t> source;
    std::vector<std::int32_t> received;
    for (std::int64_t expert = 0; expert < slabs.local_experts; ++expert) {
      const std::int32_t count = slabs.counts[static_cast<std::size_t>(expert)];
      for (std::int64_t row = 0; row < count; ++row) {
        const std::int64_t at = expert * slabs.rows_per_expert + row;
        const std::byte* from = slabs.x.data() + static_cast<std::size_t>(at) * row_bytes;
        x.insert(x.end(), from, from + row_bytes);
        source.push_back(slabs.source[static_cast<std::size_t>(at)]);
        for (std::int64_t column = 0; column < columns; ++column) {
          const std::byte* scale =
              slabs.scales.data() + 4 * ((expert * columns + column) * slabs.rows_per_expert + row);
          scales.insert(scales.end(), scale, scale + 4);
        }
      }
      received.push_back(count + 1000 + static_cast<std::int32_t>(expert));
    }
    to.put(step, "x", std::move(x));
    if (columns > 0) to.put(step, "scales", std::move(scales));
    to.put_values<std::int32_t>(step, "counts", slabs.counts);
    to.put_values<std::int32_t>(step, "source", source);
    to.put_values<std::int64_t>(step, "range", slabs.range);
    if (what.statistics) {
      to.put_values<std::int32_t>(step, "received", received);
      to.put_text(step, "waited", "added");
    }
  }

  void play(int step, const LowLatencyCombineStep& what) {
    Tensors tensors;
    std::vector<Routing> routing;
    std::vector<ExpertSlabs> in;
    const Shape shape = scenario_.shape_of(what);
    const std::int64_t rows = scenario_.num_ranks * shape.max_tokens;
    for (int rank = 0; rank < scenario_.num_ranks; ++rank) {
      const auto& slabs = slabs_[static_cast<std::size_t>(what.dispatch)][static_cast<std::size_t>(rank)];
      routing.push_back(low_latency_routing(tensors, scenario_, what.dispatch, rank));
      ExpertSlabs& mine = in.emplace_back();
      mine.x = tensors.add(DType::kBF16, {slabs.local_experts, rows, shape.hidden});
      fill_slab(scenario_, step, rank, slabs.counts, mine.x);
      mine.source = TensorView::dense(slabs.source.data(), DType::kI32, {slabs.local_experts, rows});
      mine.range = TensorView::dense(slabs.range.data(), DType::kI64, {slabs.local_experts, scenario_.num_ranks});
    }
    const auto combined = reference::low_latency_combine(shape, in, routing, {what.wire, scenario_.exact_combine});
    for (int rank = 0; rank < scenario_.num_ranks; ++rank) {
      out(rank).put(step, "x", combined[static_cast<std::size_t>(rank)]);
      if (what.statistics) out(rank).put_text(step, "waited", "added");
    }
  }

  void play(int, const ReceiveStep&) {}
  void play(int, const WaitStep&) {}
  void play(int, const BarrierStep&) {}
  void play(int, const ZeroStep&) {}
  void play(int, const CloseStep&) {}

  const Scenario& scenario_;
  Outputs outputs_;
  std::vector<std::vector<Route>> routes_;
  std::vector<std::vector<reference::ReceivedRows>> received_;
  std::vector<std::vector<reference::Slabs>> slabs_;
};

}  // namespace

Outputs oracle_outputs(const Scenario& scenario) {
  return Oracle(scenario).play();
}

}  // namespace anyep::test
