#include <anyep/error.h>
#include <anyep/handle.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <string>

#include "native.h"

namespace anyep::python {
namespace {

/// Copies the handle's arrays; a view that is None is left out. Waits for the route. One-dimensional ones may have any
/// stride: a column of V1's rank_prefix_matrix, say.
void copy_arrays(const SharedHandle& handle, const TensorView* rows_until, const TensorView* place,
                 const TensorView* source, const TensorView* tokens) {
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
  copy(handle->rows_until(), rows_until, "rows_until: dense int32 [num_ranks] is needed");
  copy(handle->place(), place, "place: dense int32 [num_tokens, num_ranks] is needed");
  copy(handle->source(), source, "source: dense int32 [num_rows] or more is needed");
  copy(handle->tokens(), tokens, "tokens: dense int32 [num_ranks] is needed");
}

/// The tensors 0, 1, 3 and 5 of a V1 handle (specification 9.1), where the host has the arrays. Waits for the route.
void copy_v1(const SharedHandle& handle, nb::handle prefix, nb::handle tokens, nb::handle source, nb::handle place) {
  const ArrayReader read("copy_v1", -1);
  const TensorView matrix = read("prefix", prefix), tokens_out = read("tokens", tokens),
                   source_out = read("source", source), place_out = read("place", place);
  const nb::gil_scoped_release release;
  const TensorView rows_until = handle->rows_until();
  const std::int64_t ranks = rows_until.num_elements();
  if (matrix.dtype != DType::kI32 || !matrix.is_dense() || matrix.num_elements() != ranks * ranks) {
    throw nb::value_error("prefix: dense int32 [num_ranks, num_ranks] is needed");
  }
  std::fill_n(matrix.as<std::int32_t>(), ranks * ranks, 0);
  for (std::int64_t from = 0; from < ranks; ++from) {
    matrix.as<std::int32_t>()[from * ranks + handle->rank()] = rows_until.as<std::int32_t>()[from];
  }
  copy_arrays(handle, nullptr, &place_out, &source_out, &tokens_out);
}

SharedHandle adopt(int num_ranks, int rank, const TensorView& rows_until, const TensorView& place,
                   const TensorView& source, const TensorView& tokens) {
  return SharedHandle(Handle::adopt(num_ranks, rank, {rows_until, place, source, tokens}));
}

/// Vector `column` of a matrix.
TensorView column_of(const TensorView& matrix, int column) {
  TensorView view = matrix;
  view.data = matrix.as<std::int32_t>() + column * matrix.strides[1];
  view.shape = {matrix.shape[0]};
  view.strides = {matrix.strides[0]};
  return view;
}

void must_be(bool right, const char* argument, const char* allowed) {
  if (right) return;
  Error error(ErrorCode::kArgument, std::string("adopt: ") + argument + " = another tensor, allowed: " + allowed);
  error.op = "adopt";
  error.argument = argument;
  error.allowed = allowed;
  throw error;
}

/// From the tensors of a V1 handle (specification 9.1), whose indices name them in errors: 0 = rows received from ranks
/// 0..s in column `rank`, 1 = every source's number of tokens in column 0, 3 = source, with rows to spare where the host did
/// not wait for their number, 4 = token_in_rank, 5 = place.
SharedHandle adopt_v1(int num_ranks, int rank, const TensorView& prefix, const TensorView& tokens,
                      const TensorView& source, const TensorView& token_in_rank, const TensorView& place) {
  const auto matrix = [](const TensorView& view, std::int64_t rows, std::int64_t columns) {
    return view.shape.dims == 2 && view.shape[0] == rows && view.shape[1] == columns;
  };
  must_be(prefix.dtype == DType::kI32 && matrix(prefix, num_ranks, num_ranks), "handle[0]", "int32 [R, R]");
  must_be(tokens.dtype == DType::kI32 && tokens.shape.dims == 2 && matrix(tokens, num_ranks, tokens.shape[1]) &&
              tokens.shape[1] > 0,
          "handle[1]", "int32 [R, C]");
  must_be(place.dtype == DType::kI32 && place.shape.dims == 2 && matrix(place, place.shape[0], num_ranks) &&
              place.is_dense(),
          "handle[5]", "contiguous int32 [T, R]");
  must_be(token_in_rank.dtype == DType::kBool && token_in_rank.shape == place.shape && token_in_rank.is_dense(),
          "handle[4]", "contiguous bool [T, R]");
  for (std::int64_t at = 0; at < place.num_elements(); ++at) {
    must_be((token_in_rank.as<std::uint8_t>()[at] != 0) == (place.as<std::int32_t>()[at] >= 0), "handle[4]",
            "true where handle[5] is not -1");
  }
  const TensorView rows_until = column_of(prefix, rank);
  const std::int32_t num_rows = rows_until.as<std::int32_t>()[(num_ranks - 1) * rows_until.strides[0]];
  TensorView cut = source;
  if (cut.shape.dims == 1 && num_rows >= 0) cut.shape[0] = std::min<std::int64_t>(cut.shape[0], num_rows);
  return adopt(num_ranks, rank, rows_until, place, cut, column_of(tokens, 0));
}

/// The tensors 0, 1, 3 and 5 of a V1 handle (specification 9.1), which share the handle. In the first every
/// column shows the same numbers, of which column `rank` is the one that counts; `num_rows` are the dispatch's.
nb::tuple take_v1(const SharedHandle& handle, int device, std::int64_t num_rows) {
  const std::shared_ptr<const Handle>& owner = handle.state;
  TensorView prefix = owner->rows_until(), tokens = owner->tokens(), source = owner->source();
  const std::int64_t ranks = prefix.shape[0];
  prefix.shape = {ranks, ranks};
  prefix.strides = {1, 0};
  tokens.shape = {ranks, 1};
  tokens.strides = {1, 1};
  source.shape[0] = std::min(source.shape[0], num_rows);
  return nb::make_tuple(tensor_of(prefix, device, owner), tensor_of(tokens, device, owner),
                        tensor_of(source, device, owner), tensor_of(owner->place(), device, owner));
}

}  // namespace

void bind_handle(nb::module_& module) {
  nb::class_<SharedHandle>(module, "Handle")
      .def_static("adopt", &adopt, nb::arg("num_ranks"), nb::arg("rank"), nb::arg("rows_until"), nb::arg("place"),
                  nb::arg("source"), nb::arg("tokens"))
      .def_static("adopt_v1", &adopt_v1, nb::arg("num_ranks"), nb::arg("rank"), nb::arg("prefix"), nb::arg("tokens"),
                  nb::arg("source"), nb::arg("token_in_rank"), nb::arg("place"))
      .def(
          "num_rows", [](const SharedHandle& handle) { return handle->num_rows(); }, WithoutGil())
      .def("has_counts", [](const SharedHandle& handle) { return handle->has_counts(); })
      .def("num_tokens", [](const SharedHandle& handle) { return handle->num_tokens(); })
      .def("num_ranks", [](const SharedHandle& handle) { return handle->num_ranks(); })
      .def("rank", [](const SharedHandle& handle) { return handle->rank(); })
      .def(
          "pairs_per_expert",
          [](const SharedHandle& handle, std::int64_t alignment) {
            return handle->aligned_pairs_per_expert(alignment);
          },
          nb::arg("alignment") = 1, WithoutGil())
      .def("views",
           [](const SharedHandle& handle) {
             return nb::make_tuple(handle->rows_until(), handle->place(), handle->source(), handle->tokens());
           })
      .def("copy_v1", &copy_v1, nb::arg("prefix"), nb::arg("tokens"), nb::arg("source"), nb::arg("place"))
      .def("take_v1", &take_v1, nb::arg("device"), nb::arg("num_rows"))
      .def("copy_arrays", &copy_arrays, nb::arg("rows_until").none(), nb::arg("place").none(), nb::arg("source").none(),
           nb::arg("tokens").none(), WithoutGil());
}

}  // namespace anyep::python
