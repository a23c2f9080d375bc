// Rows out of the window into ordinary tensors: copies inside one GPU, any alignment.
#include <algorithm>

#include "cuda/device/warp.cuh"
#include "cuda/kernels/intranode_dispatch.h"
#include "cuda/runtime/launch.h"

namespace anyep::cuda {
namespace {

constexpr int kThreads = 512;
/// Dense fields are cut into pieces of this size.
constexpr std::int64_t kPieceBytes = 16 << 10;

}  // namespace

__global__ void __launch_bounds__(kThreads) copy_rows_kernel(const __grid_constant__ CopyRowsParams p) {
  const std::int64_t warps = static_cast<std::int64_t>(gridDim.x) * (kThreads / kLanes);
  const std::int64_t first = static_cast<std::int64_t>(warp_index()) * gridDim.x + blockIdx.x;
  std::int64_t rows = p.num_rows;
  if (p.rows_until != nullptr) rows = min(rows, static_cast<std::int64_t>(p.rows_until[p.num_ranks - 1]));
  for (int i = 0; i < p.num_fields; ++i) {
    const CopyRowsParams::Field& field = p.field[i];
    if (field.from_stride == field.row_bytes && field.to_stride == field.row_bytes) {
      const std::int64_t bytes = rows * field.row_bytes;
      for (std::int64_t at = first * kPieceBytes; at < bytes; at += warps * kPieceBytes) {
        copy_bytes(field.to + at, field.from + at, static_cast<std::uint32_t>(min(kPieceBytes, bytes - at)));
      }
    } else {
      for (std::int64_t row = first; row < rows; row += warps) {
        copy_bytes(field.to + row * field.to_stride, field.from + row * field.from_stride, field.row_bytes);
      }
    }
  }
}

namespace {
const Kernel<CopyRowsParams> kCopyRows(copy_rows_kernel, "copy_rows_kernel");
}

void launch_copy_rows(const CopyRowsParams& params, int num_sms, cudaStream_t stream) {
  kCopyRows({.blocks = static_cast<unsigned>(std::max(num_sms, 1)), .threads = kThreads, .stream = stream}, params);
}

}  // namespace anyep::cuda
