// Single elements of the caller's views: the oracle's only contact with memory.
#pragma once

#include <anyep/types.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace anyep::reference {

/// Address of element [row, column] of a view with two dimensions, any strides.
inline std::byte* element(const TensorView& view, std::int64_t row, std::int64_t column) {
  const std::int64_t offset = row * view.strides[0] + column * view.strides[1];
  return view.as<std::byte>() + offset * static_cast<std::int64_t>(size_of(view.dtype));
}

/// Element [row, column] of an int32 or int64 view.
std::int64_t id_at(const TensorView& view, std::int64_t row, std::int64_t column);

/// The value at an address that holds a bfloat16, float16 or float32.
float load(DType dtype, const std::byte* at);
/// Rounds once, to nearest even.
void store(DType dtype, std::byte* at, float value);

/// Adds one row of a two-dimensional view, its elements one after another, to `out`.
void append_row(std::vector<std::byte>& out, const TensorView& view, std::int64_t row);

}  // namespace anyep::reference
