// One fault for each tool of compute-sanitizer, so that a run without findings means something: planted_faults TOOL. And right programs
// that are made as the low-latency kernels are, so that findings mean something: planted_faults sync, arrive or flag
#include <cuda_runtime.h>

#include <cstdio>
#include <cuda/atomic>
#include <string>

namespace {

/// Behind the end of an allocation.
__global__ void memcheck(int* four) {
  four[4 + threadIdx.x] = 1;
}

/// Of an allocation that nobody has written.
__global__ void initcheck(int* four) {
  four[0] = four[1] + 1;
}

/// What other warps write to shared memory, without a barrier.
__global__ void racecheck(int* four) {
  __shared__ int words[64];
  words[threadIdx.x] = four[threadIdx.x % 4];
  four[threadIdx.x % 4] = words[63 - threadIdx.x];
}

/// Barriers that the halves of a warp come to in different places.
__global__ void synccheck(int* four) {
  if (threadIdx.x % 32 < 16) {
    __syncthreads();
    four[0] = 1;
  } else {
    four[1] = 2;
    __syncthreads();
    four[2] = 3;
  }
}

enum class By { kSync, kArrive, kFlag };

/// What one warp writes another reads, round by round in two places in turn; a third warp has no part in it, and ends early. kSync: behind
/// a named barrier of the two. kArrive: the writer only arrives there, and waits at a second one until its place is free again. kFlag: by
/// words with release and acquire.
template <By by>
__global__ void control(int* four, int threads) {
  __shared__ int round[2][32], filled, taken;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  if (threadIdx.x == 0) filled = taken = 0;
  __syncthreads();
  if (warp == 2) return;
  const auto set = [](int& word, int value) {
    __syncwarp();
    if (threadIdx.x % 32 == 0)
      cuda::atomic_ref<int, cuda::thread_scope_block>(word).store(value, cuda::memory_order_release);
  };
  const auto await = [](int& word, int value) {
    while (cuda::atomic_ref<int, cuda::thread_scope_block>(word).load(cuda::memory_order_acquire) < value) {
    }
    __syncwarp();
  };
  int sum = 0;
  for (int i = 0; i < 16; ++i) {
    if (warp == 0) {
      if (by == By::kArrive && i >= 2)
        asm volatile("barrier.sync.aligned %0, %1;" ::"r"(7 + i % 2), "r"(threads) : "memory");
      if (by == By::kFlag && i >= 2) await(taken, i - 1);
      round[i % 2][lane] = i + lane;
      __syncwarp();
      if (by == By::kSync) asm volatile("barrier.sync.aligned %0, %1;" ::"r"(5), "r"(threads) : "memory");
      if (by == By::kArrive) asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(5 + i % 2), "r"(threads) : "memory");
      if (by == By::kFlag) set(filled, i + 1);
    } else {
      if (by == By::kSync) asm volatile("barrier.sync.aligned %0, %1;" ::"r"(5), "r"(threads) : "memory");
      if (by == By::kArrive) asm volatile("barrier.sync.aligned %0, %1;" ::"r"(5 + i % 2), "r"(threads) : "memory");
      if (by == By::kFlag) await(filled, i + 1);
      sum += round[i % 2][31 - lane];
      if (by == By::kArrive && i < 14)
        asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(7 + i % 2), "r"(threads) : "memory");
      if (by == By::kFlag) set(taken, i + 1);
    }
  }
  if (warp == 1) atomicAdd(four, sum);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string tool = argc > 1 ? argv[1] : "";
  int* four = nullptr;
  if (cudaMalloc(&four, 4 * sizeof(int)) != cudaSuccess) return 2;
  if (tool != "initcheck" && cudaMemset(four, 0, 4 * sizeof(int)) != cudaSuccess) return 2;
  if (tool == "memcheck")
    memcheck<<<1, 1>>>(four);
  else if (tool == "initcheck")
    initcheck<<<1, 1>>>(four);
  else if (tool == "racecheck")
    racecheck<<<1, 64>>>(four);
  else if (tool == "synccheck")
    synccheck<<<1, 64>>>(four);
  else if (tool == "sync")
    control<By::kSync><<<1, 96>>>(four, 64);
  else if (tool == "arrive")
    control<By::kArrive><<<1, 96>>>(four, 64);
  else if (tool == "flag")
    control<By::kFlag><<<1, 96>>>(four, 64);
  else
    return 2;
  std::printf("%s: %s\n", tool.c_str(), cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;
}
