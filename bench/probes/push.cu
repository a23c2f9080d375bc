#include <algorithm>

#include "bench/probes/device.cuh"

namespace anyep::bench::probes {
namespace {

constexpr int kMostWarps = 20;
/// Of rows in flight in a block: 7 warps with BF16 rows of 7168 elements, 14 with FP8 rows, was best.
constexpr int kRingBytes = 208 * 1024;

template <Order kOrder>
__device__ void push_by_bulk_copies(const Push& p, std::int32_t* before) {
  extern __shared__ __align__(128) std::byte rows[];
  __shared__ std::uint64_t barriers[kMostWarps * kStages];
  const int lane = static_cast<int>(threadIdx.x % kLanes), warp = static_cast<int>(threadIdx.x / kLanes);
  const int warps = static_cast<int>(blockDim.x / kLanes), ranks = p.places.num_ranks;
  const auto bytes = static_cast<std::uint32_t>(p.row_bytes);
  std::byte* const ring = rows + static_cast<std::size_t>(warp) * kStages * bytes;
  std::uint64_t* const loaded = barriers + warp * kStages;

  const auto load = [&](int token, int step) {
    const int stage = step % kStages;
    mbarrier::expect(loaded[stage], bytes);
    bulk::load(ring + static_cast<std::size_t>(stage) * bytes, p.x + static_cast<std::size_t>(token) * bytes, bytes,
               loaded[stage]);
  };
  const auto place = [&](int token) { return token >= 0 && lane < ranks ? p.places.row[token * ranks + lane] : -1; };

  if (lane == 0) mbarrier::init(loaded, kStages);
  Units<kOrder, kStages> units(static_cast<int>(blockIdx.x) * warps + warp, static_cast<int>(gridDim.x) * warps,
                               p.places.num_tokens, &p.counters->ticket);
  int token = units.next();
  if (lane == 0 && token >= 0) load(token, 0);
  int next = units.next(), next_row = place(token);
  load_ranges(p.places, before);
  for (int step = 0; token >= 0; ++step) {
    const int row = lane < ranks ? row_at(p.places, before, token, lane, next_row) : -1;
    next_row = place(next);
    if (lane == 0) {
      bulk::wait_source_reusable();
      if (next >= 0) load(next, step + 1);
      mbarrier::wait(loaded[step % kStages], static_cast<std::uint32_t>(step / kStages) & 1);
    }
    // Neighbouring senders begin at different ranks, so that they do not meet at one.
    int to = (p.places.rank + 1 + token) % ranks;
    token = next;
    next = units.next();
    const unsigned wanted = __ballot_sync(kAllLanes, row >= 0);
    for (int i = 0; i < ranks; ++i, to = to + 1 == ranks ? 0 : to + 1) {
      const int there = __shfl_sync(kAllLanes, row, to);
      if (lane == 0 && (wanted >> to & 1) != 0) {
        bulk::store(p.out.base[to] + static_cast<std::size_t>(there) * bytes,
                    ring + static_cast<std::size_t>(step % kStages) * bytes, bytes);
      }
    }
    if (lane == 0) bulk::commit();
    __syncwarp();
  }
  if (lane == 0) bulk::wait_delivered();
}

template <Order kOrder>
__device__ void push_by_stores(const Push& p, std::int32_t* before) {
  const int warps = static_cast<int>(blockDim.x / kLanes), ranks = p.places.num_ranks;
  const int worker = static_cast<int>(blockIdx.x) * warps + static_cast<int>(threadIdx.x / kLanes);
  Units<kOrder, kStages> units(worker, static_cast<int>(gridDim.x) * warps, p.places.num_tokens, &p.counters->ticket);
  load_ranges(p.places, before);
  for (int token = units.next(); token >= 0; token = units.next()) {
    for (int i = 0; i < ranks; ++i) {
      const int to = (p.places.rank + 1 + token + i) % ranks;
      const int row = row_at(p.places, before, token, to, p.places.row[token * ranks + to]);
      if (row < 0) continue;
      copy_row(p.out.base[to] + static_cast<std::size_t>(row) * static_cast<std::size_t>(p.row_bytes),
               p.x + static_cast<std::size_t>(token) * static_cast<std::size_t>(p.row_bytes), p.row_bytes);
    }
  }
}

template <Order kOrder>
__global__ void __launch_bounds__(kMostWarps* kLanes, 1) push_rows(const __grid_constant__ Push p) {
  __shared__ std::int32_t before[Places::kRanges * kMaxRanks];
  if constexpr (cuda::ptx::kBulkCopies) {
    push_by_bulk_copies<kOrder>(p, before);
  } else {
    push_by_stores<kOrder>(p, before);
  }
  end(p.counters);
}

}  // namespace

void push(const Push& push, Order order, int sms, cudaStream_t stream) {
  const int row_ring = kStages * push.row_bytes;
  const int warps = std::clamp(kRingBytes / row_ring, 1, kMostWarps);
  launch(order == Order::kTickets ? push_rows<Order::kTickets> : push_rows<Order::kStrides>, sms, warps * kLanes,
         static_cast<std::size_t>(warps * row_ring), stream, push);
}

}  // namespace anyep::bench::probes
