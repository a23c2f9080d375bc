// Engine. Arguments come in the order of the C++ structs, arrays as Views or as they are; engine.py gives them names, defaults and
// outputs.
#include <anyep/engine.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "native.h"

namespace anyep::python {
namespace {

Engine create(Bootstrap& bootstrap, int device, std::int64_t rows_bytes, std::int64_t low_latency_bytes,
              int max_experts, bool masks, const Tuning& tuning) {
  const Budget budget{rows_bytes, low_latency_bytes, max_experts, masks};
  const auto limit = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<double, std::nano>(
      static_cast<double>(tuning.startup_timeout.count()) * tuning.time_scale));
  Topology topology = Topology::discover(bootstrap, std::chrono::steady_clock::now() + limit);
  topology.device = device;
  return Engine::create(budget, topology, tuning, bootstrap);
}

ArrayReader reader_of(const Engine& engine, const char* op) {
  return {op, engine.topology().device};
}

Routing routing_of(const ArrayReader& read, nb::handle experts, nb::handle ranks, nb::handle pairs_per_expert) {
  return {read.optional("experts", experts),
          read.optional("ranks", ranks),
          read.optional("pairs_per_expert", pairs_per_expert),
          {}};
}

Rows rows_in(const ArrayReader& read, nb::handle x, nb::handle scales, nb::handle experts, nb::handle weights,
             nb::handle extra) {
  return {read("x", x), read.optional("scales", scales), read.optional("experts", experts),
          read.optional("weights", weights), read.all("extra", extra)};
}

Rows rows_out(const ArrayReader& read, nb::handle x, nb::handle scales, nb::handle experts, nb::handle weights,
              nb::handle extra) {
  return {read("out.x", x), read.optional("out.scales", scales), read.optional("out.experts", experts),
          read.optional("out.weights", weights), read.all("out.extra", extra)};
}

SharedHandle route(Engine& engine, int num_experts, int top_k, nb::handle experts, nb::handle ranks,
                   nb::handle pairs_per_expert, std::uintptr_t stream, double timeout_s, std::vector<Event> after,
                   bool wait) {
  const Routing routing = routing_of(reader_of(engine, "route"), experts, ranks, pairs_per_expert);
  Shape shape;
  shape.num_experts = num_experts;
  shape.top_k = top_k;
  const nb::gil_scoped_release release;
  return SharedHandle(
      engine.route(shape, routing, stream_ref(stream), make_options(timeout_s, 0, std::move(after), wait)));
}

Event dispatch(Engine& engine, const SharedHandle& handle, nb::handle x, nb::handle scales, nb::handle experts,
               nb::handle weights, nb::handle extra, nb::handle out_x, nb::handle out_scales, nb::handle out_experts,
               nb::handle out_weights, nb::handle out_extra, std::uintptr_t stream, double timeout_s, int num_sms,
               std::vector<Event> after, bool wait) {
  const ArrayReader read = reader_of(engine, "dispatch");
  const Rows in = rows_in(read, x, scales, experts, weights, extra);
  const Rows out = rows_out(read, out_x, out_scales, out_experts, out_weights, out_extra);
  const nb::gil_scoped_release release;
  return engine.dispatch(in, *handle, out, stream_ref(stream),
                         make_options(timeout_s, num_sms, std::move(after), wait));
}

/// Outputs that Python makes inside a call, x first: as in rows_out(). Where it raises instead, no rows move, and the call's end
/// raises the same.
class MadeRows {
 public:
  MadeRows(const ArrayReader& read, nb::handle make) : read_(read), make_(make) {}

  Rows operator()() {
    const nb::gil_scoped_acquire acquire;
    try {
      made_ = make_();
      return made_.is_none() ? Rows() : rows_out(read_, made_[0], made_[1], made_[2], made_[3], made_[4]);
    } catch (nb::python_error& error) {
      raised_.emplace(std::move(error));
      return {};
    }
  }

  void raise() {
    if (raised_) throw nb::python_error(std::move(*raised_));
  }

