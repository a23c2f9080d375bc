// What computes beside an operation: a product of two matrices by tensor cores. Not the quickest there is; it keeps every SM that
// it gets busy, by blocks that come and go.
#include <cuda_bf16.h>
#include <mma.h>

#include "bench/probes/device.cuh"

namespace anyep::bench::probes {
namespace {

using nvcuda::wmma::fragment;
namespace wmma = nvcuda::wmma;

constexpr int kWarps = 8, kThreads = kWarps * kLanes;
constexpr int kTile = 128, kDepth = 64;  ///< a block makes kTile x kTile sums, kDepth products at a time
constexpr int kEdge = 16;                ///< of a tensor core's tile
constexpr int kWarpRows = 32, kWarpColumns = 64;
constexpr int kPitch = kDepth + 8;  ///< elements; keeps rows in different banks
/// So much that an SM has one block, as products that are tuned for these GPUs do.
constexpr std::size_t kBlockShared = 160 * 1024;

__device__ void load_tile(__nv_bfloat16* tile, const __nv_bfloat16* from, int pitch) {
  constexpr int kPerAccess = 8, kPerRow = kDepth / kPerAccess;
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kPerRow; i += kThreads) {
    const int row = i / kPerRow, column = i % kPerRow * kPerAccess;
    *reinterpret_cast<uint4*>(tile + row * kPitch + column) = *reinterpret_cast<const uint4*>(
        from + static_cast<std::size_t>(row) * static_cast<std::size_t>(pitch) + column);
  }
}

__global__ void __launch_bounds__(kThreads, 1) multiply(const __grid_constant__ Product p) {
  extern __shared__ __align__(128) std::byte memory[];
  auto* const left = reinterpret_cast<__nv_bfloat16*>(memory);
  __nv_bfloat16* const right = left + kTile * kPitch;
  const int tiles = p.edge / kTile, warp = static_cast<int>(threadIdx.x / kLanes);
  const int row = static_cast<int>(blockIdx.x) / tiles * kTile, column = static_cast<int>(blockIdx.x) % tiles * kTile;
  const int warp_row = warp / 2 * kWarpRows, warp_column = warp % 2 * kWarpColumns;
  constexpr int kDown = kWarpRows / kEdge, kAcross = kWarpColumns / kEdge;
  fragment<wmma::accumulator, kEdge, kEdge, kEdge, float> sums[kDown][kAcross];
  for (auto& line : sums) {
    for (auto& sum : line) wmma::fill_fragment(sum, 0.0f);
  }
  const auto* const a = reinterpret_cast<const __nv_bfloat16*>(p.a);
  const auto* const b = reinterpret_cast<const __nv_bfloat16*>(p.b);
  for (int depth = 0; depth < p.edge; depth += kDepth) {
    load_tile(left, a + static_cast<std::size_t>(row) * static_cast<std::size_t>(p.edge) + depth, p.edge);
    load_tile(right, b + static_cast<std::size_t>(column) * static_cast<std::size_t>(p.edge) + depth, p.edge);
    __syncthreads();
    for (int k = 0; k < kDepth; k += kEdge) {
      fragment<wmma::matrix_a, kEdge, kEdge, kEdge, __nv_bfloat16, wmma::row_major> of_left[kDown];
      fragment<wmma::matrix_b, kEdge, kEdge, kEdge, __nv_bfloat16, wmma::col_major> of_right[kAcross];
      for (int i = 0; i < kDown; ++i) {
        wmma::load_matrix_sync(of_left[i], left + (warp_row + i * kEdge) * kPitch + k, kPitch);
      }
      for (int j = 0; j < kAcross; ++j) {
        wmma::load_matrix_sync(of_right[j], right + (warp_column + j * kEdge) * kPitch + k, kPitch);
      }
      for (int i = 0; i < kDown; ++i) {
        for (int j = 0; j < kAcross; ++j) wmma::mma_sync(sums[i][j], of_left[i], of_right[j], sums[i][j]);
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < kDown; ++i) {
    for (int j = 0; j < kAcross; ++j) {
      const std::size_t at = static_cast<std::size_t>(row + warp_row + i * kEdge) * static_cast<std::size_t>(p.edge);
      wmma::store_matrix_sync(p.sums + at + column + warp_column + j * kEdge, sums[i][j], static_cast<unsigned>(p.edge),
                              wmma::mem_row_major);
    }
  }
}

}  // namespace

void multiply_matrices(const Product& product, cudaStream_t stream) {
  const int tiles = product.edge / kTile;
  const std::size_t shared = has_bulk_copies() ? kBlockShared : 2 * kTile * kPitch * sizeof(__nv_bfloat16);
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(multiply), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared)),
        "cudaFuncSetAttribute");
  multiply<<<static_cast<unsigned>(tiles * tiles), kThreads, shared, stream>>>(product);
  check(cudaGetLastError(), "launch of a product");
}

}  // namespace anyep::bench::probes
