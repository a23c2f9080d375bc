// Low-latency combine: which row of a slab belongs to a token, and weighted sums of rows.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/device/fp8.cuh"
#include "cuda/device/logfmt.cuh"
#include "cuda/device/packets.cuh"
#include "cuda/kernels/low_latency_combine.h"
#include "cuda/kernels/low_latency_frame.cuh"

namespace anyep::cuda::low_latency {

/// Rows looked up at a time; at least one per expert of a rank alone, and one per expert of all ranks for one token.
inline constexpr int kTableRows = 2048;
static_assert(kTableRows >= kMaxExperts + kMaxRanks);

/// Which rows to look up: of one source many tokens, or of one token all sources.
struct Wanted {
  int source, token;
  int num_sources, num_tokens;  ///< one of them is 1
};

/// rows[pair][local expert] = the row of the pair's token in the expert's slab, -1 = none; pairs are sources source,
/// source + 1, ... (around) or tokens token, token + 1, ... Only range and source index are needed: a source's tokens ascend
/// inside an expert's range, so a search finds them. By threads [0, threads); a barrier must follow. Out of line as weigh().
static __device__ __noinline__ void search_rows(std::int32_t* rows, const std::int64_t* ranges,
                                                const std::int32_t* sources, Wanted wanted, int ranks, int experts,
                                                int slab_rows, int threads) {
  const int thread = static_cast<int>(threadIdx.x);
  constexpr int kUnroll = 4;
  const int total = wanted.num_sources * wanted.num_tokens * experts;
  const float per_pair = __frcp_rn(static_cast<float>(experts));
#pragma unroll 1
  for (int base = thread; base < total; base += kUnroll * threads) {
    int low[kUnroll], high[kUnroll], token[kUnroll], found[kUnroll];
    const std::int32_t* source[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      low[i] = high[i] = 0;
      found[i] = -1;
      const int at = base + i * threads;
      if (at >= total) continue;
      // A division: exact, since at < kTableRows and the half keeps the quotient away from whole numbers.
      const int pair = static_cast<int>((static_cast<float>(at) + 0.5f) * per_pair), expert = at - pair * experts;
      int from = wanted.source;
      token[i] = wanted.token;
      if (wanted.num_tokens > 1) {
        token[i] += pair;
      } else {
        from += pair;
        if (from >= ranks) from -= ranks;
      }
      source[i] = sources + static_cast<std::int64_t>(expert) * slab_rows;
      const std::int64_t packed = ranges[expert * ranks + from];
      // Cut to the slab: the arrays are the caller's.
      const std::int64_t begin = min(max(packed >> 32, std::int64_t{0}), std::int64_t{slab_rows});
      const std::int64_t count = min(packed & 0xFFFF'FFFF, slab_rows - begin);
      low[i] = static_cast<int>(begin);
      high[i] = static_cast<int>(begin + count);
    }
#pragma unroll 1
    for (bool searching = true; searching;) {
      searching = false;
      std::int32_t middle[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        if (low[i] < high[i]) middle[i] = source[i][(low[i] + high[i]) / 2];
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        if (low[i] >= high[i]) continue;
        const int at = (low[i] + high[i]) / 2;
        if (middle[i] == token[i]) {
          found[i] = at;
          low[i] = high[i];
        } else if (middle[i] < token[i]) {
          low[i] = at + 1;
        } else {
          high[i] = at;
        }
        searching = searching || low[i] < high[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (base + i * threads < total) rows[base + i * threads] = found[i];
    }
  }
}

__device__ __forceinline__ void find_rows(const CombineParams& p, std::int32_t* rows, const Wanted& wanted,
                                          int threads) {
  const CallParams& call = p.call;
  search_rows(rows, p.range, p.source, wanted, call.team.num_ranks, call.num_local_experts,
              call.team.num_ranks * call.max_tokens, threads);
}

// ---- strips --------------------------------------------------------------------------------------------------------

/// First element of a lane's vector. LogFMT lanes hold 16 elements in a row, since 8 lanes share a group.
template <bool kLogFmt>
__device__ __forceinline__ int element_of(int strip, int vector) {
  return strip * kStripElements + (kLogFmt ? lane_index() * 16 + vector * 8 : (vector * kLanes + lane_index()) * 8);
}

template <bool kLogFmt>
__device__ __forceinline__ void load_strip(const std::byte* row, std::int64_t hidden, int strip, uint4 (&to)[2]) {
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    const int element = element_of<kLogFmt>(strip, v);
    to[v] = element < hidden ? ptx::load_l2(row + element * 2) : make_uint4(0, 0, 0, 0);
  }
}
template <bool kLogFmt>
__device__ __forceinline__ void store_strip(std::byte* row, std::int64_t hidden, int strip, const uint4 (&from)[2]) {
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    const int element = element_of<kLogFmt>(strip, v);
    if (element < hidden) *reinterpret_cast<uint4*>(row + element * 2) = from[v];
  }
}

/// 16 sums of a lane, in the order of its two vectors.
using Sums = float[16];

__device__ __forceinline__ void add_weighted(Sums& sums, const uint4 (&row)[2], float weight) {
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    const std::uint32_t pairs[4] = {row[v].x, row[v].y, row[v].z, row[v].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[v * 8 + 2 * i] = __fmaf_rn(weight, low_bf16(pairs[i]), sums[v * 8 + 2 * i]);
      sums[v * 8 + 2 * i + 1] = __fmaf_rn(weight, high_bf16(pairs[i]), sums[v * 8 + 2 * i + 1]);
    }
  }
}
__device__ __forceinline__ void add(Sums& sums, const uint4 (&row)[2]) {
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    const std::uint32_t pairs[4] = {row[v].x, row[v].y, row[v].z, row[v].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[v * 8 + 2 * i] += low_bf16(pairs[i]);
      sums[v * 8 + 2 * i + 1] += high_bf16(pairs[i]);
    }
  }
}
/// To nearest even; a NaN becomes 0x7fff (core::bf16_of_float).
__device__ __forceinline__ std::uint32_t bf16_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}
__device__ __forceinline__ void round_sums(const Sums& sums, uint4 (&row)[2]) {
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    row[v] = make_uint4(bf16_pair(sums[v * 8], sums[v * 8 + 1]), bf16_pair(sums[v * 8 + 2], sums[v * 8 + 3]),
                        bf16_pair(sums[v * 8 + 4], sums[v * 8 + 5]), bf16_pair(sums[v * 8 + 6], sums[v * 8 + 7]));
  }
}

