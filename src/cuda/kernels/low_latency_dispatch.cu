// Low-latency dispatch.
//
//   after   slab row e, begin + i == the i-th token, in token order, that source s sends to local expert e, cast as asked;
//           begin = earlier sources' counts; range[e][s] = begin << 32 | count
//   roles   by warp: `warps` senders (x, cast, store to peers), `warps` receivers (places, rows to the slab; before that
//           they count), comm (turn, marks, flags), gate, clerk (choices of this block's tokens, counts and ranges)
//   moves   a row once per rank that hosts a choice, as words, packets or records by the source's number of tokens; own
//           rows from x, cast once more
//   syncs   head, counts and choices as words (pattern G) in every form; rows G or G', records by a flag per chunk (A, B)
//   needs   the same shape, wire format and hook on every rank (the marks' code); see low_latency_frame.cuh
#include "cuda/kernels/low_latency_dispatch.h"

#include "cuda/kernels/low_latency_dispatch_receive.cuh"
#include "cuda/runtime/launch.h"

namespace anyep::cuda::low_latency {
namespace outward {

template <bool kFp8, int kWarps>
__global__ void __launch_bounds__((2 * kWarps + kServiceWarps) * kLanes, 1)
    dispatch_kernel(const __grid_constant__ DispatchParams p) {
  __shared__ Shared shared;
  ptx::grid_dependency_wait();  // in this order: at most one launch waits ahead
  ptx::grid_dependents_launch();
  const CallParams& call = p.call;
  const Role role(call.warps);
  Block& block = shared.block;
  const bool sends = (call.halves & kSend) != 0, receives = (call.halves & kReceive) != 0;
  if (role.sends) {
    if (sends) send_rows<kFp8>(p, block, role);
    return;
  }
  if (role.comm) {
    start(call, block);
    if (sends) ptx::barrier_arrive(kTurnForSenders, (role.warps + 1) * kLanes);
    ptx::barrier_arrive(kTurnForHeads, 2 * kLanes);
    ptx::barrier_arrive(kTurnForTeam, role.team_threads() + kLanes);
    if (sends && is_clerk_block()) send_heads(call, block);
    open_gate(call, block);
    if (!sends) return;
    release_chunks(call, block, role);
    if (is_clerk_block()) release_marks(call, block);
    return;
  }
  if (role.heads) {
    ptx::barrier_sync(kTurnForHeads, 2 * kLanes);
    if (!receives) return;
    if (block.ok != 0) await_heads(call, block);
    (void)gate_opens(block);
    ptx::barrier_arrive(kGateBarrier, role.team_threads() + kLanes);
    return;
  }
  if (sends) {
    send_tables(call, shared, role);
  } else {
    ptx::barrier_sync(kTurnForTeam, role.team_threads() + kLanes);
  }
  if (!receives) return;
  const Lookup lookup(call);
  OwnStrip<kFp8> own;
  const int ahead = unit_of(call, static_cast<int>(blockIdx.x)).token;  // the token of this block's first unit
  if (role.receives) {
    own = prepare_own<kFp8>(p, role);
    if (role.warp == 0 && block.ok != 0) shared.ahead[lane_index()] = look_for_targets(p, block, lookup, ahead);
  }
  ptx::barrier_sync(kGateBarrier, role.team_threads() + kLanes);
  if (gate_of(block) != 1) return;
  int parity = 0;
  for_each_share(block, [&](int share) {
    if (role.receives) receive_share<kFp8>(p, shared, role, lookup, own, ahead, share, parity);
    if (share == static_cast<int>(gridDim.x) - 1) {
      read_counts(call, shared, role);
      if (role.clerk && block.broken == 0) write_ranges(p, shared);
    }
  });
}

const Kernel<DispatchParams> kDispatch[2][2] = {
    {{dispatch_kernel<false, kFewWarps>, "low_latency::dispatch_kernel<bf16, 7>"},
     {dispatch_kernel<false, kMostWarps>, "low_latency::dispatch_kernel<bf16, 14>"}},
    {{dispatch_kernel<true, kFewWarps>, "low_latency::dispatch_kernel<fp8, 7>"},
     {dispatch_kernel<true, kMostWarps>, "low_latency::dispatch_kernel<fp8, 14>"}}};

}  // namespace outward

void launch_dispatch(const DispatchParams& params, int num_sms, bool early, cudaStream_t stream) {
  DispatchParams p = params;
  const bool fp8 = p.wire != Wire::kBF16;
  p.call.cut = dispatch_cut(p.call.hidden, fp8, core::expert_block(p.call.num_experts, p.call.team.num_ranks, 0).count,
                            p.call.top_k, p.call.max_tokens);
  const int blocks = complete(p.call, num_sms, 1, outward::kMostWarps);
  LaunchShape shape;
  shape.blocks = static_cast<unsigned>(blocks);
  shape.threads = static_cast<unsigned>((2 * p.call.warps + outward::kServiceWarps) * kLanes);
  shape.stream = stream;
  shape.early = early;
  outward::kDispatch[fp8 ? 1 : 0][p.call.warps > outward::kFewWarps ? 1 : 0](shape, p);
}

}  // namespace anyep::cuda::low_latency
