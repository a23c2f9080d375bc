#include <cuda/atomic>

#include "bench/probes/device.cuh"

namespace anyep::bench::probes {
namespace {

using Flag = ::cuda::atomic_ref<std::uint32_t, ::cuda::thread_scope_system>;
/// Some seconds at the clock of any GPU: then a peer is not there.
constexpr long long kPatienceClocks = 6'000'000'000;
constexpr unsigned kPolls = 1 << 12;  ///< between looks at the clock

template <class Flags, class Data>
__device__ __forceinline__ void take_step(const Step& p, const Flags& flags, const Data& data) {
  const std::uint32_t turn = p.epoch[blockIdx.x] + 1;
  const auto bytes = static_cast<std::size_t>(p.row_bytes);
  for (int row = static_cast<int>(blockIdx.x); row < p.num_rows; row += static_cast<int>(gridDim.x)) {
    for (int i = 1; i < p.num_ranks; ++i) {
      const int to = (p.rank + i) % p.num_ranks;
      const auto* const from = reinterpret_cast<const uint4*>(p.x + static_cast<std::size_t>(row) * bytes);
      auto* const there =
          reinterpret_cast<uint4*>(data(to) + static_cast<std::size_t>(p.rank * Step::kMostRows + row) * bytes);
      for (int at = static_cast<int>(threadIdx.x); at < p.row_bytes / 16; at += Step::kThreads) there[at] = from[at];
    }
  }
  __syncthreads();
  const int peer = static_cast<int>(threadIdx.x);
  if (peer < p.num_ranks && peer != p.rank) {
    const auto flags_of = [&](int rank) {
      return reinterpret_cast<std::uint32_t*>(flags(rank)) + blockIdx.x * kMaxRanks;
    };
    Flag(flags_of(peer)[p.rank]).store(turn, ::cuda::memory_order_release);  // pattern A
    const Flag mine(flags_of(p.rank)[peer]);
    const long long start = clock64();
    for (unsigned polls = 1; static_cast<std::int32_t>(mine.load(::cuda::memory_order_acquire) - turn) < 0; ++polls) {
      if (polls % kPolls != 0) continue;
      if (clock64() - start > kPatienceClocks) *p.failed = 1;
      if (*static_cast<volatile std::uint32_t*>(p.failed) != 0) break;  // nor do the steps behind it wait
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) p.epoch[blockIdx.x] = turn;
}

/// Arguments are read where the launch put them.
__global__ void __launch_bounds__(Step::kThreads, 1) step_kernel(const __grid_constant__ Step p) {
  take_step(
      p, [&p](int rank) { return p.base.base[rank] + p.flags_at; },
      [&p](int rank) { return p.base.base[rank] + p.data_at; });
}

/// Pointers lie in local memory, which is what becomes of arguments that a kernel indexes at run time unless it says
/// __grid_constant__; so it is in the program that the bars of decoding were written with.
__global__ void copied_step_kernel(const __grid_constant__ Step p) {
  std::byte *flags[kMaxRanks], *data[kMaxRanks];
  for (int rank = 0; rank < kMaxRanks; ++rank) {
    flags[rank] = p.base.base[rank] + p.flags_at;
    data[rank] = p.base.base[rank] + p.data_at;
  }
  take_step(
      p, [&flags](int rank) { return flags[rank]; }, [&data](int rank) { return data[rank]; });
}

__global__ void empty_kernel() {}

}  // namespace

void step(const Step& step, StepForm form, int blocks, cudaStream_t stream) {
  launch(form == StepForm::kTight ? step_kernel : copied_step_kernel, blocks, Step::kThreads, 0, stream, step);
}

void empty_step(cudaStream_t stream) {
  empty_kernel<<<1, kLanes, 0, stream>>>();
  check(cudaGetLastError(), "launch of an empty kernel");
}

}  // namespace anyep::bench::probes