/// A strip's two vectors in a lane.
struct Vectors {
  uint4 at[2];
};

/// FP32 from 0, fma(weight, row) over the lanes in `choices`, ascending, rounded to BF16: lane k holds choice k's row and
/// weight. All lanes. Out of line, with arguments by value: it is long and called from several places, and code that is
/// not there yet costs more than a call.
static __device__ __noinline__ Vectors weigh(unsigned choices, const std::byte* row, float weight, int hidden,
                                             int strip) {
  constexpr int kBatch = 8;  // loads in flight
  Sums sums = {};
#pragma unroll 1
  while (choices != 0) {
    uint4 rows[kBatch][2];
    unsigned left = choices;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (left == 0) break;
      load_strip<false>(from_lane(row, __ffs(static_cast<int>(left)) - 1), hidden, strip, rows[i]);
      left &= left - 1;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (choices == 0) break;
      add_weighted(sums, rows[i], from_lane(weight, __ffs(static_cast<int>(choices)) - 1));
      choices &= choices - 1;
    }
  }
  Vectors rounded;
  round_sums(sums, rounded.at);
  return rounded;
}

/// The same over LogFMT records: a word per strip says whether it is coded.
static __device__ __noinline__ Vectors weigh_logfmt(unsigned choices, const std::byte* record, float weight, int hidden,
                                                    int strip) {
  Sums sums = {};
  const int lane = lane_index();
  const bool here = element_of<true>(strip, 0) < hidden;
#pragma unroll 1
  for (; choices != 0; choices &= choices - 1) {
    const int choice = __ffs(static_cast<int>(choices)) - 1;
    const std::byte* const from = from_lane(record, choice);
    const float factor = from_lane(weight, choice);
    const std::uint32_t coded = __ldcg(reinterpret_cast<const std::uint32_t*>(from) + strip);
    const std::byte* const body = from + kAlignment + strip * 1024;
    if (!here) continue;
    if (coded != 0) {
      float values[16];
      logfmt_values(ptx::load_l2(body + lane * 16),
                    __ldcg(reinterpret_cast<const std::uint32_t*>(body + kLogFmtHighBytes + lane * 4)),
                    __ldcg(reinterpret_cast<const std::uint32_t*>(body + kLogFmtEndsAt + lane / 8 * 4)), values);
#pragma unroll
      for (int i = 0; i < 16; ++i) sums[i] = __fmaf_rn(factor, values[i], sums[i]);
    } else {
      uint4 row[2];
      row[0] = ptx::load_l2(body + lane * 32);
      row[1] = ptx::load_l2(body + lane * 32 + 16);
      add_weighted(sums, row, factor);
    }
  }
  Vectors rounded;
  round_sums(sums, rounded.at);
  return rounded;
}

/// Copies a strip of an expert's row to a record. LogFMT: coded if all groups of its chunk qualify; a chunk is 1024
/// channels, two strips, where that divides the row.
template <bool kLogFmt>
__device__ __forceinline__ void put_record(std::byte* record, const std::byte* row, std::int64_t hidden, int strip) {
  uint4 data[2];
  load_strip<kLogFmt>(row, hidden, strip, data);
  if constexpr (!kLogFmt) {
    std::byte* const to = record + strip * 1024 + lane_index() * 16;
    *reinterpret_cast<uint4*>(to) = data[0];
    *reinterpret_cast<uint4*>(to + 512) = data[1];
  } else {
    const bool here = element_of<true>(strip, 0) < hidden;
    bool coded = logfmt_strip_qualifies(data, here);
    if (core::logfmt_chunk(hidden) == 2 * kStripElements) {
      uint4 other[2];
      load_strip<true>(row, hidden, strip ^ 1, other);
      coded = logfmt_strip_qualifies(other, true) && coded;
    }
    std::byte* const body = record + kAlignment + strip * 1024;
    if (lane_index() == 0) reinterpret_cast<std::uint32_t*>(record)[strip] = coded ? 1 : 0;
    if (coded) {
      logfmt_store(body, data, here);
    } else if (here) {
      *reinterpret_cast<uint4*>(body + lane_index() * 32) = data[0];
      *reinterpret_cast<uint4*>(body + lane_index() * 32 + 16) = data[1];
    }
  }
}

}  // namespace anyep::cuda::low_latency
