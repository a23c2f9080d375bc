// One fault for each tool of compute-sanitizer, so that a run without findings means something: planted_faults TOOL
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
