// Low-latency combine: rows of a rank's slabs and weighted sums of them.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/device/fp8.cuh"
#include "cuda/device/logfmt.cuh"
#include "cuda/device/packets.cuh"
#include "cuda/kernels/low_latency_combine.h"
#include "cuda/kernels/low_latency_gate.cuh"

namespace anyep::cuda::low_latency {

/// Which row of a slab an entry of the table names. Checked: the table is the caller's memory.
__device__ __forceinline__ bool is_row(const CombineParams& p, std::int32_t entry) {
  // Without branches; a negative entry is no expert.
  const auto expert = static_cast<unsigned>(entry >> kRowBits),
             row = static_cast<unsigned>(entry) & ((1u << kRowBits) - 1);
  return (expert < static_cast<unsigned>(p.call.num_local_experts)) &
         (row < static_cast<unsigned>(p.call.team.num_ranks * p.call.max_tokens));
}
__device__ __forceinline__ const std::byte* row_at(const CombineParams& p, std::int32_t entry) {
  return p.x + (entry >> kRowBits) * p.x_expert_stride + (entry & ((1 << kRowBits) - 1)) * p.x_row_stride;
}
/// This lane's entry for a token of a rank, on its way. Nothing waits before read(): -1 where there is none.
struct RawEntry {
  std::int32_t entry = -1;

  __device__ __forceinline__ RawEntry() {}
  __device__ __forceinline__ RawEntry(const CombineParams& p, int rank, int token) {
    if (lane_index() < p.call.top_k) {
      entry = p.rows[(rank * p.call.max_tokens + token) * p.call.top_k + lane_index()];
    }
  }
  __device__ __forceinline__ std::int32_t read(const CombineParams& p) const { return is_row(p, entry) ? entry : -1; }
};

// ---- strips --------------------------------------------------------------------------------------------------------

/// A lane's part of a strip: kSumElements have one vector a lane. LogFMT has strips of kStripElements and two vectors a lane,
/// 16 elements in a row, since 8 lanes share a group.
template <bool kLogFmt>
struct Vectors {
  static constexpr int kCount = kLogFmt ? 2 : 1;
  uint4 at[kCount];
};

/// First element of a lane's vector.
template <bool kLogFmt>
__device__ __forceinline__ int element_of(int strip, int vector) {
  return kLogFmt ? strip * kStripElements + lane_index() * 16 + vector * 8 : strip * kSumElements + lane_index() * 8;
}

template <bool kLogFmt>
__device__ __forceinline__ void load_strip(const std::byte* row, std::int64_t hidden, int strip, Vectors<kLogFmt>& to) {
#pragma unroll
  for (int v = 0; v < Vectors<kLogFmt>::kCount; ++v) {
    const int element = element_of<kLogFmt>(strip, v);
    to.at[v] = element < hidden ? ptx::load_l2(row + element * 2) : make_uint4(0, 0, 0, 0);
  }
}
template <bool kLogFmt>
__device__ __forceinline__ void store_strip(std::byte* row, std::int64_t hidden, int strip,
                                            const Vectors<kLogFmt>& from) {
#pragma unroll
  for (int v = 0; v < Vectors<kLogFmt>::kCount; ++v) {
    const int element = element_of<kLogFmt>(strip, v);
    if (element < hidden) *reinterpret_cast<uint4*>(row + element * 2) = from.at[v];
  }
}

/// Sums of a lane, in the order of its vectors.
template <bool kLogFmt>
struct Sums {
  float at[Vectors<kLogFmt>::kCount * 8] = {};
};

template <bool kLogFmt>
__device__ __forceinline__ void add_weighted(Sums<kLogFmt>& sums, const Vectors<kLogFmt>& row, float weight) {
#pragma unroll
  for (int v = 0; v < Vectors<kLogFmt>::kCount; ++v) {
    const std::uint32_t pairs[4] = {row.at[v].x, row.at[v].y, row.at[v].z, row.at[v].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& low = sums.at[v * 8 + 2 * i];
      float& high = sums.at[v * 8 + 2 * i + 1];
      low = __fmaf_rn(weight, low_bf16(pairs[i]), low);
      high = __fmaf_rn(weight, high_bf16(pairs[i]), high);
    }
  }
}
template <bool kLogFmt>
__device__ __forceinline__ void add(Sums<kLogFmt>& sums, const Vectors<kLogFmt>& row) {
#pragma unroll
  for (int v = 0; v < Vectors<kLogFmt>::kCount; ++v) {
    const std::uint32_t pairs[4] = {row.at[v].x, row.at[v].y, row.at[v].z, row.at[v].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums.at[v * 8 + 2 * i] += low_bf16(pairs[i]);
      sums.at[v * 8 + 2 * i + 1] += high_bf16(pairs[i]);
    }
  }
}
/// To nearest even; a NaN becomes 0x7fff (core::bf16_of_float).
__device__ __forceinline__ std::uint32_t bf16_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}
template <bool kLogFmt>
__device__ __forceinline__ Vectors<kLogFmt> rounded(const Sums<kLogFmt>& sums) {
  Vectors<kLogFmt> row;
#pragma unroll
  for (int v = 0; v < Vectors<kLogFmt>::kCount; ++v) {
    const float* const from = sums.at + v * 8;
    row.at[v] = make_uint4(bf16_pair(from[0], from[1]), bf16_pair(from[2], from[3]), bf16_pair(from[4], from[5]),
                           bf16_pair(from[6], from[7]));
  }
  return row;
}

