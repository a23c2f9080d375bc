// Fields of caller tensors as bytes: where a row's share lies, and how it is packed onto the wire.
#pragma once

#include <anyep/types.h>

#include <cstddef>
#include <cstdint>

#include "core/layout.h"
#include "core/routing.h"

namespace anyep::cpu {

/// A field of the caller's rows. Elements of a row may lie apart (strided scales); rows may too.
struct FieldView {
  std::byte* data = nullptr;
  std::int64_t row_stride = 0;      ///< bytes
  std::int64_t element_stride = 0;  ///< bytes
  std::int64_t element_bytes = 0;
  std::int64_t num_elements = 0;

  FieldView() = default;
  /// A [rows, elements] tensor; a tensor with more dimensions counts its trailing ones as elements, dense.
  explicit FieldView(const TensorView& view);

  bool given() const { return num_elements > 0; }
  bool packed() const { return element_stride == element_bytes; }
  std::int64_t bytes() const { return num_elements * element_bytes; }
  std::byte* row(std::int64_t index) const { return data + index * row_stride; }
  /// Rows follow each other without gaps, elements too.
  bool dense() const { return packed() && row_stride == bytes(); }
};

/// Packs one row's elements to `out`.
void pack_row(const FieldView& field, std::int64_t row, std::byte* out);

}  // namespace anyep::cpu
