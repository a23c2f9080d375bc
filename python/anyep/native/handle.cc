#include <anyep/handle.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "native.h"

namespace anyep::python {
namespace {

/// Copies the handle's arrays; a view that is None is left out. Waits for the route. One-dimensional ones may have any
/// stride: a column of V1's rank_prefix_matrix, say.
void copy_arrays(const Handle& handle, const TensorView* rows_until, const TensorView* place, const TensorView* source,
                 const TensorView* tokens) {
  const auto copy = [](const TensorView& from, const TensorView* to, const char* name) {
    if (to == nullptr) return;
    const bool column = to->shape.dims == 1;
    if (to->dtype != DType::kI32 || !(column || to->is_dense()) || to->num_elements() < from.num_elements()) {
      throw nb::value_error(name);
    }
    const std::int64_t stride = column ? to->strides[0] : 1;
    const auto* const values = from.as<std::int32_t>();
    auto* const target = to->as<std::int32_t>();
    for (std::int64_t i = 0; i < from.num_elements(); ++i) target[i * stride] = values[i];
  };
  copy(handle.rows_until(), rows_until, "rows_until: dense int32 [num_ranks] is needed");
  copy(handle.place(), place, "place: dense int32 [num_tokens, num_ranks] is needed");
  copy(handle.source(), source, "source: dense int32 [num_rows] or more is needed");
  copy(handle.tokens(), tokens, "tokens: dense int32 [num_ranks] is needed");
}

Handle adopt(int num_ranks, int rank, const TensorView& rows_until, const TensorView& place, const TensorView& source,
             const TensorView& tokens) {
  HandleArrays arrays{rows_until, place, source, tokens};
  std::vector<std::int32_t> column;
  if (rows_until.dtype == DType::kI32 && rows_until.shape.dims == 1 && rows_until.shape[0] == num_ranks) {
    for (std::int64_t i = 0; i < num_ranks; ++i)
      column.push_back(rows_until.as<std::int32_t>()[i * rows_until.strides[0]]);
    arrays.rows_until = TensorView::dense(column.data(), DType::kI32, {num_ranks});
  }
  return Handle::adopt(num_ranks, rank, arrays);
}

}  // namespace

void bind_handle(nb::module_& module) {
  nb::class_<Handle>(module, "Handle")
      .def_static("adopt", &adopt, nb::arg("num_ranks"), nb::arg("rank"), nb::arg("rows_until"), nb::arg("place"),
                  nb::arg("source"), nb::arg("tokens"))
      .def("num_rows", &Handle::num_rows, WithoutGil())
      .def("num_tokens", &Handle::num_tokens)
      .def("num_ranks", &Handle::num_ranks)
      .def("rank", &Handle::rank)
      .def("pairs_per_expert", &Handle::aligned_pairs_per_expert, nb::arg("alignment") = 1, WithoutGil())
      .def("copy_arrays", &copy_arrays, nb::arg("rows_until").none(), nb::arg("place").none(), nb::arg("source").none(),
           nb::arg("tokens").none(), WithoutGil());
}

}  // namespace anyep::python
