#include "touch.h"

#include "protocol/platform.h"

namespace anyep::test {
namespace {

__device__ std::uint64_t first() {
  return blockIdx.x * static_cast<std::uint64_t>(blockDim.x) + threadIdx.x;
}
__device__ std::uint64_t stride() {
  return gridDim.x * static_cast<std::uint64_t>(blockDim.x);
}

__global__ void fill_it(std::uint32_t* words, std::uint64_t count, std::uint32_t seed) {
  for (std::uint64_t i = first(); i < count; i += stride()) words[i] = seed + static_cast<std::uint32_t>(i);
}

__global__ void count_it(const volatile std::uint32_t* words, std::uint64_t count, std::uint32_t seed,
                         std::uint32_t* different) {
  std::uint32_t mine = 0;
  for (std::uint64_t i = first(); i < count; i += stride()) mine += words[i] != seed + static_cast<std::uint32_t>(i);
  if (mine != 0) protocol::Shared(*different).fetch_add(mine, protocol::kRelaxed);
}

__global__ void wait_and_fill(std::uint32_t* words, std::uint64_t count, std::uint32_t seed, const std::uint32_t* go,
                              std::uint32_t* started, std::uint64_t limit_ns) {
  const std::uint64_t begin = protocol::now_ns();
  if (threadIdx.x == 0) protocol::Shared(started[0]).store(1, protocol::kRelaxed);
  bool late = false;
  while (!late && protocol::Shared(*const_cast<std::uint32_t*>(go)).load(protocol::kAcquire) == 0) {
    late = protocol::now_ns() - begin > limit_ns;
  }
  if (late) {
    if (threadIdx.x == 0) protocol::Shared(started[1]).store(1, protocol::kRelaxed);
    return;
  }
  for (std::uint64_t i = threadIdx.x; i < count; i += blockDim.x) words[i] = seed + static_cast<std::uint32_t>(i);
}

__global__ void touch_it(volatile std::uint32_t* words, std::uint64_t count, std::uint32_t seed,
                         std::uint32_t* different, std::uint64_t ns) {
  const std::uint64_t begin = protocol::now_ns();
  std::uint32_t mine = 0;
  while (protocol::now_ns() - begin < ns) {
    for (std::uint64_t i = threadIdx.x; i < count; i += std::uint64_t{997} * blockDim.x) {
      mine += words[i] != seed + static_cast<std::uint32_t>(i);
      words[i] = seed + static_cast<std::uint32_t>(i);
    }
  }
  if (mine != 0) protocol::Shared(*different).fetch_add(mine, protocol::kRelaxed);
}

}  // namespace

void fill(std::uint32_t* words, std::uint64_t count, std::uint32_t seed, cudaStream_t stream) {
  fill_it<<<16, 256, 0, stream>>>(words, count, seed);
}

void count_different(const std::uint32_t* words, std::uint64_t count, std::uint32_t seed, std::uint32_t* different,
                     cudaStream_t stream) {
  count_it<<<16, 256, 0, stream>>>(words, count, seed, different);
}

void fill_when_told(std::uint32_t* words, std::uint64_t count, std::uint32_t seed, const std::uint32_t* go,
                    std::uint32_t* started, std::uint64_t limit_ns, cudaStream_t stream) {
  wait_and_fill<<<1, 256, 0, stream>>>(words, count, seed, go, started, limit_ns);
}

void keep_touching(std::uint32_t* words, std::uint64_t count, std::uint32_t seed, std::uint32_t* different,
                   std::uint64_t ns, cudaStream_t stream) {
  touch_it<<<1, 256, 0, stream>>>(words, count, seed, different, ns);
}

}  // namespace anyep::test
