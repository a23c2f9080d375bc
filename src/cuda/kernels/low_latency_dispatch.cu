// Low-latency dispatch.
//
//   after   slab row e, begin + i == the i-th token, in token order, that source s sends to local expert e, cast as asked;
//           begin = earlier sources' counts; range[e][s] = begin << 32 | count
//   roles   by warp: `warps` senders (x, cast, store to peers and, when it is known where, to the own slab), `groups` times
//           `warps` receivers (rows of the group's sources to the slab; before that they count), clerk (choices of this
//           block's tokens, counts, where every source's rows go), comm (heads, gate, flags, marks, rows of tokens that
//           there are not)
//   moves   a row once per rank that hosts a choice, as words, packets or records by the source's number of tokens; own
//           rows from x, cast once more. Records of several tokens a block by bulk copies, which hold up no other warp
//   syncs   head, counts and choices as words (pattern G) in every form; rows G or G', records by a flag per chunk (A, or L
//           and I where they are copied; B)
//   needs   the same shape, wire format and hook on every rank (the marks' code); see low_latency_frame.cuh
#include "cuda/kernels/low_latency_dispatch.h"

#include <algorithm>

#include "cuda/kernels/low_latency_dispatch_clerk.cuh"
#include "cuda/runtime/launch.h"

namespace anyep::cuda::low_latency {
namespace outward {

/// The comm warp.
template <int kWays>
__device__ __forceinline__ void communicate(const DispatchParams& p, Shared& shared, const std::byte* slots,
                                            const Role& role) {
  const CallParams& call = p.call;
  Block& block = shared.block;
  const unsigned touched = touch(p);
  enter(call, block);
  if (lane_index() == 0) block.touched = touched;
  const bool receives = (call.halves & kReceive) != 0;
  Turn turn;
  if ((call.halves & kSend) == 0) {  // what this launch waits for was sent by launches that wait for nobody
    let_next_start();
    if (lane_index() == 0) tell_gate(block, true);
    turn = find_turn(call);
  } else {
    unsigned ranks;
    turn = start(call, block, Signs(call, block), ranks);
    if (is_clerk_block()) send_heads(call, turn, ranks);
    ptx::barrier_sync(kTurnBarrier, all_threads());
    if (!receives) let_next_start();
    bool open = true;
    const std::uint32_t before = lane_index() == 0 ? enter_gate(call, turn) : 0;
    const auto find_gate = [&] {
      if (lane_index() == 0) {
        open = finds_gate_open(call, block, turn, before);
        if (open) tell_gate(block, true);
      }
      __syncwarp();
    };
    release_chunks<kWays>(call, shared, slots, turn, ranks, role,
                          find_gate);  // whatever the gate: others wait for these rows
    if (!open) tell_gate(block, pass_gate(call, block, turn));
    __syncwarp();
    if (receives) let_next_start();
    if (is_clerk_block()) release_marks(call, turn, ranks);  // late: a release waits for all that its SM has stored
  }
  if (receives && p.rows != nullptr) forget_rest(p, block, turn);
}

template <bool kFp8, int kWays>
__global__ void __launch_bounds__((kAllWarps + kServiceWarps) * kLanes, 1)
    dispatch_kernel(const __grid_constant__ DispatchParams p) {
  std::byte* const slots = ptx::dynamic_shared<128>();
  __shared__ Shared shared;
  const CallParams& call = p.call;
  Block& block = shared.block;
  clear(block);
  if (threadIdx.x == 0) shared.posted = 0;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < call.num_experts; i += static_cast<int>(blockDim.x)) {
    shared.histogram[i] = 0;
  }
  __syncthreads();
  const Role role(call);
  if (role.comm) return communicate<kWays>(p, shared, slots, role);
  const bool sends = (call.halves & kSend) != 0, receives = (call.halves & kReceive) != 0;
  Question first(call, LaneOfChoices(call), first_span(call));
  if (role.clerk) {
    ptx::have_ready(first.region);
    ptx::have_ready(first.word);
  }
  OwnStrips<kFp8, kWays> own;
  Turn turn;
  Place place;
  bool knows = false;
  if (!sends) {
    enter(call, block);
    turn = find_turn(call);
  } else if (role.sends) {
    own = send_rows<kFp8, kWays>(p, shared, slots, role, turn);
  } else {
    turn = send_tables(call, shared, role, place, knows);
  }
  if (!receives) return;
  const int counts_threads = role.team_threads();
  if (role.clerk) {
    if (call.waited != nullptr && is_clerk_block()) time_heads(call, block, turn);
    // In a launch that sends, what is not known is a token that this rank does not have, or is asked for as those of others.
    return run_clerk(p, shared, turn, role.round_threads(), counts_threads, first, knows, place);
  }
  Early<kFp8> early;
  if (role.receives) {
    // Of sources before the last one, where rows of later ones begin; of all, for the caller.
    const int sources = is_clerk_block() ? call.team.num_ranks : call.team.num_ranks - 1;
    gather_counts(call, shared, turn, sources, role.team_thread(), role.receivers * kLanes);
    if (is_clerk_block() && !clerk_writes_counts(call)) {
      ptx::barrier_sync(kCountsBarrier, counts_threads);  // what the other receivers have gathered
      write_counts(p, shared, role.team_thread(), role.receivers * kLanes);
    } else {
      ptx::barrier_arrive(kCountsBarrier, counts_threads);
    }
    early = look_early<kFp8>(call, shared, role, turn);
  }
  serve_rounds<kFp8, kWays>(p, shared, role, turn, own, early);
}

const Kernel<DispatchParams> kDispatch[2][2] = {{{dispatch_kernel<false, 1>, "low_latency::dispatch_kernel<bf16>"},
                                                 {dispatch_kernel<false, 2>, "low_latency::dispatch_kernel<bf16, 2>"}},
                                                {{dispatch_kernel<true, 1>, "low_latency::dispatch_kernel<fp8>"},
                                                 {dispatch_kernel<true, 2>, "low_latency::dispatch_kernel<fp8, 2>"}}};

}  // namespace outward

void launch_dispatch(const DispatchParams& params, int num_sms, bool early, cudaStream_t stream) {
  DispatchParams p = params;
  const bool fp8 = p.wire != Wire::kBF16;
  p.call.cut = dispatch_cut(p.call.hidden, fp8, core::expert_block(p.call.num_experts, p.call.team.num_ranks, 0).count,
                            p.call.top_k, p.call.max_tokens);
  const int blocks = complete(p.call, num_sms, outward::kMostWarps, outward::kAllWarps, true,
                              std::min(p.call.max_tokens, kBlocksForPeers));
  LaunchShape shape;
  shape.blocks = static_cast<unsigned>(blocks);
  shape.threads = static_cast<unsigned>((p.call.warps * (1 + p.call.groups) + outward::kServiceWarps) * kLanes);
  shape.stream = stream;
  shape.early = early;
  const bool two_at_once = p.call.warps < p.call.piece_strips;
  if (two_at_once && outward::copies_records(p.call) && device_traits().bulk_copies) {
    shape.shared_bytes = outward::kRecordSlots * p.call.cut.record_bytes;
  }
  outward::kDispatch[fp8 ? 1 : 0][two_at_once ? 1 : 0](shape, p);
}

}  // namespace anyep::cuda::low_latency
