// A counter on the GPU that makes every replay of a graph bring something else.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace anyep::test {

void load_replay_kernel();
void next_replay(std::uint32_t* replay, cudaStream_t stream);

}  // namespace anyep::test
