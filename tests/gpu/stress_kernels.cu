#include "stress_kernels.h"

#include "core/routing.h"

namespace anyep::test {
namespace {

__device__ std::uint32_t mix(std::uint32_t value) {
  value ^= value >> 16;
  value *= 0x7feb352du;
  value ^= value >> 15;
  value *= 0x846ca68bu;
  return value ^ value >> 16;
}

/// Small integers: eight of them add up without rounding in BF16.
__device__ std::uint16_t element(std::uint32_t salt, int rank, int token, int column) {
  const std::uint32_t random =
      mix(salt ^ mix(static_cast<std::uint32_t>(rank) << 24 ^ static_cast<std::uint32_t>(token) * 65537u ^
                     static_cast<std::uint32_t>(column) * 0x9E3779B9u));
  return static_cast<std::uint16_t>(__float_as_uint(static_cast<float>(random % 32)) >> 16);
}

__device__ std::int64_t choice(const Exchange& e, int rank, int token, int index) {
  const std::uint32_t random = mix(e.salt * 31u + mix(static_cast<std::uint32_t>(rank * 1000003 + token * 64 + index)));
  if (static_cast<int>(random % 100) < e.percent_unused) return -1;
  return (random >> 8) % static_cast<std::uint32_t>(e.num_experts);
}

__device__ std::int64_t thread() {
  return static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ std::int64_t threads() {
  return static_cast<std::int64_t>(gridDim.x) * blockDim.x;
}

__global__ void fill_kernel(Exchange e, std::int64_t* ids, std::uint16_t* x) {
  for (std::int64_t at = thread(); at < static_cast<std::int64_t>(e.num_tokens) * e.top_k; at += threads()) {
    ids[at] = choice(e, e.rank, static_cast<int>(at / e.top_k), static_cast<int>(at % e.top_k));
  }
  for (std::int64_t at = thread(); at < static_cast<std::int64_t>(e.num_tokens) * e.hidden; at += threads()) {
    x[at] = element(e.salt, e.rank, static_cast<int>(at / e.hidden), static_cast<int>(at % e.hidden));
  }
}

__global__ void received_kernel(Exchange e, const std::uint16_t* rows, const std::int32_t* rows_until,
                                const std::int32_t* source) {
  const std::int64_t count = static_cast<std::int64_t>(rows_until[e.num_ranks - 1]) * e.hidden;
  for (std::int64_t at = thread(); at < count; at += threads()) {
    const auto row = static_cast<std::int32_t>(at / e.hidden);
    int from = 0;
    while (row >= rows_until[from]) ++from;
    if (rows[at] != element(e.salt, from, source[row], static_cast<int>(at % e.hidden))) {
      atomicAdd(reinterpret_cast<unsigned long long*>(e.wrong), 1ull);
    }
  }
}

__global__ void combined_kernel(Exchange e, const std::int64_t* ids, const std::uint16_t* out) {
  for (std::int64_t at = thread(); at < static_cast<std::int64_t>(e.num_tokens) * e.hidden; at += threads()) {
    const auto token = static_cast<int>(at / e.hidden);
    unsigned ranks = 0;
    for (int index = 0; index < e.top_k; ++index) {
      const std::int64_t expert = ids[static_cast<std::int64_t>(token) * e.top_k + index];
      if (expert >= 0) ranks |= 1u << core::rank_of_expert(e.num_experts, e.num_ranks, static_cast<int>(expert));
    }
    const float one =
        __uint_as_float(std::uint32_t{element(e.salt, e.rank, token, static_cast<int>(at % e.hidden))} << 16);
    const float want = one * static_cast<float>(__popc(ranks));
    if (__uint_as_float(std::uint32_t{out[at]} << 16) != want) {
      atomicAdd(reinterpret_cast<unsigned long long*>(e.wrong), 1ull);
    }
  }
}

__global__ void damage_kernel(std::uint16_t* element) {
  *element = static_cast<std::uint16_t>(*element ^ 0x40u);
}

constexpr int kBlocks = 16, kThreads = 256;

}  // namespace

void fill_exchange(const Exchange& e, std::int64_t* ids, std::uint16_t* x, cudaStream_t stream) {
  fill_kernel<<<kBlocks, kThreads, 0, stream>>>(e, ids, x);
}
void check_received(const Exchange& e, const std::uint16_t* rows, const std::int32_t* rows_until,
                    const std::int32_t* source, cudaStream_t stream) {
  received_kernel<<<kBlocks, kThreads, 0, stream>>>(e, rows, rows_until, source);
}
void check_combined(const Exchange& e, const std::int64_t* ids, const std::uint16_t* out, cudaStream_t stream) {
  combined_kernel<<<kBlocks, kThreads, 0, stream>>>(e, ids, out);
}
void damage(std::uint16_t* element, cudaStream_t stream) {
  damage_kernel<<<1, 1, 0, stream>>>(element);
}

}  // namespace anyep::test