 private:
  const ArrayReader& read_;
  nb::handle make_;
  nb::object made_;
  std::optional<nb::python_error> raised_;
};

/// Route and dispatch as one: the handle, the event, and whether rows move. `out` makes x, scales, experts, weights, extra
/// while the counts are on their way; None: no rows move.
nb::tuple dispatch_fresh(Engine& engine, int num_experts, int top_k, nb::handle routed_experts, nb::handle ranks,
                         nb::handle pairs_per_expert, nb::handle x, nb::handle scales, nb::handle experts,
                         nb::handle weights, nb::handle extra, nb::handle out, bool drop_surplus, std::uintptr_t stream,
                         double timeout_s, int num_sms, std::vector<Event> after) {
  const Routing routing = routing_of(reader_of(engine, "route"), routed_experts, ranks, pairs_per_expert);
  const ArrayReader read = reader_of(engine, "dispatch");
  const Rows in = rows_in(read, x, scales, experts, weights, extra);
  Shape shape;
  shape.num_experts = num_experts;
  shape.top_k = top_k;
  MadeRows made(read, out);
  const auto run = [&] {
    const nb::gil_scoped_release release;
    return engine.dispatch_fresh(
        shape, routing, in, [&made] { return made(); }, drop_surplus ? Surplus::kDropped : Surplus::kMovesLater,
        stream_ref(stream), make_options(timeout_s, num_sms, std::move(after), false));
  };
  Fresh fresh = run();
  made.raise();
  return nb::make_tuple(SharedHandle(std::move(fresh.handle)), fresh.event, fresh.dispatched);
}

/// Behind a route whose counts the host may not know: the event, and whether rows move.
nb::tuple dispatch_ahead(Engine& engine, const SharedHandle& handle, nb::handle x, nb::handle scales,
                         nb::handle experts, nb::handle weights, nb::handle extra, nb::handle out_x,
                         nb::handle out_scales, nb::handle out_experts, nb::handle out_weights, nb::handle out_extra,
                         std::uintptr_t stream, double timeout_s, int num_sms, std::vector<Event> after, bool wait) {
  const ArrayReader read = reader_of(engine, "dispatch");
  const Rows in = rows_in(read, x, scales, experts, weights, extra);
  const Rows out = rows_out(read, out_x, out_scales, out_experts, out_weights, out_extra);
  const auto run = [&] {
    const nb::gil_scoped_release release;
    return engine.dispatch_ahead(in, *handle, out, stream_ref(stream),
                                 make_options(timeout_s, num_sms, std::move(after), wait));
  };
  const Fresh fresh = run();
  return nb::make_tuple(fresh.event, fresh.dispatched);
}

Event combine(Engine& engine, const SharedHandle& handle, nb::handle x, nb::handle weights, nb::handle bias_0,
              nb::handle bias_1, nb::handle out_x, nb::handle out_weights, std::uintptr_t stream, double timeout_s,
              int num_sms, std::vector<Event> after, bool wait) {
  const ArrayReader read = reader_of(engine, "combine");
  const CombineInput in{read("x", x),
                        read.optional("weights", weights),
                        {read.optional("bias[0]", bias_0), read.optional("bias[1]", bias_1)}};
  const Rows out{read("out", out_x), {}, {}, read.optional("out_weights", out_weights), {}};
  const nb::gil_scoped_release release;
  return engine.combine(in, *handle, out, stream_ref(stream), make_options(timeout_s, num_sms, std::move(after), wait));
}

OwnedRows make_rows(Engine& engine, std::int64_t num_rows, std::int64_t hidden, int dtype, int num_scales,
                    std::uintptr_t stream) {
  Shape shape;
  shape.hidden = hidden;
  shape.dtype = static_cast<DType>(dtype);
  shape.num_scales = num_scales;
  return engine.make_rows(num_rows, shape, stream_ref(stream));
}

LowLatencyOptions low_latency_options(double timeout_s, std::vector<Event> after, bool wait, bool hook, int wire) {
  LowLatencyOptions options;
  static_cast<Options&>(options) = make_options(timeout_s, 0, std::move(after), wait);
  options.hook = hook;
  options.wire = static_cast<Wire>(wire);
  return options;
}

Shape low_latency_shape(int num_experts, int top_k, std::int64_t hidden, std::int64_t max_tokens) {
  return Shape{num_experts, top_k, hidden, max_tokens, DType::kBF16, 0};
}

/// The hook of an operation, or its event where there is none.
nb::object hook_or_event(Pending pending, bool hook) {
  return hook ? nb::cast(std::move(pending)) : nb::cast(pending.receive());
}

std::int64_t last_extent(const TensorView& view) {
  return view.shape[view.shape.dims - 1];
}

/// `out` itself; where it is a function, what it makes for these numbers.
template <class... Numbers>
nb::object made_by(nb::handle out, Numbers... numbers) {
  return PyCallable_Check(out.ptr()) != 0 ? out(numbers...) : nb::borrow(out);
}

/// The slabs, and the hook or the event. `out`: six arrays as in Slabs, or what makes them of (num_experts, top_k, hidden,
/// max_tokens, wire).
nb::tuple low_latency_dispatch(Engine& engine, int num_experts, std::int64_t max_tokens, nb::handle x,
                               nb::handle experts, nb::handle out, nb::handle received, nb::handle waited, int wire,
                               bool round_scale, bool hook, std::uintptr_t stream, double timeout_s,
                               std::vector<Event> after, bool wait) {
  const ArrayReader read = reader_of(engine, "low_latency_dispatch");
  const TensorView tokens = read("x", x);
  Routing routing;
  routing.experts = read("experts", experts);
  const std::int64_t hidden = last_extent(tokens);
  const auto top_k = static_cast<int>(last_extent(routing.experts));
  const nb::object made = made_by(out, num_experts, top_k, hidden, max_tokens, wire);
  const ExpertSlabs slabs{read("out.x", made[0]),      read.optional("out.scales", made[1]),
                          read("out.counts", made[2]), read("out.source", made[3]),
                          read("out.range", made[4]),  read.optional("out.rows", made[5])};
  LowLatencyOptions options = low_latency_options(timeout_s, std::move(after), wait, hook, wire);
  options.round_scale = round_scale;
  options.received = read.optional("received", received);
  options.waited = read.optional("waited", waited);
  const auto run = [&] {
    const nb::gil_scoped_release release;
    return engine.low_latency_dispatch(low_latency_shape(num_experts, top_k, hidden, max_tokens), tokens, routing,
                                       slabs, stream_ref(stream), options);
  };
  return nb::make_tuple(made, hook_or_event(run(), hook));
}

/// The sums, and the hook or the event. `out`: an array, or what makes it of (num_tokens, hidden).
nb::tuple low_latency_combine(Engine& engine, int num_experts, std::int64_t max_tokens, nb::handle x, nb::handle source,
                              nb::handle range, nb::handle rows, nb::handle experts, nb::handle weights, nb::handle out,
                              nb::handle waited, int wire, bool zero_copy, bool hook, std::uintptr_t stream,
                              double timeout_s, std::vector<Event> after, bool wait) {
  const ArrayReader read = reader_of(engine, "low_latency_combine");
  ExpertSlabs in;
  in.x = read("x", x);
  in.source = read("slabs.source", source);
  in.range = read("slabs.range", range);
  in.rows = read.optional("slabs.rows", rows);
  Routing routing;
  routing.experts = read("experts", experts);
  routing.weights = read("weights", weights);
  const std::int64_t hidden = last_extent(in.x);
  const nb::object made = made_by(out, routing.experts.shape[0], hidden);
  const TensorView sums = read("out", made);
  LowLatencyOptions options = low_latency_options(timeout_s, std::move(after), wait, hook, wire);
  options.zero_copy = zero_copy;
  options.waited = read.optional("waited", waited);
  const auto run = [&] {
    const nb::gil_scoped_release release;
    return engine.low_latency_combine(
        low_latency_shape(num_experts, static_cast<int>(last_extent(routing.experts)), hidden, max_tokens), in, routing,
        sums, stream_ref(stream), options);
  };
  return nb::make_tuple(made, hook_or_event(run(), hook));
}

Memory memory_of(Engine& engine, const TensorView& view) {
  return {engine.hold_memory(), view.data, static_cast<std::size_t>(view.num_elements()) * size_of(view.dtype)};
}

void layout_into(Engine& engine, const Shape& shape, const Routing& routing, const LayoutArrays& out,
                 std::uintptr_t stream) {
  const nb::gil_scoped_release release;
  if (engine.topology().device >= 0) {
    engine.layout(shape, routing, out, stream_ref(stream));
    return;
  }
  const Layout layout = engine.layout(shape, routing);
  const auto copy = [](const auto& from, const TensorView& to, DType dtype, const char* text) {
    if (to.dtype != dtype || !to.is_dense() || to.num_elements() != static_cast<std::int64_t>(from.size())) {
      throw nb::value_error(text);
    }
    std::copy(from.begin(), from.end(), to.as<std::remove_cvref_t<decltype(from[0])>>());
  };
  copy(layout.tokens_per_rank, out.tokens_per_rank, DType::kI32, "dense int32 [num_ranks] is needed");
  copy(layout.pairs_per_expert, out.pairs_per_expert, DType::kI32, "dense int32 [num_experts] is needed");
  copy(layout.token_in_rank, out.token_in_rank, DType::kBool, "dense bool [num_tokens, num_ranks] is needed");
}

/// This rank's own routing, without any exchange: the arrays that `out` makes of num_tokens, in the order of LayoutArrays.
nb::object layout(Engine& engine, int num_experts, nb::handle experts, nb::handle out, std::uintptr_t stream) {
  const ArrayReader read = reader_of(engine, "layout");
  Routing routing;
  routing.experts = read("experts", experts);
  Shape shape;
  shape.num_experts = num_experts;
  shape.top_k = static_cast<int>(last_extent(routing.experts));
  nb::object made = out(routing.experts.shape[0]);
  layout_into(engine, shape, routing, {read("out", made[0]), read("out", made[1]), read("out", made[2])}, stream);
  return made;
}

/// The caller keeps the arrays alive as long as the handle.
SharedHandle adopt(Engine& engine, const TensorView& rows_until, const TensorView& place, const TensorView& source,
                   const TensorView& tokens, std::uintptr_t stream) {
  return SharedHandle(engine.adopt({rows_until, place, source, tokens}, nullptr, stream_ref(stream)));
}

}  // namespace

