// LogFMT-10 as one warp does it: a strip of 512 channels, 16 a lane, 8 lanes a group of 128. Arithmetic: core/logfmt.h.
//
// On the wire between GPUs every strip has its 1024 bytes, whether coded or not, so that warps need not know of each
// other. A coded strip uses 656 of them:
//   [32 lanes] 16 low bytes of the codes | [32 lanes] 4 bytes: 16 ninth bits, 16 signs | [4 groups] amax, amin
#pragma once

#include <cstdint>

#include "core/logfmt.h"
#include "cuda/device/warp.cuh"

namespace anyep::cuda {

inline constexpr int kLogFmtHighBytes = 512, kLogFmtEndsAt = 640;

/// The 16 BF16 values of a lane, by position.
__device__ __forceinline__ std::uint16_t bf16_at(const uint4 (&row)[2], int i) {
  const uint4& half = row[i / 8];
  const std::uint32_t pair = i % 8 < 2 ? half.x : i % 8 < 4 ? half.y : i % 8 < 6 ? half.z : half.w;
  return static_cast<std::uint16_t>(i % 2 == 0 ? pair : pair >> 16);
}

/// Ends of the lane's group. All lanes.
__device__ __forceinline__ core::LogFmtEnds logfmt_ends_of(const uint4 (&row)[2]) {
  unsigned amax = 0, amin = 0x7fff;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const unsigned magnitude = bf16_at(row, i) & 0x7fffu;
    amax = max(amax, magnitude);
    amin = min(amin, magnitude);
  }
#pragma unroll
  for (int lanes = 4; lanes > 0; lanes /= 2) {
    amax = max(amax, __shfl_xor_sync(kAllLanes, amax, lanes));
    amin = min(amin, __shfl_xor_sync(kAllLanes, amin, lanes));
  }
  return {static_cast<std::uint16_t>(amax), static_cast<std::uint16_t>(amin)};
}

/// Does every group of the strip that has channels (lanes with `here`) qualify? All lanes.
__device__ __forceinline__ bool logfmt_strip_qualifies(const uint4 (&row)[2], bool here) {
  const core::LogFmtEnds ends = logfmt_ends_of(row);
  return __all_sync(kAllLanes, !here || core::logfmt_qualifies(ends));
}

/// Codes a strip of which every group qualifies. All lanes.
__device__ __forceinline__ void logfmt_store(std::byte* to, const uint4 (&row)[2], bool here) {
  const core::LogFmtEnds ends = logfmt_ends_of(row);
  const int lane = lane_index();
  if (!here) return;
  const core::LogFmtGroup group = core::logfmt_group(ends);
  std::uint32_t low[4] = {}, high = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const std::uint16_t bits = bf16_at(row, i);
    const std::uint32_t code = core::logfmt_code(group, static_cast<std::uint16_t>(bits & 0x7fffu));
    low[i / 4] |= (code & 0xFFu) << (8 * (i % 4));
    high |= (code >> 8 & 1u) << i | static_cast<std::uint32_t>(bits >> 15) << (16 + i);
  }
  *reinterpret_cast<uint4*>(to + lane * 16) = make_uint4(low[0], low[1], low[2], low[3]);
  *reinterpret_cast<std::uint32_t*>(to + kLogFmtHighBytes + lane * 4) = high;
  if (lane % 8 == 0) {
    *reinterpret_cast<std::uint32_t*>(to + kLogFmtEndsAt + lane / 8 * 4) =
        ends.amax | static_cast<std::uint32_t>(ends.amin) << 16;
  }
}

/// What a lane decodes; `low`, `high` and `ends` are its parts of the strip.
__device__ __forceinline__ void logfmt_values(const uint4& low, std::uint32_t high, std::uint32_t ends,
                                              float (&values)[16]) {
  const core::LogFmtGroup group =
      core::logfmt_group({static_cast<std::uint16_t>(ends), static_cast<std::uint16_t>(ends >> 16)});
  const std::uint32_t parts[4] = {low.x, low.y, low.z, low.w};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const std::uint32_t code = (parts[i / 4] >> (8 * (i % 4)) & 0xFFu) | (high >> i & 1u) << 8;
    const std::uint32_t sign = (high >> (16 + i) & 1u) << 31;
    values[i] = core::float_of_bits(core::bits_of(core::logfmt_value(group, code)) | sign);
  }
}

}  // namespace anyep::cuda
