// Low-latency dispatch, the sender's side: choices and counts, by the warps that receive later.
#pragma once

#include <cstdint>

#include "cuda/kernels/low_latency_dispatch_send.cuh"
#include "cuda/kernels/low_latency_positions.cuh"

namespace anyep::cuda::low_latency::outward {

/// Receivers and clerk, beyond what send_tables() does at once: the other items of the block, or all of them.
static __device__ __noinline__ void send_more_tables(const CallParams& call, Shared& shared, const Role role,
                                                     const Turn turn, unsigned ranks, bool begun) {
  const int tokens = call.routing.num_tokens, threads = role.team_threads(), blocks = static_cast<int>(gridDim.x);
  const bool in_records = own_form(call, turn) == Form::kRecords;
  const int index = this_share();
  int counted = begun ? item_of(call, in_records, tokens, index).first + 1 : 0;
  ptx::barrier_sync(kTeamBarrier, threads);  // what was there is read, or the clerk has added the first token
  if (!begun) {
    for (int i = role.team_thread(); i < call.num_experts; i += threads) shared.histogram[i] = 0;
    ptx::barrier_sync(kTeamBarrier, threads);
  }
#pragma unroll 1
  for (int at = index; at < num_items(call, in_records, tokens); at += blocks) {
    const Item item = item_of(call, in_records, tokens, at);
    if (counted < item.first) {
      (void)count_tokens(call, shared.histogram, counted, item.first, role.team_warp, role.receivers + 1);
      ptx::barrier_sync(kTeamBarrier, threads);
      counted = item.first;
    }
    if (role.clerk) {
#pragma unroll 1
      for (int token = counted; token < item.end; ++token) {
        const Place place = take_place(call, shared.histogram, shared.owner, id_of_lane(call, token));
        if (item.first_strip == 0) send_places(call, turn, ranks, token, place);
      }
    }
    counted = item.end;
    ptx::barrier_sync(kTeamBarrier, threads);  // the clerk has added this item
  }
}

/// Receivers and clerk: counts of all tokens (one block), choices of this block's items. The histogram is clear.
/// `ahead`: in the clerk, the place of this block's first token, if `knows` it.
__device__ __forceinline__ Turn send_tables(const CallParams& call, Shared& shared, const Role& role, Place& ahead,
                                            bool& knows) {
  Block& block = shared.block;
  const int tokens = call.routing.num_tokens, index = this_share();
  const bool in_records = call.own_form == Form::kRecords, counts_all = is_clerk_block();
  const Item item = item_of(call, in_records, tokens, index);
  const int items = num_items(call, in_records, tokens);
  const bool any = index < items && !counts_all;
  const int counted = counts_all ? tokens : any ? item.first : 0;
  const bool more = (any && (item.end > item.first + 1 || items > index + static_cast<int>(gridDim.x))) ||
                    (counts_all && index < items);
  enter(call, block);
  const bool has_choice = role.clerk && any && lane_index() < call.top_k;
  const std::int64_t id = has_choice ? raw_id(call, item.first, lane_index()) : -1;
  unsigned strays = 0, ranks = 0;
  Turn turn{};
  if (role.clerk) {  // meanwhile the receivers count
    turn = start(call, block, Signs(call, block), ranks);
    if (lane_index() == 0) shared.ranks = ranks;
  } else {
    const std::uint32_t last = *static_cast<const volatile std::uint32_t*>(call.at.turn);  // on its way
    if (counted != 0) strays = count_tokens(call, shared.histogram, 0, counted, role.team_warp, role.receivers);
    turn = turn_after(call, from_lane(last, 0));
  }
  if (counted != 0 || counts_all) ptx::barrier_sync(kTeamBarrier, role.team_threads());
  if (counts_all) ranks = shared.ranks;
  ptx::barrier_arrive(kTurnBarrier, all_threads());
  knows = any && (in_records || !is_refresh(turn.number));
  if (role.clerk && knows) {
    ahead = take_place(call, shared.histogram, shared.owner, checked_id(call, id));
    if (item.first_strip == 0) send_places(call, turn, ranks, item.first, ahead);
  }
  if (counts_all) {
    send_counts(call, turn, ranks, shared.histogram, role.team_thread(), role.team_threads());
    if (strays != 0) atomicAdd(&call.team.state->ids_out_of_range, static_cast<unsigned long long>(strays));
  }
  if (more || is_refresh(turn.number)) [[unlikely]] {
    send_more_tables(call, shared, role, turn, ranks, knows);
  }
  return turn;
}

}  // namespace anyep::cuda::low_latency::outward
