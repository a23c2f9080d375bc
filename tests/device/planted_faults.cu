// One fault for each tool of compute-sanitizer, so that a run without findings means something: planted_faults TOOL. And a right
// program that is made as the low-latency kernels are, so that findings mean something: planted_faults control
#include <cuda_runtime.h>

#include <cstdio>
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

/// What one warp writes is read by another behind a named barrier of the two, rounds in turn in two places; a third warp has no part
/// in it, and ends early.
__global__ void control(int* four, int threads) {
  __shared__ int round[2][32];
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  if (warp == 2) return;
  int sum = 0;
  for (int i = 0; i < 16; ++i) {
    if (warp == 0) round[i % 2][lane] = i + lane;
    __syncwarp();
    asm volatile("barrier.sync.aligned %0, %1;" ::"r"(5), "r"(threads) : "memory");
    if (warp == 1) sum += round[i % 2][31 - lane];
  }
  if (warp == 1) atomicAdd(four, sum);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string tool = argc > 1 ? argv[1] : "";
  int* four = nullptr;
  if (cudaMalloc(&four, 4 * sizeof(int)) != cudaSuccess) return 2;
  if (tool == "memcheck")
    memcheck<<<1, 1>>>(four);
  else if (tool == "initcheck")
    initcheck<<<1, 1>>>(four);
  else if (tool == "racecheck")
    racecheck<<<1, 64>>>(four);
  else if (tool == "synccheck")
    synccheck<<<1, 64>>>(four);
  else
    return 2;
  std::printf("%s: %s\n", tool.c_str(), cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;
}
