// High-throughput dispatch inside one NVLink domain, into rows that peers can write.
//
//   after   out row i == x_r[source[i]] for rows_until[r-1] <= i < rows_until[r], every rank r, bit for bit; none beyond
//           the granted room; whole_or_nothing: or nothing at all at this rank, and no turn
//   roles   row warps: rows of x by ticket, read once, written to every receiver; side warps: all other fields, 32 tokens
//           a ticket; one warp of the first block to come grants; the block that is through last tells the peers and
//           waits for theirs
//   moves   x -> its place in the receiver's rows
//   syncs   dispatch_credit: pattern F, L. dispatch_arrived: pattern A for stores, I' and D' for bulk copies
//   needs   the same fields, row bytes and places that fit together on every rank; grants on 16 bytes for bulk copies
#include <algorithm>

#include "core/layout.h"
#include "cuda/kernels/dispatch_side.cuh"
#include "cuda/runtime/launch.h"

namespace anyep::cuda {
namespace {

/// Most warps of a block: row warps (with more nothing moved faster), four for the sides, one that grants.
constexpr int kMaxRowWarps = 10, kMaxWarps = kMaxRowWarps + 5;

/// One warp: where this rank's rows lie, and the permission to write them. Earlier readers of the rows: stream order.
__device__ void grant_rows(const DispatchParams& p, const Turn& turn) {
  const int sender = lane_index(), me = p.team.rank;
  if (sender >= p.team.num_ranks || sender == me) return;
  *reinterpret_cast<Grant*>(p.team.window[sender] + p.team.layout.word(p.team.layout.grant, me)) = p.grant;
  publish(word_of(p.team, sender, p.team.layout.dispatch_credit, me), turn.mark);  // pattern F: the grant comes before
}

/// One thread per peer of the last block: all rows of this rank have landed; waits until the peer's have.
__device__ bool exchange_arrivals(const DispatchParams& p, const Turn& turn, int peer) {
  publish(word_of(p.team, peer, p.team.layout.dispatch_arrived, p.team.rank), turn.mark);  // pattern D'
  return reach(p.team, turn, peer, kWaitInReceive, word_of(p.team, p.team.rank, p.team.layout.dispatch_arrived, peer),
               turn.mark);
}

/// One thread of the last block.
__device__ void end_behind_notify(const DispatchParams& p) {
  if (p.behind_notify != 0)
    ptx::grid_dependency_wait();  // what follows in the stream comes after the end of notify, too
}

/// Every block finds the same: notify has written the numbers before it made the places.
__device__ bool lacks_room_for_all(const DispatchParams& p) {
  return static_cast<std::uint64_t>(p.rows_until[p.team.num_ranks - 1]) > p.grant.room;
}

/// One thread of the last block: nothing was granted, sent or told, and the turn stays. That a peer's launch has begun the
/// same turn is all the same to it: it pushes nothing here before the grant of the next launch, which it finds under the
/// credit word, and it ends when the rows of that launch have come.
__device__ void take_back_launch(const DispatchParams& p) {
  leave_turn(p.team, kSeqDispatch);
  end_behind_notify(p);
}

/// The whole op of one block.
template <bool kBulk>
__device__ __forceinline__ void run_block(const DispatchLaunch& a) {
  std::byte* const stages = ptx::dynamic_shared<128>();
  __shared__ std::uint64_t loaded[kMaxRowWarps * kRowStages];
  const DispatchParams& p = a.params;
  if (p.behind_notify == 0) ptx::grid_dependency_wait();
  __shared__ Turn turn;
  const int warp = warp_index(), rows = a.plan.row_warps, sides = a.plan.side_warps;
  BulkRows bulk_rows(a, turn, stages + static_cast<std::uint32_t>(warp * kRowStages) * a.plan.stage_bytes,
                     loaded + warp * kRowStages);
  std::uint32_t grant_ticket = 1;
  if (warp == rows + sides && lane_index() == 0) grant_ticket = draw_ticket(p.team, kPileGrant);
  if (kBulk && warp < rows) bulk_rows.start();
  open_turn(p.team, kSeqDispatch, turn);
  __shared__ bool lacks_room;
  if (threadIdx.x == blockDim.x - 1) {
    if (p.behind_notify != 0 && !wait_for_places(p.team, turn, p.behind_notify)) turn.left = true;
    lacks_room = p.whole_or_nothing && !turn.left && lacks_room_for_all(p);
    turn.left = turn.left || lacks_room;  // no part begins
  }
  __syncthreads();  // turn and places are there
  bool ok = true;
  if (warp < rows) {
    ok = kBulk ? bulk_rows.run() : PlainRows(a, turn).run();
  } else if (warp < rows + sides) {
    ok = SideFields(p, turn).run();
  } else if (from_lane(grant_ticket, 0) == 0 && !turn.left) {
    grant_rows(p, turn);  // in the first block to come
  }
  if (lacks_room) {
    if (last_to_finish(p.team, kSeqDispatch, false) && threadIdx.x == 0) take_back_launch(p);
    return;
  }
  ok = ok && !turn.left;
  if (!last_to_finish(p.team, kSeqDispatch, !ok)) return;
  const int peer = static_cast<int>(threadIdx.x);
  if (peer < p.team.num_ranks && peer != p.team.rank) ok = exchange_arrivals(p, turn, peer);
  if (__syncthreads_and(ok ? 1 : 0) == 0) return;
  if (threadIdx.x != 0) return;
  end_turn(p.team, kSeqDispatch, turn);
  end_behind_notify(p);
}

}  // namespace

template <bool kBulk>
__global__ void __launch_bounds__(kMaxWarps* kLanes, 1) dispatch_kernel(const __grid_constant__ DispatchLaunch a) {
  if constexpr (!kBulk || ptx::kBulkCopies) run_block<kBulk>(a);  // else never launched
}

namespace {

const Kernel<DispatchLaunch> kBulkDispatch(dispatch_kernel<true>, "dispatch_kernel");
const Kernel<DispatchLaunch> kPlainDispatch(dispatch_kernel<false>, "dispatch_kernel");

/// Row warps and their two buffers take up to this: 7 warps of 14 KiB rows.
constexpr std::uint64_t kStageBudget = std::uint64_t{200} << 10;
/// A buffer holds at most this much of a row, and at least about this much of several rows.
constexpr std::uint64_t kMostStageBytes = 16 << 10, kLeastStageBytes = 7 << 10;

bool rows_are_aligned(const DispatchParams& p) {
  return common_alignment(address_bits(p.x) | static_cast<std::uint64_t>(p.x_row_stride) | p.row_bytes) == 16;
}

RowPlan plan_bulk(const DispatchParams& p, const DeviceTraits& device) {
  RowPlan plan;
  const std::uint64_t row_bytes = std::max<std::uint64_t>(p.row_bytes, 16);
  plan.pieces = static_cast<std::uint32_t>(core::ceil_div(row_bytes, kMostStageBytes));
  plan.piece_bytes = static_cast<std::uint32_t>(core::round_up(core::ceil_div(row_bytes, plan.pieces), 128));
  if (plan.pieces == 1) {
    const auto most = static_cast<std::uint64_t>(kLanes / p.team.num_ranks);  // one lane per row and receiver
    plan.rows_per_unit = static_cast<std::uint32_t>(std::clamp<std::uint64_t>(kLeastStageBytes / row_bytes, 1, most));
  }
  const std::uint64_t unit_bytes = plan.pieces == 1 ? plan.rows_per_unit * row_bytes : plan.piece_bytes;
  plan.stage_bytes = static_cast<std::uint32_t>(core::round_up(unit_bytes, 128));
  const std::uint64_t budget = std::min<std::uint64_t>(kStageBudget, device.shared_bytes - 4096);
  plan.row_warps =
      static_cast<int>(std::clamp<std::uint64_t>(budget / (kRowStages * plan.stage_bytes), 1, kMaxRowWarps));
  return plan;
}

/// Warps for the other fields: two for what each choice has, two for what each row has.
int side_warps(const DispatchParams& p) {
  const bool choices = p.experts.given() || p.grant.source != Grant::kNone || p.final_place != nullptr;
  bool rows = p.scales.given();
  for (const SideField& extra : p.extra) rows = rows || extra.given();
  return (choices ? 2 : 0) + (rows ? 2 : 0);
}

}  // namespace

void launch_dispatch(const DispatchParams& params, int num_sms, cudaStream_t stream) {
  const DeviceTraits& device = device_traits();
  const bool bulk = device.bulk_copies && rows_are_aligned(params);
  DispatchLaunch a{params, bulk ? plan_bulk(params, device) : RowPlan{.row_warps = kMaxRowWarps}};
  a.plan.side_warps = side_warps(params);
  const auto warps = static_cast<unsigned>(a.plan.row_warps + a.plan.side_warps + 1);
  const LaunchShape shape{
      .blocks = static_cast<unsigned>(std::max(num_sms, 1)),
      .threads = warps * kLanes,
      .shared_bytes =
          bulk ? std::size_t{a.plan.stage_bytes} * kRowStages * static_cast<std::size_t>(a.plan.row_warps) : 0,
      .stream = stream,
      .early = params.behind_notify != 0 && device.bulk_copies};
  (bulk ? kBulkDispatch : kPlainDispatch)(shape, a);
}

}  // namespace anyep::cuda
