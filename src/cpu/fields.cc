#include "cpu/fields.h"

#include <cstring>

namespace anyep::cpu {

FieldView::FieldView(const TensorView& view) {
  if (!view.given()) return;
  const auto size = static_cast<std::int64_t>(size_of(view.dtype));
  data = static_cast<std::byte*>(view.data);
  element_bytes = size;
  row_stride = view.strides[0] * size;
  num_elements = 1;
  for (int dim = 1; dim < view.shape.dims; ++dim) num_elements *= view.shape[dim];
  element_stride = view.shape.dims > 1 && num_elements > 1 ? view.strides[view.shape.dims - 1] * size : size;
}

void pack_row(const FieldView& field, std::int64_t row, std::byte* out) {
  const std::byte* const from = field.row(row);
  if (field.packed()) {
    std::memcpy(out, from, static_cast<std::size_t>(field.bytes()));
    return;
  }
  for (std::int64_t element = 0; element < field.num_elements; ++element) {
    std::memcpy(out + element * field.element_bytes, from + element * field.element_stride,
                static_cast<std::size_t>(field.element_bytes));
  }
}

}  // namespace anyep::cpu
