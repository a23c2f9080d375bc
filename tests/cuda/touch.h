// Kernels with which the tests of memory touch it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace anyep::test {

/// words[i] = seed + i
void fill(std::uint32_t* words, std::uint64_t count, std::uint32_t seed, cudaStream_t stream);
/// Adds to *different how many words are not seed + i.
void count_different(const std::uint32_t* words, std::uint64_t count, std::uint32_t seed, std::uint32_t* different,
                     cudaStream_t stream);
/// Polls *go until it is not 0, at most `limit_ns`, then fills; sets started[0] first, and started[1] where the limit passed.
void fill_when_told(std::uint32_t* words, std::uint64_t count, std::uint32_t seed, const std::uint32_t* go,
                    std::uint32_t* started, std::uint64_t limit_ns, cudaStream_t stream);
/// Reads and writes words[i] = seed + i for `ns`; adds to *different how many were something else.
void keep_touching(std::uint32_t* words, std::uint64_t count, std::uint32_t seed, std::uint32_t* different,
                   std::uint64_t ns, cudaStream_t stream);

}  // namespace anyep::test
