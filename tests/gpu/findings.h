// What checkers on the host and on the GPU share: random numbers, warps and threads alone, counts of what differs.
#pragma once

#include <cstdint>
#include <string>

#include "core/hd.h"

namespace anyep::test {

/// What differs, for counting and for the first of them to be shown.
enum class Field : std::uint32_t { kNone, kCounts, kRange, kSource, kRow, kScale, kOut };
struct Findings {
  unsigned long long wrong, rows, tokens, pairs;  ///< elements that differ; what was looked at
  std::uint32_t claimed;
  Field field;
  std::uint32_t salt;
  int at, row, column;  ///< expert of this rank, source rank, or token
  unsigned long long got, want;
};

/// How many differ, and the first.
std::string text_of(const Findings& found);

/// One thread says what differs, if it does. `salt` tells whose it is.
ANYEP_HD inline void find(Findings& findings, Field field, std::uint32_t salt, int at, int row, int column,
                          unsigned long long got, unsigned long long want) {
  if (got == want) return;
#if defined(__CUDA_ARCH__)
  atomicAdd(&findings.wrong, 1ull);
  if (atomicExch(&findings.claimed, 1u) != 0) return;
#else
  ++findings.wrong;
  if (findings.claimed != 0) return;
  findings.claimed = 1;
#endif
  findings.field = field;
  findings.salt = salt;
  findings.at = at;
  findings.row = row;
  findings.column = column;
  findings.got = got;
  findings.want = want;
}

ANYEP_HD inline void add(unsigned long long& sum, unsigned long long value) {
#if defined(__CUDA_ARCH__)
  atomicAdd(&sum, value);
#else
  sum += value;
#endif
}

ANYEP_HD inline std::uint32_t mix(std::uint32_t value) {
  value ^= value >> 16;
  value *= 0x7feb352du;
  value ^= value >> 15;
  value *= 0x846ca68bu;
  return value ^ value >> 16;
}

ANYEP_HD inline int count_bits(std::uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

/// One thread by itself, as a checker on the host is.
struct Alone {
  static constexpr int kCount = 1;
  int index() const { return 0; }
  std::uint32_t ballot(bool yes) const { return yes ? 1 : 0; }
  std::uint32_t below() const { return 0; }
  std::uint32_t largest(std::uint32_t value) const { return value; }
};

#if defined(__CUDACC__)
struct Warp {
  static constexpr int kCount = 32;
#if defined(__CUDA_ARCH__)
  __host__ __device__ int index() const {
    return static_cast<int>(threadIdx.x % 32);
  }
  __host__ __device__ std::uint32_t ballot(bool yes) const {
    return __ballot_sync(0xFFFF'FFFFu, yes);
  }
  __host__ __device__ std::uint32_t below() const {
    return (1u << index()) - 1;
  }
  __host__ __device__ std::uint32_t largest(std::uint32_t value) const {
    return __reduce_max_sync(0xFFFF'FFFFu, value);
  }
#else
  int index() const {
    return 0;
  }
  std::uint32_t ballot(bool) const {
    return 0;
  }
  std::uint32_t below() const {
    return 0;
  }
  std::uint32_t largest(std::uint32_t) const {
    return 0;
  }
#endif
};
#endif

}  // namespace anyep::test
