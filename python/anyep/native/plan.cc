// Topology and plans: what a call would do, without a group.
#include <anyep/plan.h>
#include <anyep/topology.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "native.h"

namespace anyep::python {
namespace {

Plan plan_of(int op, int num_experts, int top_k, std::int64_t hidden, std::int64_t max_tokens, int dtype,
             int num_scales, std::int64_t rows_bytes, std::int64_t low_latency_bytes, int num_ranks, int wire,
             bool hook) {
  const Shape shape{num_experts, top_k, hidden, max_tokens, static_cast<DType>(dtype), num_scales};
  LowLatencyOptions options;
  options.wire = static_cast<Wire>(wire);
  options.hook = hook;
  Budget budget;
  budget.rows_bytes = rows_bytes;
  budget.low_latency_bytes = low_latency_bytes;
  return make_plan(static_cast<Op>(op), shape, budget, Topology::one_host(num_ranks), Tuning::from_environment(),
                   options);
}

}  // namespace

void bind_plan(nb::module_& module) {
  nb::class_<Choice>(module, "Choice")
      .def_ro("what", &Choice::what)
      .def_ro("value", &Choice::value)
      .def_ro("why", &Choice::why);
  nb::class_<PlanRegion>(module, "PlanRegion")
      .def_ro("name", &PlanRegion::name)
      .def_ro("memory", &PlanRegion::memory)
      .def_ro("offset", &PlanRegion::offset)
      .def_ro("bytes", &PlanRegion::bytes)
      .def_ro("backed", &PlanRegion::backed);
  nb::class_<Plan>(module, "Plan", "What one call would do; str() is what `anyep plan` prints.")
      .def_ro("local_experts", &Plan::local_experts)
      .def_ro("row_bytes", &Plan::row_bytes)
      .def_ro("wire_bytes", &Plan::wire_bytes)
      .def_ro("predicted_us", &Plan::predicted_us)
      .def_ro("memory", &Plan::memory)
      .def_ro("choices", &Plan::choices)
      .def("__str__", &Plan::to_text);
  module.def("plan", &plan_of, nb::arg("op"), nb::arg("num_experts"), nb::arg("top_k"), nb::arg("hidden"),
             nb::arg("max_tokens"), nb::arg("dtype"), nb::arg("num_scales"), nb::arg("rows_bytes"),
             nb::arg("low_latency_bytes"), nb::arg("num_ranks"), nb::arg("wire"), nb::arg("hook"));
  module.def(
      "low_latency_bytes_for",
      [](int num_experts, int top_k, std::int64_t hidden, std::int64_t max_tokens, int num_ranks) {
        const Shape shape{num_experts, top_k, hidden, max_tokens, DType::kBF16, 0};
        return low_latency_bytes_for(shape, num_ranks);
      },
      nb::arg("num_experts"), nb::arg("top_k"), nb::arg("hidden"), nb::arg("max_tokens"), nb::arg("num_ranks"));
  nb::dict ops;
  for (int op = 0; op <= static_cast<int>(Op::kBarrier); ++op) ops[name_of(static_cast<Op>(op))] = op;
  module.attr("OPS") = ops;  // name -> code
}

}  // namespace anyep::python
