#include <algorithm>

#include "bench/probes/device.cuh"

namespace anyep::bench::probes {
namespace {

constexpr int kMostWarps = 14;
constexpr int kRingBytes = 200 * 1024;

template <Direction kDirection>
__device__ void copy_by_bulk_copies(const Copy& p) {
  extern __shared__ __align__(128) std::byte rows[];
  __shared__ std::uint64_t barriers[kMostWarps * kStages];
  if (threadIdx.x % kLanes != 0) return;
  const int warp = static_cast<int>(threadIdx.x / kLanes), warps = static_cast<int>(blockDim.x / kLanes);
  const auto bytes = static_cast<std::uint32_t>(p.row_bytes);
  std::byte* const ring = rows + static_cast<std::size_t>(warp) * kStages * bytes;
  std::uint64_t* const loaded = barriers + warp * kStages;
  const int first = static_cast<int>(blockIdx.x) * warps + warp, stride = static_cast<int>(gridDim.x) * warps;

  const auto peer_of = [&](int row) { return (p.rank + 1 + row % (p.num_ranks - 1)) % p.num_ranks; };
  const auto at = [&](int row) { return static_cast<std::size_t>(row) * bytes; };
  const auto load = [&](int row, int stage) {
    mbarrier::expect(loaded[stage], bytes);
    const int from = kDirection == Direction::kPush ? p.rank : peer_of(row);
    bulk::load(ring + static_cast<std::size_t>(stage) * bytes, p.from.base[from] + at(row), bytes, loaded[stage]);
  };

  mbarrier::init(loaded, kStages);
  int step = 0;
  for (int row = first; row < p.num_rows; row += stride, ++step) {
    const int stage = step % kStages;
    if (step >= kStages) bulk::wait_source_reusable();
    load(row, stage);  // none ahead: that other warps are at other stages is enough
    mbarrier::wait(loaded[stage], static_cast<std::uint32_t>(step / kStages) & 1);
    const int to = kDirection == Direction::kPush ? peer_of(row) : p.rank;
    bulk::store(p.to.base[to] + at(row), ring + static_cast<std::size_t>(stage) * bytes, bytes);
    bulk::commit();
  }
  bulk::wait_delivered();
}

template <Direction kDirection>
__device__ void copy_by_stores(const Copy& p) {
  const int warps = static_cast<int>(blockDim.x / kLanes);
  const int first = static_cast<int>(blockIdx.x) * warps + static_cast<int>(threadIdx.x / kLanes);
  for (int row = first; row < p.num_rows; row += static_cast<int>(gridDim.x) * warps) {
    const int peer = (p.rank + 1 + row % (p.num_ranks - 1)) % p.num_ranks;
    const bool push = kDirection == Direction::kPush;
    const std::size_t at = static_cast<std::size_t>(row) * static_cast<std::size_t>(p.row_bytes);
    copy_row(p.to.base[push ? peer : p.rank] + at, p.from.base[push ? p.rank : peer] + at, p.row_bytes);
  }
}

template <Direction kDirection>
__global__ void __launch_bounds__(kMostWarps* kLanes, 1) copy_rows(const __grid_constant__ Copy p) {
  if constexpr (cuda::ptx::kBulkCopies) {
    copy_by_bulk_copies<kDirection>(p);
  } else {
    copy_by_stores<kDirection>(p);
  }
}

}  // namespace

void copy(const Copy& copy, Direction direction, int sms, cudaStream_t stream) {
  const int row_ring = kStages * copy.row_bytes;
  const int warps = std::clamp(kRingBytes / row_ring, 1, kMostWarps);
  launch(direction == Direction::kPush ? copy_rows<Direction::kPush> : copy_rows<Direction::kPull>, sms, warps * kLanes,
         static_cast<std::size_t>(warps * row_ring), stream, copy);
}

}  // namespace anyep::bench::probes
