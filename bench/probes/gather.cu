#include <cuda_bf16.h>

#include <algorithm>

#include "bench/probes/device.cuh"

namespace anyep::bench::probes {
namespace {

constexpr int kMostWarps = 30;
constexpr int kMostSegment = 3584;  ///< a quarter of a row of 7168 elements
constexpr int kAccess = 16, kPerAccess = kAccess / 2;
constexpr int kAhead = kStages + 1;  ///< units whose places are known or on their way

__device__ void add(float (&sum)[kPerAccess], uint4 values) {
  const auto* const pairs = reinterpret_cast<const __nv_bfloat162*>(&values);
#pragma unroll
  for (int i = 0; i < kPerAccess / 2; ++i) {
    const float2 pair = __bfloat1622float2(pairs[i]);
    sum[2 * i] += pair.x;
    sum[2 * i + 1] += pair.y;
  }
}

__device__ uint4 rounded(const float (&sum)[kPerAccess]) {
  uint4 values;
  auto* const pairs = reinterpret_cast<__nv_bfloat162*>(&values);
#pragma unroll
  for (int i = 0; i < kPerAccess / 2; ++i) pairs[i] = __floats2bfloat162_rn(sum[2 * i], sum[2 * i + 1]);
  return values;
}

/// The usual case between two ranks: segments of the full size, one of each.
[[maybe_unused]] __device__ void add_two(const std::byte* one, const std::byte* other, std::byte* out) {
  constexpr int kAccesses = kMostSegment / (kAccess * kLanes), kStep = kLanes * kAccess;
#pragma unroll
  for (int i = 0; i < kAccesses; ++i) {
    const uint4 a = *reinterpret_cast<const uint4*>(one + i * kStep),
                b = *reinterpret_cast<const uint4*>(other + i * kStep);
    float sum[kPerAccess] = {};
    add(sum, a);
    add(sum, b);
    __stcs(reinterpret_cast<uint4*>(out + i * kStep), rounded(sum));
  }
}

/// A unit is a segment of a token.
template <Order kOrder>
__device__ void gather_by_bulk_copies(const Gather& p, std::int32_t* before) {
  extern __shared__ __align__(128) std::byte segments[];
  __shared__ std::uint64_t barriers[kMostWarps * kStages];
  const int lane = static_cast<int>(threadIdx.x % kLanes), warp = static_cast<int>(threadIdx.x / kLanes);
  const int warps = static_cast<int>(blockDim.x / kLanes), ranks = p.places.num_ranks;
  const int bytes = p.segment_bytes, per_row = p.row_bytes / bytes;
  std::byte* const ring = segments + static_cast<std::size_t>(warp) * kStages * static_cast<std::size_t>(ranks * bytes);
  std::uint64_t* const loaded = barriers + warp * kStages;

  const auto slot = [&](int step, int rank) {
    return ring + static_cast<std::size_t>((step % kStages) * ranks + rank) * static_cast<std::size_t>(bytes);
  };
  const auto place = [&](int unit) {
    return unit >= 0 && lane < ranks ? p.places.row[unit / per_row * ranks + lane] : -1;
  };
  const auto load = [&](int unit, int& row, int step) {
    row = lane < ranks ? row_at(p.places, before, unit / per_row, lane, row) : -1;
    const unsigned wanted = __ballot_sync(kAllLanes, row >= 0);
    if (lane == 0) mbarrier::expect(loaded[step % kStages], static_cast<std::uint32_t>(__popc(wanted) * bytes));
    __syncwarp();
    if (row < 0) return;
    bulk::load(slot(step, lane),
               p.in.base[lane] + static_cast<std::size_t>(row) * static_cast<std::size_t>(p.row_bytes) +
                   unit % per_row * bytes,
               static_cast<std::uint32_t>(bytes), loaded[step % kStages]);
  };

  if (lane == 0) mbarrier::init(loaded, kStages);
  load_ranges(p.places, before);
  Units<kOrder, kAhead> units(static_cast<int>(blockIdx.x) * warps + warp, static_cast<int>(gridDim.x) * warps,
                              p.places.num_tokens * per_row, &p.counters->ticket);
  int unit[kAhead], row[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    unit[i] = units.next();
    row[i] = place(unit[i]);
  }
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (unit[i] >= 0) load(unit[i], row[i], i);
  }
  for (int step = 0; unit[0] >= 0; ++step) {
    bulk::used_before_copy();  // every reader, then the barrier, then the load (pattern J)
    __syncwarp();
    if (unit[kStages - 1] >= 0) load(unit[kStages - 1], row[kStages - 1], step + kStages - 1);
    const unsigned ranks_of_token = __ballot_sync(kAllLanes, row[0] >= 0);
    std::byte* const out = p.out + static_cast<std::size_t>(unit[0] / per_row) * static_cast<std::size_t>(p.row_bytes) +
                           unit[0] % per_row * bytes;
    mbarrier::wait(loaded[step % kStages], static_cast<std::uint32_t>(step / kStages) & 1);
    if (ranks == 2 && ranks_of_token == 3 && bytes == kMostSegment) {
      add_two(slot(step, 0) + lane * kAccess, slot(step, 1) + lane * kAccess, out + lane * kAccess);
    } else {
      for (int at = lane * kAccess; at < bytes; at += kLanes * kAccess) {
        float sum[kPerAccess] = {};
        for (unsigned left = ranks_of_token; left != 0; left &= left - 1) {
          add(sum, *reinterpret_cast<const uint4*>(slot(step, __ffs(static_cast<int>(left)) - 1) + at));
        }
        __stcs(reinterpret_cast<uint4*>(out + at), rounded(sum));
      }
    }
#pragma unroll
    for (int i = 0; i + 1 < kAhead; ++i) {
      unit[i] = unit[i + 1];
      row[i] = row[i + 1];
    }
    unit[kAhead - 1] = units.next();
    row[kAhead - 1] = place(unit[kAhead - 1]);
  }
}

template <Order kOrder>
__device__ void gather_by_loads(const Gather& p, std::int32_t* before) {
  const int lane = static_cast<int>(threadIdx.x % kLanes), warps = static_cast<int>(blockDim.x / kLanes);
  const int worker = static_cast<int>(blockIdx.x) * warps + static_cast<int>(threadIdx.x / kLanes);
  const int ranks = p.places.num_ranks;
  Units<kOrder, kAhead> units(worker, static_cast<int>(gridDim.x) * warps, p.places.num_tokens, &p.counters->ticket);
  load_ranges(p.places, before);
  for (int token = units.next(); token >= 0; token = units.next()) {
    for (int at = lane * kAccess; at < p.row_bytes; at += kLanes * kAccess) {
      float sum[kPerAccess] = {};
      for (int rank = 0; rank < ranks; ++rank) {
        const int row = row_at(p.places, before, token, rank, p.places.row[token * ranks + rank]);
        if (row < 0) continue;
        const std::size_t from = static_cast<std::size_t>(row) * static_cast<std::size_t>(p.row_bytes);
        add(sum, __ldcg(reinterpret_cast<const uint4*>(p.in.base[rank] + from + at)));
      }
      std::byte* const out = p.out + static_cast<std::size_t>(token) * static_cast<std::size_t>(p.row_bytes);
      __stcs(reinterpret_cast<uint4*>(out + at), rounded(sum));
    }
  }
}

template <Order kOrder>
__global__ void __launch_bounds__(kMostWarps* kLanes, 1) gather_rows(const __grid_constant__ Gather p) {
  __shared__ std::int32_t before[Places::kRanges * kMaxRanks];
  if constexpr (cuda::ptx::kBulkCopies) {
    gather_by_bulk_copies<kOrder>(p, before);
  } else {
    gather_by_loads<kOrder>(p, before);
  }
  end(p.counters);
}

/// The longest one that cuts a row evenly.
int segment_of(int row_bytes) {
  int parts = (row_bytes + kMostSegment - 1) / kMostSegment;
  while (row_bytes % (parts * kAccess) != 0) ++parts;
  return row_bytes / parts;
}

}  // namespace

void gather(Gather gather, Order order, int sms, cudaStream_t stream) {
  gather.segment_bytes = segment_of(gather.row_bytes);
  const int warp_ring = kStages * gather.places.num_ranks * gather.segment_bytes;
  const int warps = std::clamp(kSharedBytes / warp_ring, 1, kMostWarps);
  launch(order == Order::kTickets ? gather_rows<Order::kTickets> : gather_rows<Order::kStrides>, sms, warps * kLanes,
         static_cast<std::size_t>(warps * warp_ring), stream, gather);
}

}  // namespace anyep::bench::probes
