#include "low_latency_pair_kernels.h"

#include <algorithm>
#include <initializer_list>

#include "../support/stream_graph.h"
#include "protocol/platform.h"

namespace anyep::test {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kMostBlocks = 96;

__device__ std::int64_t thread() {
  return static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ std::int64_t threads() {
  return static_cast<std::int64_t>(gridDim.x) * blockDim.x;
}

template <class T>
__device__ void overwrite(T* at, std::int64_t count) {
  for (std::int64_t i = thread(); i < count; i += threads()) at[i] = static_cast<T>(~T{});
}

__device__ void linger_if_late(const Contents& contents, std::uint32_t place) {
  if (thread() != 0) return;
  const std::uint64_t ns = contents.late_ns(place), from = protocol::now_ns();
  while (ns != 0 && protocol::now_ns() - from < ns) {
  }
}

__global__ void __launch_bounds__(kThreads) prepare_kernel(const PairCall call, const PairMemory m) {
  const Contents contents(call, *m.replay);
  const int tokens = call.tokens[call.rank], rank = call.rank;
  for (std::int64_t at = thread(); at < static_cast<std::int64_t>(tokens) * call.top_k; at += threads()) {
    const auto token = static_cast<int>(at / call.top_k), choice = static_cast<int>(at % call.top_k);
    const std::int64_t id = contents.id(rank, token, choice);
    if (call.wide_ids) {
      static_cast<std::int64_t*>(m.ids)[at] = id;
    } else {
      static_cast<std::int32_t*>(m.ids)[at] = static_cast<std::int32_t>(id);
    }
    m.weights[at] = contents.weight(rank, token, choice);
  }
  const int quads = call.hidden / 4;
  for (std::int64_t at = thread(); at < static_cast<std::int64_t>(tokens) * quads; at += threads()) {
    const Quad x = contents.x(rank, static_cast<int>(at / quads), static_cast<int>(at % quads) * 4);
    for (int i = 0; i < 4; ++i) m.x[4 * at + i] = x.at[i];
  }
  const std::int64_t experts = call.experts_of(rank).count;
  overwrite(m.counts, experts);
  overwrite(m.range, experts * call.num_ranks);
  overwrite(m.source, experts * call.rows_per_expert());
  overwrite(m.out, static_cast<std::int64_t>(tokens) * call.hidden);
  linger_if_late(contents, 0);
}

/// blockIdx.y: the local expert. Every block lists its rows and checks a share of them.
__global__ void __launch_bounds__(kThreads) dispatched_kernel(const PairCall call, const PairMemory m) {
  __shared__ std::int32_t origins[PairCall::kMostRows];
  __shared__ int num_rows;
  const Contents contents(call, *m.replay);
  const Warp lanes;
  const auto local = static_cast<int>(blockIdx.y), warp = static_cast<int>(threadIdx.x / 32);
  if (warp == 0) {
    const bool speaks = blockIdx.x == 0 && lanes.index() == 0;
    const int count = list_rows(lanes, contents, local, origins, [&](int from, int begin, int of_source) {
      if (speaks) check_range(call, m, local, from, begin, of_source);
    });
    if (lanes.index() == 0) num_rows = count;
    if (speaks) {
      find(*m.findings, Field::kCounts, call.salt, local, 0, 0, static_cast<std::uint32_t>(m.counts[local]),
           static_cast<std::uint32_t>(count));
    }
  }
  __syncthreads();
  for (int row = static_cast<int>(blockIdx.x) * kWarps + warp; row < num_rows;
       row += static_cast<int>(gridDim.x) * kWarps) {
    check_row(lanes, contents, m, local, row, origins[row]);
  }
  if (blockIdx.y == 0) linger_if_late(contents, 1);
}

__global__ void __launch_bounds__(kThreads) combined_kernel(const PairCall call, const PairMemory m) {
  const Contents contents(call, *m.replay);
  const int warp = static_cast<int>(thread() / 32), warps = static_cast<int>(threads() / 32);
  for (int token = warp; token < call.tokens[call.rank]; token += warps) check_token(Warp(), contents, m, token);
  if (thread() == 0) add(m.findings->pairs, 1);
}

__global__ void linger_kernel(const PairCall call, const PairMemory m, std::uint32_t place) {
  linger_if_late(Contents(call, *m.replay), place);
}

__global__ void damage_kernel(const PairCall call, const PairMemory m, Field field) {
  if (field == Field::kOut) {
    m.out[0] ^= 0x0100u;
    return;
  }
  const int experts = call.experts_of(call.rank).count, rows = call.rows_per_expert();
  for (int local = 0; local < experts; ++local) {
    if (m.counts[local] == 0) continue;
    const std::int64_t first = static_cast<std::int64_t>(local) * rows;
    const std::int64_t columns =
        call.wire == Wire::kUE8M0 ? core::num_packed_scales(call.hidden) : core::num_fp8_scales(call.hidden);
    if (field == Field::kCounts) m.counts[local] ^= 256;
    if (field == Field::kRange) m.range[local * call.num_ranks] ^= std::int64_t{1} << 32;
    if (field == Field::kSource) m.source[first] ^= 1;
    if (field == Field::kRow) {
      reinterpret_cast<unsigned char*>(m.slab)[first * call.hidden * (call.wire == Wire::kBF16 ? 2 : 1)] ^= 1u;
    }
    if (field == Field::kScale) m.scales[first * columns] ^= 1u;
    return;
  }
}

unsigned blocks_for(std::int64_t units, int units_per_block) {
  return static_cast<unsigned>(
      std::clamp<std::int64_t>((units + units_per_block - 1) / units_per_block, 1, kMostBlocks));
}

}  // namespace

void load_pair_kernels() {
  cudaFuncAttributes attributes{};
  for (const void* kernel :
       {reinterpret_cast<const void*>(prepare_kernel), reinterpret_cast<const void*>(dispatched_kernel),
        reinterpret_cast<const void*>(combined_kernel), reinterpret_cast<const void*>(linger_kernel),
        reinterpret_cast<const void*>(damage_kernel)}) {
    must(cudaFuncGetAttributes(&attributes, kernel));
  }
}

void prepare_pair(const PairCall& call, const PairMemory& memory, cudaStream_t stream) {
  const std::int64_t quads = static_cast<std::int64_t>(call.tokens[call.rank]) * call.hidden / 4;
  prepare_kernel<<<blocks_for(quads, kThreads), kThreads, 0, stream>>>(call, memory);
  must(cudaGetLastError());
}

void check_dispatched(const PairCall& call, const PairMemory& memory, cudaStream_t stream) {
  const int experts = call.experts_of(call.rank).count;
  if (experts == 0) return;
  std::int64_t tokens = 0;
  for (int rank = 0; rank < call.num_ranks; ++rank) tokens += call.tokens[rank];
  const std::int64_t rows = tokens * std::min(call.top_k, call.num_experts) / std::max(call.num_experts, 1) + 1;
  const unsigned shares =
      std::clamp(blocks_for(rows, kWarps), 1u, static_cast<unsigned>(std::max(1, kMostBlocks / experts)));
  dispatched_kernel<<<dim3(shares, static_cast<unsigned>(experts)), kThreads, 0, stream>>>(call, memory);
  must(cudaGetLastError());
}

void check_combined(const PairCall& call, const PairMemory& memory, cudaStream_t stream) {
  combined_kernel<<<blocks_for(call.tokens[call.rank], kWarps), kThreads, 0, stream>>>(call, memory);
  must(cudaGetLastError());
}

void linger(const PairCall& call, const PairMemory& memory, std::uint32_t place, cudaStream_t stream) {
  linger_kernel<<<1, 1, 0, stream>>>(call, memory, place);
  must(cudaGetLastError());
}

void damage(const PairCall& call, const PairMemory& memory, Field field, cudaStream_t stream) {
  damage_kernel<<<1, 1, 0, stream>>>(call, memory, field);
  must(cudaGetLastError());
}

}  // namespace anyep::test
