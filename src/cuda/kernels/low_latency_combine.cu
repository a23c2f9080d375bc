// Low-latency combine.
//
//   after   out[t] == for each rank, ascending, that hosts a choice of t: FP32 from 0, fma(weight, row) over its choices in
//           top-k order, rounded to BF16; the FP32 sum of those, rounded once (specification 10.3).
//           Exact: one sum over all choices in top-k order, rounded once
//   roles   by warp: `warps` data warps (answer: as the experts' rank; receive: as the home), comm (turn, marks, flags),
//           gate, clerk (asks)
//   moves   where the experts' rank adds: homes ask {local expert, weight} per choice, answers come one row per (token,
//           rank), as words, packets or records by the home's number of tokens. Per choice (a hook's send half, which
//           waits for nobody; LogFMT; exact): every row, as records, at [token][index among the token's experts there]
//   syncs   heads and asks as words (G); answers G or G', records by a flag per chunk of tokens (A, B)
//   needs   the same shape, wire format, hook and arithmetic on every rank (the marks' code)
#include "cuda/kernels/low_latency_combine.h"

#include "cuda/kernels/low_latency_combine_receive.cuh"
#include "cuda/runtime/launch.h"

namespace anyep::cuda::low_latency {
namespace homeward {

template <bool kLogFmt>
__device__ inline void run_data_warp(const CombineParams& p, Shared& shared) {
  const CallParams& call = p.call;
  Block& block = shared.block;
  const bool sends = (call.halves & kSend) != 0, receives = (call.halves & kReceive) != 0;
  const int threads = call.warps * kLanes;
  int known_token = -1, parity = 0;
  OwnStrip own;
  const bool per_choice = kLogFmt || p.per_choice;
  const int ahead = unit_of(call, static_cast<int>(blockIdx.x)).token;  // the token of this block's first unit
  if (!per_choice) {                                                    // its rows are found before the turn is known
    if (ahead < call.max_tokens) {
      find_rows(p, shared.rows, {call.team.rank, ahead, call.team.num_ranks, 1}, threads);
      known_token = ahead;
    }
    ptx::barrier_sync(kDataBarrier, threads);
  }
  ptx::barrier_sync(kTurnForData, threads + kLanes);
  if (sends && receives && !per_choice && warp_index() == 0 && block.ok != 0) look_for_asked(call, shared, ahead);
  if (receives) ptx::barrier_sync(kGateBarrier, threads + 2 * kLanes);
  if (block.ok == 0 || (receives && gate_of(block) != 1)) return;
  if (sends) {
    for_each_share(block, [&](int share) { answer_share<kLogFmt>(p, shared, share, ahead, known_token, parity); });
    if (is_refresh(block.turn)) {
      const int own = call.routing.num_tokens;
      if (blockIdx.x == 0 && static_cast<int>(threadIdx.x) < call.team.num_ranks &&
          (block.dead >> threadIdx.x & 1) == 0) {  // between head and table
        protocol::Shared(word_in(call, block.to[threadIdx.x], 1)).store(0, protocol::kRelaxed);
      }
      refresh(
          call, block, call.cut.table_word(static_cast<unsigned>(own), 0),
          [&](int peer) { return num_chunks(tokens_in_chunks(p, block, peer)); },
          blockIdx.x * static_cast<unsigned>(threads) + threadIdx.x, gridDim.x * static_cast<unsigned>(threads));
    }
  }
  if (!receives) return;
  for_each_share(block, [&](int share) {
    if (per_choice) {
      receive_choices<kLogFmt>(p, shared, share, parity);
    } else {
      receive_answers(p, shared, share, known_token, parity, own);
    }
  });
}

template <bool kLogFmt>
__global__ void __launch_bounds__((kMostWarps + kServiceWarps) * kLanes, 1)
    combine_kernel(const __grid_constant__ CombineParams p) {
  __shared__ Shared shared;
  ptx::grid_dependency_wait();  // in this order: at most one launch waits ahead
  ptx::grid_dependents_launch();
  const CallParams& call = p.call;
  Block& block = shared.block;
  const bool sends = (call.halves & kSend) != 0, receives = (call.halves & kReceive) != 0;
  const int data_threads = call.warps * kLanes, service = warp_index() - call.warps;
  if (service < 0) return run_data_warp<kLogFmt>(p, shared);
  if (service == 0) {  // comm
    start(call, block);
    ptx::barrier_arrive(kTurnForData, data_threads + kLanes);
    ptx::barrier_arrive(kTurnForService, 2 * kLanes);
    if (sends && is_clerk_block()) send_heads(call, block);
    open_gate(call, block);
    if (sends && is_clerk_block()) release_marks(call, block);
    if (receives) ptx::barrier_sync(kGateBarrier, data_threads + 2 * kLanes);
    if (!sends || block.ok == 0 || (receives && gate_of(block) != 1)) return;
    for_each_share(block, [&](int share) { release_chunks(p, block, share); });
    return;
  }
  if (sends) {  // clerk
    ask(p, block);
  } else {
    ptx::barrier_sync(kTurnForService, 2 * kLanes);
  }
  if (!receives) return;
  if (block.ok != 0) await_heads(call, block);
  (void)gate_opens(block);
  ptx::barrier_arrive(kGateBarrier, data_threads + 2 * kLanes);
}

const Kernel<CombineParams> kCombineBf16(combine_kernel<false>, "low_latency::combine_kernel<bf16>");
const Kernel<CombineParams> kCombineLogFmt(combine_kernel<true>, "low_latency::combine_kernel<logfmt>");

}  // namespace homeward

void launch_combine(const CombineParams& params, int num_sms, bool early, cudaStream_t stream) {
  CombineParams p = params;
  const bool logfmt = p.wire == Wire::kLogFMT;
  p.per_choice = p.call.hook || logfmt || p.exact;
  p.call.hook = p.per_choice;  // records, and whole rows
  p.call.cut = combine_cut(p.call.hidden, logfmt, p.per_choice,
                           core::expert_block(p.call.num_experts, p.call.team.num_ranks, 0).count, p.call.top_k,
                           p.call.max_tokens);
  const int blocks = complete(p.call, num_sms, 2, homeward::kMostWarps);
  LaunchShape shape;
  shape.blocks = static_cast<unsigned>(blocks);
  shape.threads = static_cast<unsigned>((p.call.warps + homeward::kServiceWarps) * kLanes);
  shape.stream = stream;
  shape.early = early;
  (logfmt ? homeward::kCombineLogFmt : homeward::kCombineBf16)(shape, p);
}

}  // namespace anyep::cuda::low_latency
