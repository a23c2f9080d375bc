// Low-latency combine, the side of the experts' rank, and what homes ask it.
#pragma once

#include <cstdint>

#include "cuda/kernels/low_latency_rows.cuh"

namespace anyep::cuda::low_latency::homeward {

constexpr int kMostWarps = 14;
constexpr int kServiceWarps = 2;

enum Barrier : int { kDataBarrier = 1, kStoredBarrier, kTurnForData, kTurnForService, kGateBarrier };

/// What a home asks about one token, in one lane.
struct Asked {
  int expert;  ///< local; -1 = not of this rank
  float weight;
};

struct Shared {
  Block block;
  Asked asked[2][kLanes];  ///< of this token and the next, read by one warp for all
  Asked ahead[kLanes];     ///< of this block's first token, before the gate opens: lane (step - 1) * top_k + choice
  unsigned present[2];     ///< ranks whose flag of a chunk has come, likewise
  std::int32_t rows[kTableRows];            ///< of find_rows()
  std::int32_t hits[kMostWarps][kMaxTopK];  ///< slab rows of one token, per warp
  std::int32_t hit_experts[kMostWarps][kMaxTopK];
};

__device__ __forceinline__ const std::byte* slab_row(const CombineParams& p, int expert, int row) {
  return p.x + expert * p.x_expert_stride + row * p.x_row_stride;
}

/// One choice of an own token, in one lane.
struct HomeChoice {
  int rank = -1;   ///< that hosts it; -1 = unused
  int expert = 0;  ///< local there
  float weight = 0;
};

__device__ __forceinline__ HomeChoice choice_of_lane(const CallParams& call, int token) {
  const int lane = lane_index();
  HomeChoice choice;
  if (lane >= call.top_k) return choice;
  const int id = checked_id(call, raw_id(call, token, lane));
  choice.weight =
      call.routing.weights[token * call.routing.weight_token_stride + lane * call.routing.weight_choice_stride];
  if (id < 0) return choice;
  choice.rank = rank_of(call, id);
  choice.expert = id - call.first_expert[choice.rank];
  return choice;
}

// ---- ask -----------------------------------------------------------------------------------------------------------

/// Clerk: what this block's tokens ask every rank. Pattern G.
__device__ inline void ask(const CombineParams& p, const Block& block) {
  const CallParams& call = p.call;
  const int me = call.team.rank, ranks = call.team.num_ranks, lane = lane_index();
  const int blocks = static_cast<int>(gridDim.x), tokens = call.routing.num_tokens;
  int token = static_cast<int>(blockIdx.x);
  HomeChoice choice;
  if (!p.per_choice && token < tokens) choice = choice_of_lane(call, token);  // on its way before the turn is known
  ptx::barrier_sync(kTurnForService, 2 * kLanes);
  if (block.ok == 0) return;
  if (p.per_choice) return;
  for (; token < tokens; token += blocks) {
    if (token != static_cast<int>(blockIdx.x)) choice = choice_of_lane(call, token);
    if (lane >= call.top_k) continue;
    const std::uint64_t index = call.cut.table_word(static_cast<unsigned>(token), lane);
    for (int step = 1; step < ranks; ++step) {
      const int rank = around(call, me + step);
      if ((block.dead >> rank & 1) != 0) continue;
      std::byte* const region = block.to[rank];
      const std::uint32_t expert = choice.rank == rank ? static_cast<std::uint32_t>(choice.expert) : ~0u;
      ptx::store_two_words(&word_in(call, region, index), make_word(expert, block.turn),
                           make_word(__float_as_uint(choice.weight), block.turn));
    }
  }
}

/// Data warps: makes shared.rows hold the rows of tokens [first, end): of `source` if they are many, else of the one token
/// for all sources from this rank on.
__device__ __forceinline__ void know_rows(const CombineParams& p, Shared& shared, int source, int first, int end,
                                          bool many, int& known_token) {
  if (!many && first == known_token) return;
  const int threads = p.call.warps * kLanes;
  ptx::barrier_sync(kDataBarrier, threads);  // what was there is read
  find_rows(p, shared.rows,
            many ? Wanted{source, first, 1, end - first} : Wanted{source, first, p.call.team.num_ranks, 1}, threads);
  ptx::barrier_sync(kDataBarrier, threads);
  known_token = many ? -1 : first;
}

// ---- answer --------------------------------------------------------------------------------------------------------

/// One look at a choice that a home asks about.
struct AskedWords {
  std::uint64_t expert = 0, weight = 0;