/// What is asked about one choice, in its lane.
struct Asked {
  int expert = -1;  ///< local; -1 = not of this rank
  float weight = 0;
};

/// Rows of one token, one strip, of which as many are in registers as a token mostly has: of the lanes' entries, in order.
constexpr int kHeldRows = 8;
struct Held {
  Vectors<false> rows[kHeldRows];
};

/// Loads the rows of the entries of the first lanes. All lanes; nothing waits.
__device__ __forceinline__ void load_rows(const CombineParams& p, std::int32_t entry, int strip, Held& held) {
  const std::byte* const row = row_at(p, max(entry, 0));
  const unsigned hits = __ballot_sync(kAllLanes, entry >= 0);
  const bool here = element_of<false>(strip, 0) < p.call.hidden;
  // All addresses first: a shuffle behind a branch asks whether lanes have parted.
  const std::byte* at[kHeldRows];
#pragma unroll
  for (int i = 0; i < kHeldRows; ++i) at[i] = from_lane(row, i) + element_of<false>(strip, 0) * 2;
#pragma unroll
  for (int i = 0; i < kHeldRows; ++i) {
    held.rows[i].at[0] = here && (hits >> i & 1) != 0 ? ptx::load_l2(at[i]) : make_uint4(0, 0, 0, 0);
  }
}

/// weigh() where a table has another order than the choices, or a choice is not the one that was dispatched, or there are
/// many.
static __device__ __noinline__ Vectors<false> weigh_slowly(const CombineParams& p, std::int32_t entry,
                                                           const Asked asked, int strip) {
  Sums<false> sums;
#pragma unroll 1
  for (int choice = 0; choice < p.call.top_k; ++choice) {
    const int expert = from_lane(asked.expert, choice);
    const float weight = from_lane(asked.weight, choice);
    const unsigned same = __ballot_sync(kAllLanes, expert >= 0 && entry >= 0 && entry >> kRowBits == expert);
    if (same == 0) continue;
    Vectors<false> data;
    load_strip<false>(row_at(p, from_lane(entry, __ffs(static_cast<int>(same)) - 1)), p.call.hidden, strip, data);
    add_weighted(sums, data, weight);
  }
  return rounded(sums);
}

