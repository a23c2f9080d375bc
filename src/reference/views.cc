#include "reference/views.h"

#include "core/bfloat16.h"

#include <cstring>

namespace anyep::reference {
namespace {

template <class T>
T read(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

template <class T>
void write(std::byte* at, T value) {
  std::memcpy(at, &value, sizeof value);
}

}  // namespace

std::int64_t id_at(const TensorView& view, std::int64_t row, std::int64_t column) {
  const std::byte* at = element(view, row, column);
  return view.dtype == DType::kI32 ? read<std::int32_t>(at) : read<std::int64_t>(at);
}

float load(DType dtype, const std::byte* at) {
  switch (dtype) {
    case DType::kBF16:
      return core::float_of_bf16(read<std::uint16_t>(at));
    case DType::kF16:
      return core::float_of_fp16(read<std::uint16_t>(at));
    default:
      return read<float>(at);
  }
}

void store(DType dtype, std::byte* at, float value) {
  switch (dtype) {
    case DType::kBF16:
      return write(at, core::bf16_of_float(value));
    case DType::kF16:
      return write(at, core::fp16_of_float(value));
    default:
      return write(at, core::canonical(value));
  }
}

void append_row(std::vector<std::byte>& out, const TensorView& view, std::int64_t row) {
  const std::size_t width = size_of(view.dtype);
  const auto columns = static_cast<std::size_t>(view.shape[1]);
  const std::size_t first = out.size();
  out.resize(first + columns * width);
  if (columns == 0) return;
  if (view.strides[1] == 1) {
    std::memcpy(out.data() + first, element(view, row, 0), columns * width);
    return;
  }
  for (std::size_t column = 0; column < columns; ++column) {
    std::memcpy(out.data() + first + column * width, element(view, row, static_cast<std::int64_t>(column)), width);
  }
}

}  // namespace anyep::reference
