// Low-latency combine, the home's side: own rows, answers or rows per choice, added in ranks' and choices' order.
#pragma once

#include <cstdint>

#include "cuda/kernels/low_latency_combine_answer.cuh"

namespace anyep::cuda::low_latency::homeward {

/// A strip of a rank's answer. False: it will not come.
__device__ __forceinline__ bool take_answer(const CallParams& call, Block& block, Form form, int rank, int token,
                                            int strip, Strip<2, 0>& answer) {
  const std::byte* const region = block.from[rank];
  bool came = true;
  if (form == Form::kWords) {
    const std::byte* const from = region + call.layout.words + call.cut.row_word(token, strip) * 8;
    came = await(call, block, rank, kWaitInReceive, [&] { return load_words(from, answer, block.turn); });
    came = __all_sync(kAllLanes, came);
  } else if (form == Form::kPackets) {
    const std::byte* const from = region + call.layout.packets + call.cut.packet(token, strip) * 16;
    Packets<2> packets;
    came = await(call, block, rank, kWaitInReceive, [&] { return load_packets<2, 0>(from, packets, block.turn); });
    came = __all_sync(kAllLanes, came);
    unpack(packets, answer);
  } else {
    const std::byte* const from =
        region + call.layout.records + call.cut.record(token, 0) + strip * 1024 + lane_index() * 16;
    answer.data[0] = ptx::load_l2(from);
    answer.data[1] = ptx::load_l2(from + 512);
  }
  return came;
}

/// One strip of an own token: its choices by lane, and what this rank's experts add to it, rounded.
struct OwnStrip {
  int token = -1, strip = 0;
  HomeChoice choice;
  Vectors sum;
};

/// `rows`: of find_rows() for the token and this rank.
__device__ __forceinline__ void sum_own(const CombineParams& p, OwnStrip& own, int token, int strip,
                                        const std::int32_t* rows) {
  const CallParams& call = p.call;
  own.token = token;
  own.strip = strip;
  const int row = own.choice.rank == call.team.rank ? rows[own.choice.expert] : -1;
  own.sum = weigh(__ballot_sync(kAllLanes, row >= 0), slab_row(p, own.choice.expert, max(row, 0)), own.choice.weight,
                  static_cast<int>(call.hidden), strip);
}

/// One strip of a token whose ranks add. `present`: ranks whose answer counts, this one included.
__device__ __forceinline__ void add_answers(const CombineParams& p, Block& block, Form form, unsigned present,
                                            const OwnStrip& own) {
  const CallParams& call = p.call;
  const int me = call.team.rank, rank_of_choice = own.choice.rank;
  Sums total = {};
  unsigned hosts = __reduce_or_sync(kAllLanes, rank_of_choice >= 0 ? 1u << rank_of_choice : 0) & present;
#pragma unroll 1
  for (; hosts != 0; hosts &= hosts - 1) {
    const int rank = __ffs(static_cast<int>(hosts)) - 1;
    if (rank == me) {
      add(total, own.sum.at);
      continue;
    }
    Strip<2, 0> answer;
    if (take_answer(call, block, form, rank, own.token, own.strip, answer)) add(total, answer.data);
  }
  uint4 out[2];
  round_sums(total, out);
  store_strip<false>(p.out + own.token * p.out_row_stride, call.hidden, own.strip, out);
}

/// Ranks whose flag of a chunk has come. One warp waits, a rank per lane; all data warps get the answer, and its acquires
/// (pattern B).
__device__ __forceinline__ unsigned await_chunk(const CallParams& call, Shared& shared, int chunk, bool own_too,
                                                int& parity) {
  Block& block = shared.block;
  if (warp_index() == 0) {
    const int rank = lane_index();
    bool came = rank == call.team.rank && !own_too;
    if (rank < call.team.num_ranks && (block.present >> rank & 1) != 0 && (own_too || rank != call.team.rank)) {
      came = await_flag(call, block, rank, chunk);
    }
    const unsigned present = __ballot_sync(kAllLanes, came);
    if (rank == 0) shared.present[parity] = present;
  }
  ptx::barrier_sync(kDataBarrier, call.warps * kLanes);
  const unsigned present = shared.present[parity];
  parity ^= 1;
  return present;
}

__device__ inline void receive_answers(const CombineParams& p, Shared& shared, int share, int& known_token, int& parity,
                                       OwnStrip& own) {
  const CallParams& call = p.call;
  Block& block = shared.block;
  const int me = call.team.rank, tokens = call.routing.num_tokens;
  const Form form = block.form[me];
  const bool in_records = form == Form::kRecords, many = in_records && chunk_tokens(tokens) > 1;
#pragma unroll 1
  for (int at = share; at < num_items(call, in_records, tokens); at += static_cast<int>(gridDim.x)) {
    const Item item = item_of(call, in_records, tokens, at, warp_index());
    const int batch = many ? max(kTableRows / max(call.num_local_experts, 1), 1) : 1;
    unsigned present = block.present;
#pragma unroll 1
    for (int start_token = item.first; start_token < item.end; start_token += batch) {
      const int end_token = min(start_token + batch, item.end);
      know_rows(p, shared, me, start_token, end_token, many, known_token);
#pragma unroll 1
      for (int token = start_token; token < end_token; ++token) {
        if (own.token != token) own.choice = choice_of_lane(call, token);
        if (in_records && token == item.first) present = await_chunk(call, shared, at, false, parity);
#pragma unroll 1
        for (int strip = item.first_strip; strip < item.end_strip; strip += call.warps) {
          if (own.token != token || own.strip != strip) {
            sum_own(p, own, token, strip, shared.rows + (many ? token - start_token : 0) * call.num_local_experts);
          }
          add_answers(p, block, form, present, own);
        }
      }
    }
  }
}

/// One strip of a token whose rows came per choice.
template <bool kLogFmt>
__device__ __forceinline__ void add_choices(const CombineParams& p, unsigned present, int token, int strip,
                                            const HomeChoice& choice, const std::byte* record) {
  const CallParams& call = p.call;
  const bool counts = choice.rank >= 0 && (present >> choice.rank & 1) != 0;
  // Exact: all choices count as one rank's, whose sum is rounded once and nothing is added.
  unsigned hosts = __reduce_or_sync(kAllLanes, counts ? 1u << (p.exact ? 0 : choice.rank) : 0);
  Sums total = {};
  Vectors part{};
#pragma unroll 1
  for (; hosts != 0; hosts &= hosts - 1) {
    const int rank = __ffs(static_cast<int>(hosts)) - 1;
    const unsigned choices = __ballot_sync(kAllLanes, counts && (p.exact || choice.rank == rank));
    if constexpr (kLogFmt) {
      part = weigh_logfmt(choices, record, choice.weight, static_cast<int>(call.hidden), strip);
    } else {
      part = weigh(choices, record, choice.weight, static_cast<int>(call.hidden), strip);
    }
    if (!p.exact) add(total, part.at);
  }
  if (!p.exact) round_sums(total, part.at);
  store_strip<kLogFmt>(p.out + token * p.out_row_stride, call.hidden, strip, part.at);
}

/// Index of this lane's expert among the token's distinct experts at its rank, ascending. All lanes.
__device__ __forceinline__ int index_at_rank(const CallParams& call, const HomeChoice& choice) {
  const int key = choice.rank >= 0 ? choice.rank * kMaxExperts + choice.expert : -1;
  const bool first = __ffs(static_cast<int>(__match_any_sync(kAllLanes, key))) - 1 == lane_index();
  int index = 0;
  for (int other = 0; other < call.top_k; ++other) {
    const int its_key = from_lane(key, other);
    const bool its_first = from_lane(first ? 1 : 0, other) != 0;
    index += its_first && its_key >= 0 && its_key < key && its_key / kMaxExperts == choice.rank;
  }
  return index;
}

template <bool kLogFmt>
__device__ inline void receive_choices(const CombineParams& p, Shared& shared, int share, int& parity) {
  const CallParams& call = p.call;
  Block& block = shared.block;
  const int tokens = call.routing.num_tokens, each = chunk_tokens(call.max_tokens);
  for (int chunk = share; chunk * each < tokens; chunk += static_cast<int>(gridDim.x)) {
    const unsigned present = await_chunk(call, shared, chunk, true, parity);
    for (int token = chunk * each; token < min((chunk + 1) * each, tokens); ++token) {
      const HomeChoice choice = choice_of_lane(call, token);
      const int index = index_at_rank(call, choice);
      const std::byte* record = nullptr;
      if (choice.rank >= 0) {
        record = block.from[choice.rank] + call.layout.records + call.cut.record(static_cast<unsigned>(token), index);
      }
      for (int strip = warp_index(); strip < call.cut.strips; strip += call.warps) {
        add_choices<kLogFmt>(p, present, token, strip, choice, record);
      }
    }
  }
}

}  // namespace anyep::cuda::low_latency::homeward