/// FP32 from 0, fma(weight, row) over the choices asked for, in their order, rounded to BF16. All lanes. row(i): the strip of the
/// entry of lane i, as far as there are; what is needed where the entries stand in the choices' order.
template <class Row>
__device__ __forceinline__ Vectors<false> weigh_rows(const CombineParams& p, std::int32_t entry, const Asked& asked,
                                                     int strip, Row&& row) {
  const unsigned hits = __ballot_sync(kAllLanes, entry >= 0);
  const bool differs = asked.expert != (entry >= 0 ? entry >> kRowBits : -1);
  if (hits >> kHeldRows != 0 || __any_sync(kAllLanes, differs)) return weigh_slowly(p, entry, asked, strip);
  float weights[kHeldRows];
#pragma unroll
  for (int i = 0; i < kHeldRows; ++i) weights[i] = from_lane(asked.weight, i);
  Sums<false> sums;
#pragma unroll
  for (int i = 0; i < kHeldRows; ++i) {
    if ((hits >> i & 1) != 0) add_weighted(sums, row(i), weights[i]);
  }
  return rounded(sums);
}
/// The same of rows in registers.
__device__ __forceinline__ Vectors<false> weigh(const CombineParams& p, std::int32_t entry, const Asked& asked,
                                                int strip, const Held& held) {
  return weigh_rows(p, entry, asked, strip, [&](int i) -> const Vectors<false>& { return held.rows[i]; });
}

/// The same over records that came per choice, one per lane: FP32 from 0 over the lanes in `choices`, ascending. LogFMT: a
/// word per strip says whether it is coded.
template <bool kLogFmt>
static __device__ __noinline__ Vectors<kLogFmt> weigh_records(unsigned choices, const std::byte* record, float weight,
                                                              int hidden, int strip) {
  Sums<kLogFmt> sums;
  const int lane = lane_index();
  const bool here = element_of<true>(strip, 0) < hidden;
#pragma unroll 4
  for (; choices != 0; choices &= choices - 1) {
    const int choice = __ffs(static_cast<int>(choices)) - 1;
    const std::byte* const from = from_lane(record, choice);
    const float factor = from_lane(weight, choice);
    Vectors<kLogFmt> row;
    if constexpr (!kLogFmt) {
      load_strip<false>(from, hidden, strip, row);
      add_weighted(sums, row, factor);
    } else {
      const std::uint32_t coded = __ldcg(reinterpret_cast<const std::uint32_t*>(from) + strip);
      const std::byte* const body = from + kAlignment + strip * 1024;
      if (!here) continue;
      if (coded != 0) {
        float values[16];
        logfmt_values(ptx::load_l2(body + lane * 16),
                      __ldcg(reinterpret_cast<const std::uint32_t*>(body + kLogFmtHighBytes + lane * 4)),
                      __ldcg(reinterpret_cast<const std::uint32_t*>(body + kLogFmtEndsAt + lane / 8 * 4)), values);
#pragma unroll
        for (int i = 0; i < 16; ++i) sums.at[i] = __fmaf_rn(factor, values[i], sums.at[i]);
      } else {
        row.at[0] = ptx::load_l2(body + lane * 32);
        row.at[1] = ptx::load_l2(body + lane * 32 + 16);
        add_weighted(sums, row, factor);
      }
    }
  }
  return rounded(sums);
}

/// Copies a strip of an expert's row to a record. LogFMT: coded if all groups of its chunk qualify; a chunk is 1024
/// channels, two strips, where that divides the row.
template <bool kLogFmt>
__device__ __forceinline__ void put_record(std::byte* record, const std::byte* row, std::int64_t hidden, int strip) {
  Vectors<kLogFmt> data;
  load_strip<kLogFmt>(row, hidden, strip, data);
  if constexpr (!kLogFmt) {
    *reinterpret_cast<uint4*>(record + strip * 512 + lane_index() * 16) = data.at[0];
  } else {
    const bool here = element_of<true>(strip, 0) < hidden;
    bool coded = logfmt_strip_qualifies(data.at, here);
    if (core::logfmt_chunk(hidden) == 2 * kStripElements) {
      Vectors<true> other;
      load_strip<true>(row, hidden, strip ^ 1, other);
      coded = logfmt_strip_qualifies(other.at, true) && coded;
    }
    std::byte* const body = record + kAlignment + strip * 1024;
    if (lane_index() == 0) reinterpret_cast<std::uint32_t*>(record)[strip] = coded ? 1 : 0;
    if (coded) {
      logfmt_store(body, data.at, here);
    } else if (here) {
      *reinterpret_cast<uint4*>(body + lane_index() * 32) = data.at[0];
      *reinterpret_cast<uint4*>(body + lane_index() * 32 + 16) = data.at[1];
    }
  }
}

}  // namespace anyep::cuda::low_latency
