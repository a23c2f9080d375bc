#include <anyep/config.h>
#include <anyep/types.h>

namespace anyep {

std::size_t size_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::kBool:
    case DType::kU8:
    case DType::kI8:
    case DType::kF8E4M3:
      return 1;
    case DType::kI16:
    case DType::kBF16:
    case DType::kF16:
      return 2;
    case DType::kI32:
    case DType::kF32:
      return 4;
    case DType::kI64:
    case DType::kF64:
      return 8;
  }
  return 0;
}

const char* name_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::kBool:
      return "bool";
    case DType::kU8:
      return "uint8";
    case DType::kI8:
      return "int8";
    case DType::kI16:
      return "int16";
    case DType::kI32:
      return "int32";
    case DType::kI64:
      return "int64";
    case DType::kF8E4M3:
      return "float8_e4m3fn";
    case DType::kBF16:
      return "bfloat16";
    case DType::kF16:
      return "float16";
    case DType::kF32:
      return "float32";
    case DType::kF64:
      return "float64";
  }
  return "unknown";
}

bool TensorView::is_dense() const noexcept {
  for (int dim = 0; dim < shape.dims; ++dim) {
    if (shape[dim] < 0) return false;
  }
  for (int dim = 0; dim < shape.dims; ++dim) {
    if (shape[dim] == 0) return true;  // no element, hence no gap
  }
  std::uint64_t stride =
      1;  // unsigned: extents are unchecked input here, and a product that wraps must not be undefined
  for (int dim = shape.dims - 1; dim >= 0; --dim) {
    if (shape[dim] > 1 && static_cast<std::uint64_t>(strides[dim]) != stride) return false;
    stride *= static_cast<std::uint64_t>(shape[dim]);
  }
  return true;
}

const char* name_of(Op op) noexcept {
  switch (op) {
    case Op::kRoute:
      return "route";
    case Op::kDispatch:
      return "dispatch";
    case Op::kCombine:
      return "combine";
    case Op::kLowLatencyDispatch:
      return "low_latency_dispatch";
    case Op::kLowLatencyCombine:
      return "low_latency_combine";
    case Op::kBarrier:
      return "barrier";
  }
  return "unknown";
}

}  // namespace anyep