void bind_engine(nb::module_& module) {
  module.def("create", &create, nb::arg("bootstrap"), nb::arg("device"), nb::arg("rows_bytes"),
             nb::arg("low_latency_bytes"), nb::arg("max_experts"), nb::arg("masks"), nb::arg("tuning"), WithoutGil());
  nb::class_<Engine>(module, "Engine")
      .def("route", &route, nb::arg("num_experts"), nb::arg("top_k"), nb::arg("experts").none(),
           nb::arg("ranks").none(), nb::arg("pairs_per_expert").none(), nb::arg("stream"), nb::arg("timeout_s"),
           nb::arg("after"), nb::arg("wait"))
      .def("dispatch", &dispatch, nb::arg("handle"), nb::arg("x").none(), nb::arg("scales").none(),
           nb::arg("experts").none(), nb::arg("weights").none(), nb::arg("extra"), nb::arg("out_x").none(),
           nb::arg("out_scales").none(), nb::arg("out_experts").none(), nb::arg("out_weights").none(),
           nb::arg("out_extra"), nb::arg("stream"), nb::arg("timeout_s"), nb::arg("num_sms"), nb::arg("after"),
           nb::arg("wait"))
      .def("dispatch_fresh", &dispatch_fresh, nb::arg("num_experts"), nb::arg("top_k"),
           nb::arg("routed_experts").none(), nb::arg("ranks").none(), nb::arg("pairs_per_expert").none(), nb::arg("x"),
           nb::arg("scales").none(), nb::arg("experts").none(), nb::arg("weights").none(), nb::arg("extra"),
           nb::arg("out"), nb::arg("drop_surplus"), nb::arg("stream"), nb::arg("timeout_s"), nb::arg("num_sms"),
           nb::arg("after"))
      .def("dispatch_ahead", &dispatch_ahead, nb::arg("handle"), nb::arg("x"), nb::arg("scales").none(),
           nb::arg("experts").none(), nb::arg("weights").none(), nb::arg("extra"), nb::arg("out_x"),
           nb::arg("out_scales").none(), nb::arg("out_experts").none(), nb::arg("out_weights").none(),
           nb::arg("out_extra"), nb::arg("stream"), nb::arg("timeout_s"), nb::arg("num_sms"), nb::arg("after"),
           nb::arg("wait"))
      .def("rows_ahead", &Engine::rows_ahead, nb::arg("num_tokens"))
      .def("combine", &combine, nb::arg("handle"), nb::arg("x").none(), nb::arg("weights").none(),
           nb::arg("bias_0").none(), nb::arg("bias_1").none(), nb::arg("out_x").none(), nb::arg("out_weights").none(),
           nb::arg("stream"), nb::arg("timeout_s"), nb::arg("num_sms"), nb::arg("after"), nb::arg("wait"))
      .def("make_rows", &make_rows, nb::arg("num_rows"), nb::arg("hidden"), nb::arg("dtype"), nb::arg("num_scales"),
           nb::arg("stream") = 0)
      .def("low_latency_dispatch", &low_latency_dispatch, nb::arg("num_experts"), nb::arg("max_tokens"),
           nb::arg("x").none(), nb::arg("experts").none(), nb::arg("out"), nb::arg("received").none(),
           nb::arg("waited").none(), nb::arg("wire"), nb::arg("round_scale"), nb::arg("hook"), nb::arg("stream"),
           nb::arg("timeout_s"), nb::arg("after"), nb::arg("wait"))
      .def("low_latency_combine", &low_latency_combine, nb::arg("num_experts"), nb::arg("max_tokens"),
           nb::arg("x").none(), nb::arg("source").none(), nb::arg("range").none(), nb::arg("rows").none(),
           nb::arg("experts").none(), nb::arg("weights").none(), nb::arg("out"), nb::arg("waited").none(),
           nb::arg("wire"), nb::arg("zero_copy"), nb::arg("hook"), nb::arg("stream"), nb::arg("timeout_s"),
           nb::arg("after"), nb::arg("wait"))
      .def(
          "combine_buffer",
          [](Engine& engine, int num_experts, std::int64_t hidden, std::int64_t max_tokens) {
            return memory_of(engine, engine.combine_buffer(low_latency_shape(num_experts, 1, hidden, max_tokens)));
          },
          nb::arg("num_experts"), nb::arg("hidden"), nb::arg("max_tokens"))
      .def(
          "memory",
          [](Engine& engine, bool low_latency, std::size_t offset, std::size_t bytes) {
            return memory_of(engine,
                             engine.memory(low_latency ? Mode::kLowLatency : Mode::kHighThroughput, offset, bytes));
          },
          nb::arg("low_latency"), nb::arg("offset"), nb::arg("bytes"))
      .def("layout", &layout, nb::arg("num_experts"), nb::arg("experts"), nb::arg("out"), nb::arg("stream"))
      .def("adopt", &adopt, nb::arg("rows_until"), nb::arg("place"), nb::arg("source"), nb::arg("tokens"),
           nb::arg("stream"))
      .def(
          "barrier", [](Engine& engine, std::uintptr_t stream) { engine.barrier(stream_ref(stream)); },
          nb::arg("stream"), WithoutGil())
      .def(
          "refuse", [](Engine& engine, int op, const std::string& why) { engine.refuse(static_cast<Op>(op), why); },
          nb::arg("op"), nb::arg("why"), WithoutGil())
      .def(
          "masks",
          [](Engine& engine, const TensorView& out, std::uintptr_t stream) { engine.masks(out, stream_ref(stream)); },
          nb::arg("out"), nb::arg("stream"))
      .def(
          "mask", [](Engine& engine, int rank, std::uintptr_t stream) { engine.mask(rank, stream_ref(stream)); },
          nb::arg("rank"), nb::arg("stream"), WithoutGil())
      .def(
          "unmask", [](Engine& engine, int rank, std::uintptr_t stream) { engine.unmask(rank, stream_ref(stream)); },
          nb::arg("rank"), nb::arg("stream"), WithoutGil())
      .def("check", &Engine::check)
      .def("abandon", &Engine::abandon, nb::arg("why"), WithoutGil())
      .def("close", &Engine::close, WithoutGil())
      .def_prop_ro("rank", &Engine::rank)
      .def_prop_ro("num_ranks", &Engine::num_ranks)
      .def_prop_ro("num_nodes", [](const Engine& engine) { return engine.topology().num_nodes(); })
      .def_prop_ro("ids_out_of_range", &Engine::ids_out_of_range);
}

}  // namespace anyep::python
