// Low-latency combine.
//
//   after   out[t] == for each rank, ascending, that hosts a choice of t: FP32 from 0, fma(weight, row) over its choices in
//           top-k order, rounded to BF16; the FP32 sum of those, rounded once (specification 10.3).
//           Exact: one sum over all choices in top-k order, rounded once
//   roles   by warp: `groups` times `warps` that answer the group's homes, as the experts' rank; `warps` that take what
//           comes home (the same ones as answer, where a block has no room for others); clerk (asks, waits for what homes
//           ask, but for a warp's first answers, whose asks it reads itself), comm (heads, gate, flags, marks)
//   moves   where the experts' rank adds: homes ask {local expert, form, weight} per choice, answers come one row per (token,
//           rank), as words, packets or records by the home's number of tokens. Per choice (a hook's send half, which
//           waits for nobody; LogFMT; exact): every row, as records, at [token][index among the token's experts there]
//           Two strips a warp: first answers without a round (low_latency_combine_direct.cuh)
//           Several tokens a block: rows through shared memory, own shares as answers (low_latency_combine_staged.cuh)
//   syncs   heads and asks as words (G); answers G or G', records by a flag per chunk of tokens (A, B); per choice, chunks without
//           rows have none: a home knows from its own choices which ranks have some
//   needs   the same shape, wire format, hook and arithmetic on every rank (the marks' code)
#include "cuda/kernels/low_latency_combine.h"

#include <algorithm>

#include "cuda/kernels/low_latency_combine_direct.cuh"
#include "cuda/kernels/low_latency_combine_staged.cuh"
#include "cuda/runtime/launch.h"

