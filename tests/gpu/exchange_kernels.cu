#include "exchange_kernels.h"

#include <algorithm>

#include "../support/stream_graph.h"

namespace anyep::test {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kMostBlocks = 64;

__device__ std::int64_t thread() {
  return static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ std::int64_t threads() {
  return static_cast<std::int64_t>(gridDim.x) * blockDim.x;
}

__global__ void __launch_bounds__(kThreads) prepare_kernel(const Exchange e, const ExchangeMemory m) {
  const ExchangeContents contents(e, *m.replay);
  const int tokens = e.tokens[e.rank];
  for (std::int64_t at = thread(); at < static_cast<std::int64_t>(tokens) * e.top_k; at += threads()) {
    m.ids[at] = contents.id(e.rank, static_cast<int>(at / e.top_k), static_cast<int>(at % e.top_k));
  }
  for (std::int64_t at = thread(); at < static_cast<std::int64_t>(tokens) * e.hidden; at += threads()) {
    const std::uint32_t seed = contents.seed_of(e.rank, static_cast<int>(at / e.hidden));
    m.x[at] = ExchangeContents::x(seed, static_cast<int>(at % e.hidden));
    m.out[at] = 0xFFFF;
  }
}

/// blockIdx.y: the source rank. Every block lists its tokens and checks a share of their rows.
__global__ void __launch_bounds__(kThreads) received_kernel(const Exchange e, const ExchangeMemory m) {
  __shared__ std::int32_t tokens[Exchange::kMostTokens];
  __shared__ int begin, count;
  const ExchangeContents contents(e, *m.replay);
  const Warp lanes;
  const auto from = static_cast<int>(blockIdx.y), warp = static_cast<int>(threadIdx.x / 32);
  if (warp == 0) {
    int before = 0;
    for (int source = 0; source < from; ++source) before += list_tokens(lanes, contents, source, nullptr);
    const int mine = list_tokens(lanes, contents, from, tokens);
    if (lanes.index() == 0) {
      begin = before;
      count = mine;
      if (blockIdx.x == 0) {
        find(*m.findings, Field::kCounts, e.salt, from, 0, 0, static_cast<std::uint32_t>(m.rows_until[from]),
             static_cast<std::uint32_t>(before + mine));
      }
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(blockIdx.x) * kWarps + warp; i < count; i += static_cast<int>(gridDim.x) * kWarps) {
    check_row(lanes, contents, m, from, begin + i, tokens[i]);
  }
}

__global__ void __launch_bounds__(kThreads) sums_kernel(const Exchange e, const ExchangeMemory m) {
  const ExchangeContents contents(e, *m.replay);
  const int warp = static_cast<int>(thread() / 32), warps = static_cast<int>(threads() / 32);
  for (int token = warp; token < e.tokens[e.rank]; token += warps) check_sum(Warp(), contents, m, token);
  if (thread() == 0) add(m.findings->pairs, 1);
}

__global__ void damage_kernel(std::uint16_t* element) {
  *element ^= 0x40u;
}

unsigned blocks_for(std::int64_t units, int units_per_block, int most = kMostBlocks) {
  return static_cast<unsigned>(std::clamp<std::int64_t>((units + units_per_block - 1) / units_per_block, 1, most));
}

}  // namespace

void load_exchange_kernels() {
  cudaFuncAttributes attributes{};
  must(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(prepare_kernel)));
  must(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(received_kernel)));
  must(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(sums_kernel)));
  must(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(damage_kernel)));
}

void prepare_exchange(const Exchange& e, const ExchangeMemory& memory, cudaStream_t stream) {
  const std::int64_t elements = static_cast<std::int64_t>(e.tokens[e.rank]) * e.hidden;
  prepare_kernel<<<blocks_for(elements, 4 * kThreads), kThreads, 0, stream>>>(e, memory);
  must(cudaGetLastError());
}

void check_received(const Exchange& e, const ExchangeMemory& memory, cudaStream_t stream) {
  const int most = *std::max_element(e.tokens, e.tokens + e.num_ranks);
  const unsigned shares = blocks_for(most, kWarps, kMostBlocks / e.num_ranks);
  received_kernel<<<dim3(shares, static_cast<unsigned>(e.num_ranks)), kThreads, 0, stream>>>(e, memory);
  must(cudaGetLastError());
}

void check_sums(const Exchange& e, const ExchangeMemory& memory, cudaStream_t stream) {
  sums_kernel<<<blocks_for(e.tokens[e.rank], kWarps), kThreads, 0, stream>>>(e, memory);
  must(cudaGetLastError());
}

void damage(std::uint16_t* element, cudaStream_t stream) {
  damage_kernel<<<1, 1, 0, stream>>>(element);
  must(cudaGetLastError());
}

}  // namespace anyep::test