  __device__ bool load(const CallParams& call, const Block& block, int home, int token, int choice) {
    ptx::load_two_words(&word_in(call, block.from[home], call.cut.table_word(static_cast<unsigned>(token), choice)),
                        expert, weight);
    return is_fresh(expert, block.turn) && is_fresh(weight, block.turn);
  }
  __device__ Asked asked(const CallParams& call) const {
    const auto local = static_cast<std::uint32_t>(expert);
    const bool here = local < static_cast<std::uint32_t>(call.num_local_experts);
    return {here ? static_cast<int>(local) : -1, __uint_as_float(static_cast<std::uint32_t>(weight))};
  }
};

/// All lanes. Nothing is asked by a home that has gone.
__device__ __forceinline__ Asked asked_of_lane(const CallParams& call, Block& block, int home, int token) {
  Asked asked{-1, 0};
  bool came = true;
  if (lane_index() < call.top_k) {
    AskedWords words;
    came = await(call, block, home, kWaitMidSend, [&] { return words.load(call, block, home, token, lane_index()); });
    asked = words.asked(call);
  }
  if (!__all_sync(kAllLanes, came)) asked.expert = -1;
  return asked;
}

/// One data warp, while the gate is still shut: what the next homes ask about this block's first token.
__device__ __forceinline__ void look_for_asked(const CallParams& call, Shared& shared, int token) {
  Block& block = shared.block;
  const int step = lane_index() / call.top_k, choice = lane_index() - step * call.top_k;
  Asked asked{-1, 0};
  if (step < call.tokens_per_warp && step + 1 < call.team.num_ranks && token < call.max_tokens) {
    const int home = around(call, call.team.rank + step + 1);
    AskedWords words;
    if (look_ahead(call, block, home, token, [&] { return words.load(call, block, home, token, choice); })) {
      asked = words.asked(call);
    }
  }
  shared.ahead[lane_index()] = asked;
  __syncwarp();
}

/// Data warps: one looks, since many that poll are in each other's way; all get the answer.
__device__ __forceinline__ Asked share_asked(const CallParams& call, Shared& shared, int home, int token, int& parity) {
  if (warp_index() == 0) shared.asked[parity][lane_index()] = asked_of_lane(call, shared.block, home, token);
  ptx::barrier_sync(kDataBarrier, call.warps * kLanes);  // and whoever is here has read what was asked before the last
  const Asked asked = shared.asked[parity][lane_index()];
  parity ^= 1;
  return asked;
}

/// This rank's sum of a home's token, one strip, to the home. `rows`: of find_rows() for the pair.
__device__ __forceinline__ void answer_strip(const CombineParams& p, const Block& block, Form form, int home, int token,
                                             int strip, const Asked& asked, const std::int32_t* rows) {
  const CallParams& call = p.call;
  const int row = asked.expert >= 0 ? rows[asked.expert] : -1;
  const Vectors sum = weigh(__ballot_sync(kAllLanes, row >= 0), slab_row(p, max(asked.expert, 0), max(row, 0)),
                            asked.weight, static_cast<int>(call.hidden), strip);
  Strip<2, 0> answer;
  answer.data[0] = sum.at[0];
  answer.data[1] = sum.at[1];
  std::byte* const region = block.to[home];
  if (form == Form::kWords) {
    store_words(region + call.layout.words + call.cut.row_word(token, strip) * 8, answer, block.turn);
  } else if (form == Form::kPackets) {
    store_packets(region + call.layout.packets + call.cut.packet(token, strip) * 16, answer, block.turn);
  } else {
    std::byte* const to = region + call.layout.records + call.cut.record(token, 0) + strip * 1024 + lane_index() * 16;
    *reinterpret_cast<uint4*>(to) = answer.data[0];
    *reinterpret_cast<uint4*>(to + 512) = answer.data[1];
  }
}

/// Every row of a home's token, as records. One warp, its strips.
template <bool kLogFmt>
__device__ __forceinline__ void send_choices_of(const CombineParams& p, Shared& shared, int home, int token,
                                                const std::int32_t* rows) {
  const CallParams& call = p.call;
  const Block& block = shared.block;
  const int warp = warp_index(), lane = lane_index();
  int num_hits = 0;
  for (int first = 0; first < call.num_local_experts; first += kLanes) {
    const int row = first + lane < call.num_local_experts ? rows[first + lane] : -1;
    const unsigned here = __ballot_sync(kAllLanes, row >= 0);
    const int index = num_hits + __popc(here & ((1u << lane) - 1));
    if (row >= 0 && index < call.cut.rows_per_token) {
      shared.hits[warp][index] = row;
      shared.hit_experts[warp][index] = first + lane;
    }
    num_hits += __popc(here);
  }
  num_hits = min(num_hits, call.cut.rows_per_token);
  __syncwarp();  // the hits are there
  std::byte* const records = block.to[home] + call.layout.records;
  for (int index = 0; index < num_hits; ++index) {
    const std::byte* const row = slab_row(p, shared.hit_experts[warp][index], shared.hits[warp][index]);
    std::byte* const record = records + call.cut.record(static_cast<unsigned>(token), index);
    for (int strip = warp; strip < call.cut.strips; strip += call.warps) {
      put_record<kLogFmt>(record, row, call.hidden, strip);
    }
  }
  __syncwarp();  // read before the next token's hits
}

/// Tokens of `home` that are answered in chunks of records: those it has, or all it may have when nobody has asked.
__device__ __forceinline__ int tokens_in_chunks(const CombineParams& p, const Block& block, int home) {
  if ((block.dead >> home & 1) != 0) return 0;
  if (p.per_choice) return p.call.max_tokens;
  if (home == p.call.team.rank || block.form[home] != Form::kRecords) return 0;
  return block.tokens[home];
}

/// A share of what this rank owes: to homes of few tokens unit by unit, all homes together; in records home by home, chunk by
/// chunk. Leaves in shared.rows the rows of `known_token`, of all sources from this rank on. One place for all forms.
template <bool kLogFmt>
__device__ inline void answer_share(const CombineParams& p, Shared& shared, int share, int ahead, int& known_token,
                                    int& parity) {
  const CallParams& call = p.call;
  Block& block = shared.block;
  const int ranks = call.team.num_ranks, me = call.team.rank, threads = call.warps * kLanes;
  const bool per_choice = kLogFmt || p.per_choice;
  int next = 1;
#pragma unroll 1
  for (int first = 1; first < ranks + (per_choice ? 1 : 0);
       first = next) {  // per choice, own rows go through a region too
    const int first_home = around(call, me + first);
    const bool in_records = per_choice || block.form[first_home] == Form::kRecords;
    int tokens = in_records ? tokens_in_chunks(p, block, first_home) : block.tokens[first_home];
    for (next = first + 1; next < ranks && !in_records; ++next) {
      const int home = around(call, me + next);
      if (block.form[home] == Form::kRecords) break;
      tokens = max(tokens, block.tokens[home]);
    }
    const bool many = in_records && chunk_tokens(tokens) > 1;
#pragma unroll 1
    for (int at = share; at < num_items(call, in_records, tokens); at += static_cast<int>(gridDim.x)) {
      const Item item = item_of(call, in_records, tokens, at, warp_index());
      const int batch = many ? max(kTableRows / max(call.num_local_experts, 1), 1) : 1;
#pragma unroll 1
      for (int start_token = item.first; start_token < item.end; start_token += batch) {
        const int end_token = min(start_token + batch, item.end);
        know_rows(p, shared, many ? first_home : me, start_token, end_token, many, known_token);
#pragma unroll 1
        for (int token = start_token; token < end_token; ++token) {
#pragma unroll 1
          for (int step = first; step < next; ++step) {
            const int home = around(call, me + step);
            const int pair = many ? token - start_token : step == ranks ? 0 : step;
            const std::int32_t* const rows = shared.rows + pair * call.num_local_experts;
            if (per_choice) {
              send_choices_of<kLogFmt>(p, shared, home, token, rows);
            } else if (token < block.tokens[home]) {
              Asked asked{-1, 0};
              if (token == ahead && step <= call.tokens_per_warp) {
                if (lane_index() < call.top_k) asked = shared.ahead[(step - 1) * call.top_k + lane_index()];
              } else {
                asked = share_asked(call, shared, home, token, parity);
              }
              if (!__any_sync(kAllLanes, asked.expert >= 0)) continue;
#pragma unroll 1
              for (int strip = item.first_strip; strip < item.end_strip; strip += call.warps) {
                answer_strip(p, block, block.form[home], home, token, strip, asked, rows);
              }
            }
          }
        }
      }
      if (in_records) ptx::barrier_sync(kStoredBarrier, threads + kLanes);  // pattern A: all before comm's release
    }
  }
}

/// The comm warp's side of answer_share(): a flag per chunk of records, in the same order.
__device__ inline void release_chunks(const CombineParams& p, const Block& block, int share) {
  const CallParams& call = p.call;
#pragma unroll 1
  for (int step = 1; step <= call.team.num_ranks; ++step) {
    const int home = around(call, call.team.rank + step);
#pragma unroll 1
    for (int chunk = share; chunk < num_chunks(tokens_in_chunks(p, block, home));
         chunk += static_cast<int>(gridDim.x)) {
      ptx::barrier_sync(kStoredBarrier, (call.warps + 1) * kLanes);
      if (lane_index() == 0 && *static_cast<const volatile int*>(&block.broken) == 0) {
        publish(flag_in(block.to[home], chunk), mark_of(call, block.turn));  // pattern A
      }
    }
  }
}

}  // namespace anyep::cuda::low_latency::homeward