namespace anyep::cuda::low_latency {
namespace homeward {

/// How a kernel's rows travel home: added by the experts' rank, or every choice by itself, as BF16 or LogFMT.
enum class Travel { kAnswers, kChoices, kLogFmt };

template <Travel kTravel>
__device__ __forceinline__ void run_data_warp(const CombineParams& p, Shared& shared, const Role& role) {
  const CallParams& call = p.call;
  Block& block = shared.block;
  const bool sends = (call.halves & kSend) != 0, receives = (call.halves & kReceive) != 0;
  constexpr bool kPerChoice = kTravel != Travel::kAnswers;
  Ahead ahead;
  OwnStrip mine;
  Held held;
  Turn turn;
  if constexpr (kPerChoice) {
    enter(call, block);
    turn = find_turn(call);
  } else {
    // What there is before anybody asks: of the first home's token whose turn it is in this block, and of the own one.
    const int me = call.team.rank, index = this_share(), tokens = call.routing.num_tokens;
    const Item item = first_item(call), own = item_of(call, call.own_form == Form::kRecords, tokens, index);
    const int strip = item.first_strip + role.warp, own_strip = own.first_strip + role.warp;
    const int step = __ffs(static_cast<int>(role.steps)) - 1;
    const bool any = role.answers && step > 0 && item.first < call.max_tokens && strip < item.end_strip;
    // Warps that answer, too, do that first, but for records: while the link takes those, loads are slow.
    const bool own_first = !role.answers || call.own_form == Form::kRecords;
    const bool any_own = role.home && own_first && own.first < tokens && own_strip < own.end_strip;
    enter(call, block);
    RawEntry entry, own_entry;
    RawChoice own_choice;
    if (any) entry = RawEntry(p, home_at(call, step), item.first);
    if (any_own) {
      own_entry = RawEntry(p, me, own.first);
      own_choice = RawChoice(call, own.first);
    }
    turn = find_turn(call);
    if (sends) ptx::barrier_arrive(kTurnBarrier, all_threads());
    if (any_own) {
      mine.own.token = own.first;
      mine.own.entry = own_entry.read(p);
      load_rows(p, mine.own.entry, own_strip, held);
      mine.own.choice = own_choice.read(call);
      mine.strip = own_strip;
      mine.mine = weigh_own(p, mine.own, own_strip, held);
    }
    if (any) ahead = {home_at(call, step), item.first, strip, entry.read(p), strip};
    load_rows(p, ahead.entry, strip, held);  // here long before they are asked for
  }
  if (sends) {
    if constexpr (kPerChoice) {
      ptx::barrier_arrive(kTurnBarrier, all_threads());
      ptx::barrier_sync(kRoundBarrier, role.answer_threads());  // it is known where to
      send_choices<kTravel == Travel::kLogFmt>(p, shared, role, turn);
    } else if (role.answers) {
      answer_early(p, shared, role, turn, ahead, held);
      answer_rounds(p, shared, role, turn, ahead, held);
    }
    if (is_refresh(turn.number) && role.answers) [[unlikely]] {
      forget_unwritten(p, shared, role, turn, kPerChoice);
    }
  }
  if (!receives || !role.home) return;
  if (kPerChoice) ptx::barrier_sync(kRoundBarrier, role.answer_threads());  // the heads are there
  if (!kPerChoice && waits_for_heads(call)) ptx::barrier_sync(kHeadsBarrier, role.home_threads() + kLanes);
  // Warps at home that do not answer may not know the gate yet. They would not see the same, and their barriers would miss those that
  // left: await_chunk() tells all of them when to leave.
  const bool knows_gate = kPerChoice || role.answers;
  if (knows_gate && any_lane(retreats(block))) return;
  int parity = 0;
  for_each_share(block, true, [&](int share) {
    if constexpr (kPerChoice) {
      receive_choices<kTravel == Travel::kLogFmt>(p, shared, role, turn, share, parity);
    } else {
      receive_answers(p, shared, role, turn, share, mine, parity);
    }
  });
}

/// How those that answer come by rows and asks: strip by strip and round by round; two strips at once, the first ones without a round;
/// rows through shared memory.
enum class Way { kRounds, kDirect, kStaged };

/// The comm warp.
template <Travel kTravel, Way kWay>
__device__ __forceinline__ void communicate(const CombineParams& p, Shared& shared, const Role& role) {
  const CallParams& call = p.call;
  Block& block = shared.block;
  const unsigned touched = touch(p);
  enter(call, block);
  if (lane_index() == 0) block.touched = touched;
  if ((call.halves & kSend) == 0) {  // what this launch waits for was sent by launches that wait for nobody
    let_next_start();
    if (lane_index() == 0) tell_gate(block, true);
    return;
  }
  unsigned ranks = 0;
  Turn turn;
  if (is_clerk_block()) {
    turn = start(call, block, Signs(call, block), ranks);
    send_heads(call, turn, ranks);
  } else {
    turn = find_turn(call);
  }
  ptx::barrier_sync(kTurnBarrier, all_threads());
  const bool receives = (call.halves & kReceive) != 0;
  if (!receives) let_next_start();
  bool open = true;
  if (lane_index() == 0) open = finds_gate_open(call, block, turn, enter_gate(call, turn));
  __syncwarp();  // see await()
  // Rows per choice wait for nobody; answers wait for what is asked, and not for long if this block has to retreat.
  if (kTravel != Travel::kAnswers) release_chunks(call, role, shared, turn, false);
  if (lane_index() == 0) tell_gate(block, open || pass_gate(call, block, turn));
  __syncwarp();
  if (receives) let_next_start();
  if (is_clerk_block()) release_marks(call, turn, ranks);  // nobody waits for them in this turn
  if (kTravel == Travel::kAnswers) release_chunks(call, role, shared, turn, kWay == Way::kDirect);
}

/// The clerk.
template <Travel kTravel, Way kWay>
__device__ __forceinline__ void keep_books(const CombineParams& p, Shared& shared, const Role& role) {
  const CallParams& call = p.call;
  Block& block = shared.block;
  const bool sends = (call.halves & kSend) != 0, receives = (call.halves & kReceive) != 0;
  const bool times = receives && call.waited != nullptr && is_clerk_block();
  const int tokens = call.routing.num_tokens, index = this_share();
  const bool in_records = call.own_form == Form::kRecords;
  const Item item = item_of(call, in_records, tokens, index);
  const int items = num_items(call, in_records, tokens);
  const bool asks = sends && kTravel == Travel::kAnswers && index < items;
  const bool more =
      index < items && (item.end > item.first + call.tokens_per_warp || items > index + static_cast<int>(gridDim.x));
  // Of as many tokens at once as the lanes have room for.
  const LaneOfChoices lane(call);
  const int token = item.first + lane.number;
  const bool mine = asks && lane.number < call.tokens_per_warp && token < item.end;
  const std::uint64_t at = ask_at(call, token, lane.choice);
  enter(call, block);
  RawChoice first;
  if (mine) first = RawChoice(call, token, lane.choice);
  unsigned ranks = 0;
  const Turn turn = sends ? start(call, block, Signs(call, block), ranks) : find_turn(call);
  if (asks && item.first_strip == 0) {
    send_asks(call, turn, ranks, mine, at, first.read(call));
  }
  if (sends) {
    ptx::fence_block();  // those that answer may not wait for the barrier: the marks have been acquired
    if (lane_index() == 0) *static_cast<volatile unsigned*>(&shared.ranks) = ranks | kRanksKnown;
    ptx::barrier_arrive(kTurnBarrier, all_threads());
    if constexpr (kTravel != Travel::kAnswers) {
      ptx::barrier_sync(kRoundBarrier, role.answer_threads());
    } else {
      if (more) send_more_asks(call, turn, ranks);
      if (times) time_heads(call, block, turn);
      if constexpr (kWay == Way::kDirect) return run_clerk_beside(p, shared, turn);
      return run_clerk<kWay == Way::kStaged>(p, shared, turn);
    }
  }
  if (!receives) return;
  if (times) time_heads(call, block, turn);
  await_heads(call, block, turn, 0);
  if (!serves_alone(block)) (void)gate_opens(block);
  ptx::barrier_sync(kRoundBarrier, role.answer_threads());
}

template <Travel kTravel, Way kWay>
__global__ void __launch_bounds__((kMostWarps + kServiceWarps) * kLanes, 1)
    combine_kernel(const __grid_constant__ CombineParams p) {
  std::byte* const slots = ptx::dynamic_shared<16>();
  __shared__ Shared shared;
  const CallParams& call = p.call;
  clear(shared.block);
  if (kWay == Way::kDirect && threadIdx.x < kMaxRanks) shared.release[0].chunk[threadIdx.x] = -1;
  if (threadIdx.x == 0) {
    shared.release[0].last = false;
    shared.posted = 0;
    shared.ranks = 0;
  }
  __syncthreads();
  const Role role(call);
  if (role.comm) {
    communicate<kTravel, kWay>(p, shared, role);
  } else if (role.clerk) {
    keep_books<kTravel, kWay>(p, shared, role);
  } else if constexpr (kWay == Way::kDirect) {
    run_direct(p, shared, role);
  } else if constexpr (kWay == Way::kStaged) {
    run_staged(p, shared, role, reinterpret_cast<Slot*>(slots));
  } else {
    run_data_warp<kTravel>(p, shared, role);
  }
}

const Kernel<CombineParams> kAnswers(combine_kernel<Travel::kAnswers, Way::kRounds>,
                                     "low_latency::combine_kernel<answers>");
const Kernel<CombineParams> kDirectAnswers(combine_kernel<Travel::kAnswers, Way::kDirect>,
                                           "low_latency::combine_kernel<answers, direct>");
const Kernel<CombineParams> kStagedAnswers(combine_kernel<Travel::kAnswers, Way::kStaged>,
                                           "low_latency::combine_kernel<answers, staged>");
const Kernel<CombineParams> kChoices(combine_kernel<Travel::kChoices, Way::kRounds>,
                                     "low_latency::combine_kernel<choices>");
const Kernel<CombineParams> kLogFmt(combine_kernel<Travel::kLogFmt, Way::kRounds>,
                                    "low_latency::combine_kernel<logfmt>");

}  // namespace homeward

void launch_combine(const CombineParams& params, int num_sms, bool early, cudaStream_t stream) {
  CombineParams p = params;
  const bool logfmt = p.wire == Wire::kLogFMT;
  p.per_choice = p.call.hook || logfmt || p.exact;
  p.call.hook = p.per_choice;  // records, and whole rows
  p.call.cut = combine_cut(p.call.hidden, logfmt, p.per_choice,
                           core::expert_block(p.call.num_experts, p.call.team.num_ranks, 0).count, p.call.top_k,
                           p.call.max_tokens);
  // Per choice every home's chunks are looked through, whether or not it has so many tokens.
  const int for_peers = p.per_choice && (p.call.halves & kSend) != 0
                            ? p.call.team.num_ranks * num_chunks(p.call.max_tokens)
                            : std::min(p.call.max_tokens, kBlocksForPeers);
  const int blocks =
      complete(p.call, num_sms, homeward::kMostWarps, p.per_choice ? 0 : homeward::kMostWarps, false, for_peers);
  LaunchShape shape;
  shape.blocks = static_cast<unsigned>(blocks);
  shape.threads = static_cast<unsigned>(
      (p.call.warps * (p.call.groups + (p.call.split ? 1 : 0)) + homeward::kServiceWarps) * kLanes);
  shape.stream = stream;
  shape.early = early;
  if (logfmt) return homeward::kLogFmt(shape, p);
  if (p.per_choice) return homeward::kChoices(shape, p);
  // Rows wait in shared memory where a block has several tokens, and its warps several strips each: otherwise that is no faster.
  if (p.call.warps >= p.call.piece_strips) return homeward::kAnswers(shape, p);
  if (!are_several_a_chunk(p.call.routing.num_tokens)) {
    const std::int64_t bytes =
        p.x_expert_stride * p.call.num_local_experts + p.x_row_stride * p.call.team.num_ranks * p.call.max_tokens;
    const bool has_places = bytes <= homeward::HeldPairs::kMostBytes;
    return (has_places ? homeward::kDirectAnswers : homeward::kAnswers)(shape, p);
  }
  const std::size_t slot_bytes = static_cast<unsigned>(p.call.warps) * sizeof(homeward::Slot);
  const std::size_t room = device_traits().shared_bytes - sizeof(homeward::Shared);
  p.slots = std::clamp(static_cast<int>(room / slot_bytes), 1, homeward::Ring::kMostSlots);
  shape.shared_bytes = static_cast<unsigned>(p.slots) * slot_bytes;
  homeward::kStagedAnswers(shape, p);
}

}  // namespace anyep::cuda::low_latency
