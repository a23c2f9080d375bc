#include "company_kernels.h"

#include <stdexcept>
#include <string>

#include "../support/stream_graph.h"
#include "protocol/platform.h"

namespace anyep::test {
namespace {

constexpr int kThreads = 512, kComputeThreads = 256;

/// So much that a block has its SM for itself: with what the system keeps of each block, another finds no room.
int whole_sm() {
  int device = 0, bytes = 0;
  must(cudaGetDevice(&device));
  must(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

std::uint32_t __device__ look(std::uint32_t& word) {
  return protocol::Shared(word).load(protocol::kAcquire);
}
void __device__ say(std::uint32_t& word, std::uint32_t value) {
  protocol::Shared(word).store(value, protocol::kRelease);
}

/// One thread waits until ready(); at the limit it says who gave up.
template <class Ready>
__device__ void wait_until(Ready&& ready, std::uint64_t limit_ns, CompanyWords* words, GaveUp who) {
  const std::uint64_t from = protocol::now_ns();
  while (!ready()) {
    if (protocol::now_ns() - from < limit_ns) continue;
    say(words->gave_up, static_cast<std::uint32_t>(who));
    return;
  }
}

__global__ void occupy_kernel(int gpu, std::uint64_t limit_ns, CompanyWords* words) {
  if (threadIdx.x != 0) return;
  say(words->started[gpu][blockIdx.x], 1);
  wait_until([&] { return look(words->stop) != 0; }, limit_ns, words, GaveUp::kOccupying);
}

__global__ void __launch_bounds__(kComputeThreads) compute_kernel(int depth, float* sums) {
  extern __shared__ float numbers[];
  constexpr int kEdge = 64;  // two tiles of kEdge x kEdge numbers
  for (int i = static_cast<int>(threadIdx.x); i < 2 * kEdge * kEdge; i += kComputeThreads) {
    numbers[i] = static_cast<float>((i * 37 + static_cast<int>(blockIdx.x)) % 64) * 0.015625f;
  }
  __syncthreads();
  const int row = static_cast<int>(threadIdx.x) / 16 * 4, column = static_cast<int>(threadIdx.x) % 16 * 4;
  float sum[4][4] = {};
  for (int k = 0; k < depth; ++k) {
    const float* const left = numbers + k % kEdge * kEdge + row;
    const float* const right = numbers + kEdge * kEdge + k % kEdge * kEdge + column;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(left[i], right[j], sum[i][j]);
    }
  }
  float all = 0;
  for (const auto& line : sum) {
    for (const float value : line) all += value;
  }
  sums[blockIdx.x * kComputeThreads + threadIdx.x] = all;
}

__global__ void pass_kernel(int rank, int num_ranks, std::uint32_t round, std::uint64_t limit_ns, CompanyWords* words) {
  if (threadIdx.x != 0) return;
  const auto block = static_cast<int>(blockIdx.x);
  say(words->ring[rank][block], round);
  std::uint32_t& neighbour = words->ring[(rank + 1) % num_ranks][block];
  wait_until([&] { return look(neighbour) >= round; }, limit_ns, words, GaveUp::kPassing);
}

__global__ void meet_kernel(std::uint64_t limit_ns, CompanyWords* words) {
  if (threadIdx.x != 0) return;
  say(words->arrived[blockIdx.x], 1);
  unsigned there = 0;
  const auto all_there = [&] {
    while (there < gridDim.x && look(words->arrived[there]) != 0) ++there;
    return there == gridDim.x;
  };
  wait_until(all_there, limit_ns, words, GaveUp::kMeeting);
}

/// The current GPU, where there are words for so many blocks of it.
int gpu_with_words(int blocks) {
  int gpu = 0;
  must(cudaGetDevice(&gpu));
  if (gpu < CompanyWords::kMaxRanks && blocks <= CompanyWords::kMostSms) return gpu;
  throw std::invalid_argument(std::to_string(blocks) + " blocks on GPU " + std::to_string(gpu) +
                              "; there are words for " + std::to_string(CompanyWords::kMostSms) + " on GPUs below " +
                              std::to_string(CompanyWords::kMaxRanks));
}

template <class Kernel>
void give_whole_sm(Kernel* kernel) {
  must(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                            whole_sm()));
}

}  // namespace

int num_sms() {
  int device = 0, count = 0;
  must(cudaGetDevice(&device));
  must(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

void load_company_kernels() {
  give_whole_sm(occupy_kernel);
  give_whole_sm(compute_kernel);
  give_whole_sm(meet_kernel);
  cudaFuncAttributes attributes{};
  must(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(pass_kernel)));
}

void occupy(int blocks, std::uint64_t limit_ns, CompanyWords* words, cudaStream_t stream) {
  const auto bytes = static_cast<std::size_t>(whole_sm());
  occupy_kernel<<<static_cast<unsigned>(blocks), kThreads, bytes, stream>>>(gpu_with_words(blocks), limit_ns, words);
  must(cudaGetLastError());
}

void linger_small(int blocks, std::uint64_t limit_ns, CompanyWords* words, cudaStream_t stream) {
  occupy_kernel<<<static_cast<unsigned>(blocks), 32, 0, stream>>>(gpu_with_words(blocks), limit_ns, words);
  must(cudaGetLastError());
}

void compute_everywhere(int depth, float* sums, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(num_sms());
  compute_kernel<<<blocks, kComputeThreads, static_cast<std::size_t>(whole_sm()), stream>>>(depth, sums);
  must(cudaGetLastError());
}

void pass_around(int rank, int num_ranks, int blocks, std::uint32_t round, std::uint64_t limit_ns, CompanyWords* words,
                 cudaStream_t stream) {
  pass_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(rank, num_ranks, round, limit_ns, words);
  must(cudaGetLastError());
}

void meet(int blocks, std::uint64_t limit_ns, CompanyWords* words, cudaStream_t stream) {
  meet_kernel<<<static_cast<unsigned>(blocks), kThreads, static_cast<std::size_t>(whole_sm()), stream>>>(limit_ns,
                                                                                                         words);
  must(cudaGetLastError());
}

}  // namespace anyep::test
