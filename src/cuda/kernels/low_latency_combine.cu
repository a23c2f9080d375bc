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

#include "cuda/kernels/low_latency_rows.cuh"
#include "cuda/runtime/launch.h"

namespace anyep::cuda::low_latency {
namespace {

constexpr int kMostWarps = 14;
constexpr int kServiceWarps = 2;

enum Barrier : int { kDataBarrier = 1, kStoredBarrier, kTurnForData, kTurnForService, kGateBarrier };

struct Shared {
  Block block;
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

/// Clerk: heads, and what this block's tokens ask every rank. Pattern G.
__device__ inline void ask(const CombineParams& p, const Block& block) {
  const CallParams& call = p.call;
  const int me = call.team.rank, ranks = call.team.num_ranks, lane = lane_index();
  const int blocks = static_cast<int>(gridDim.x), tokens = call.routing.num_tokens;
  int token = static_cast<int>(blockIdx.x);
  HomeChoice choice;
  if (!p.per_choice && token < tokens) choice = choice_of_lane(call, token);  // on its way before the turn is known
  ptx::barrier_sync(kTurnForService, 2 * kLanes);
  if (block.ok == 0) return;
  if (is_clerk_block() && lane < ranks && lane != me && (block.dead >> lane & 1) == 0) send_head(call, block, lane);
  if (p.per_choice) return;
  for (; token < tokens; token += blocks) {
    if (token != static_cast<int>(blockIdx.x)) choice = choice_of_lane(call, token);
    if (lane >= call.top_k) continue;
    const std::uint64_t index = call.cut.table_word(static_cast<unsigned>(token), lane);
    for (int step = 1; step < ranks; ++step) {
      const int rank = (me + step) % ranks;
      if ((block.dead >> rank & 1) != 0) continue;
      std::byte* const region = region_of(call, rank, me, block.turn);
      const std::uint32_t expert = choice.rank == rank ? static_cast<std::uint32_t>(choice.expert) : ~0u;
      ptx::store_two_words(&word_in(call, region, index), make_word(expert, block.turn),
                           make_word(__float_as_uint(choice.weight), block.turn));
    }
  }
}

// ---- answer --------------------------------------------------------------------------------------------------------

/// What a home asks about one token, in one lane.
struct Asked {
  bool valid = false;  ///< the choice is of an expert here
  int expert = 0;
  float weight = 0;
};

/// All lanes. Sets `came` to false where the home has gone.
__device__ __forceinline__ Asked asked_of_lane(const CallParams& call, Block& block, int home, int token, bool& came) {
  Asked asked;
  if (lane_index() < call.top_k) {
    std::byte* const region = region_of(call, call.team.rank, home, block.turn);
    const std::uint64_t* const words =
        &word_in(call, region, call.cut.table_word(static_cast<unsigned>(token), lane_index()));
    std::uint64_t expert = 0, weight = 0;
    came = await(call, block, home, kWaitMidSend, [&] {
      ptx::load_two_words(words, expert, weight);
      return is_fresh(expert, block.turn) && is_fresh(weight, block.turn);
    });
    asked.expert = static_cast<int>(static_cast<std::uint32_t>(expert));
    asked.weight = __uint_as_float(static_cast<std::uint32_t>(weight));
    asked.valid = came && static_cast<std::uint32_t>(expert) < static_cast<std::uint32_t>(call.num_local_experts);
  }
  came = __all_sync(kAllLanes, came);
  return asked;
}

/// This rank's sum of a home's token, one strip, to the home. `rows`: of find_rows() for the pair.
__device__ __forceinline__ void answer_strip(const CombineParams& p, const Block& block, Form form, int home,
                                                 int token, int strip, const Asked& asked, const std::int32_t* rows) {
  const CallParams& call = p.call;
  const int row = asked.valid ? rows[asked.expert] : -1;
  Sums sums = {};
  weigh(sums, __ballot_sync(kAllLanes, row >= 0), slab_row(p, asked.expert, max(row, 0)), asked.weight, call.hidden,
        strip);
  Strip<2, 0> answer;
  round_sums(sums, answer.data);
  std::byte* const region = region_of(call, home, call.team.rank, block.turn);
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
  std::byte* const records = region_of(call, home, call.team.rank, block.turn) + call.layout.records;
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
  if (home == p.call.team.rank || form_of(p.call, block.tokens[home], block.turn) != Form::kRecords) return 0;
  return block.tokens[home];
}

/// The chunks that a share answers, in the order that data warps and comm both follow.
template <class Visit>
__device__ __forceinline__ void for_each_chunk(const CombineParams& p, const Block& block, int share, Visit&& visit) {
  const int ranks = p.call.team.num_ranks;
  for (int step = 1; step <= ranks; ++step) {
    const int home = (p.call.team.rank + step) % ranks;
    const int tokens = tokens_in_chunks(p, block, home);
    for (int chunk = share; chunk < num_chunks(tokens); chunk += static_cast<int>(gridDim.x))
      visit(home, chunk, tokens);
  }
}

template <bool kLogFmt>
__device__ inline void answer_chunks(const CombineParams& p, Shared& shared, int share, int& known_token) {
  const CallParams& call = p.call;
  Block& block = shared.block;
  const int threads = call.warps * kLanes, experts = max(call.num_local_experts, 1);
  for_each_chunk(p, block, share, [&](int home, int chunk, int tokens) {
    const int each = chunk_tokens(tokens), end = min((chunk + 1) * each, tokens);
    const int batch = min(max(kTableRows / experts, 1), each);
    for (int first = chunk * each; first < end; first += batch) {
      const int count = min(batch, end - first);
      int table = 0;  // where the first token's rows start
      if (each > 1 || first != known_token) {
        ptx::barrier_sync(kDataBarrier, threads);  // the table is read
        // With one token a chunk, for all sources: those that follow, and this rank as home, need them next.
        const Wanted wanted =
            each > 1 ? Wanted{home, first, 1, count} : Wanted{call.team.rank, first, call.team.num_ranks, 1};
        find_rows(p, shared.rows, wanted, static_cast<int>(threadIdx.x), threads);
        ptx::barrier_sync(kDataBarrier, threads);
        known_token = each > 1 ? -1 : first;
      }
      if (each == 1) {
        table = (home - call.team.rank + (home < call.team.rank ? call.team.num_ranks : 0)) * call.num_local_experts;
      }
      for (int token = first; token < first + count; ++token) {
        const std::int32_t* const rows = shared.rows + table + (token - first) * call.num_local_experts;
        if (p.per_choice) {
          send_choices_of<kLogFmt>(p, shared, home, token, rows);
          continue;
        }
        bool came = true;
        const Asked asked = asked_of_lane(call, block, home, token, came);
        if (warp_index() == 0) STAMP(call, 8);
        if (!came || !__any_sync(kAllLanes, asked.valid)) continue;
        for (int strip = warp_index(); strip < call.cut.strips; strip += call.warps) {
          answer_strip(p, block, Form::kRecords, home, token, strip, asked, rows);
        }
      }
    }
    ptx::barrier_sync(kStoredBarrier, threads + kLanes);  // pattern A: all stores before comm's release
  });
}

/// The comm warp's side of answer_chunks().
__device__ inline void release_chunks(const CombineParams& p, const Block& block, int share) {
  const CallParams& call = p.call;
  for_each_chunk(p, block, share, [&](int home, int chunk, int) {
    ptx::barrier_sync(kStoredBarrier, (call.warps + 1) * kLanes);
    if (lane_index() == 0 && *static_cast<const volatile int*>(&block.broken) == 0) {
      publish(flag_in(region_of(call, home, call.team.rank, block.turn), chunk),
              mark_of(call, block.turn));  // pattern A
    }
  });
}

/// Words and packets: units of a token's strips. Leaves in shared.rows the rows of the last unit's token, all sources.
__device__ inline void answer_units(const CombineParams& p, Shared& shared, int share, int& known_token) {
  const CallParams& call = p.call;
  Block& block = shared.block;
  const int ranks = call.team.num_ranks, me = call.team.rank, threads = call.warps * kLanes;
  int most = 0;
  for (int home = 0; home < ranks; ++home) {
    if (home == me || form_of(call, block.tokens[home], block.turn) == Form::kRecords) continue;
    most = max(most, block.tokens[home]);
  }
  for (int unit = share; unit < most * call.pieces; unit += static_cast<int>(gridDim.x)) {
    const int token = unit / call.pieces, strip = unit % call.pieces * call.warps + warp_index();
    if (token != known_token) {
      ptx::barrier_sync(kDataBarrier, threads);  // the table is read
      find_rows(p, shared.rows, {me, token, ranks, 1}, static_cast<int>(threadIdx.x), threads);
      ptx::barrier_sync(kDataBarrier, threads);
      known_token = token;
    }
    for (int step = 1; step < ranks; ++step) {
      const int home = (me + step) % ranks;
      const Form form = form_of(call, block.tokens[home], block.turn);
      if (form == Form::kRecords || token >= block.tokens[home] || strip >= call.cut.strips) continue;
      bool came = true;
      const Asked asked = asked_of_lane(call, block, home, token, came);
      if (warp_index() == 0) STAMP(call, 8);
      if (!came || !__any_sync(kAllLanes, asked.valid)) continue;
      answer_strip(p, block, form, home, token, strip, asked, shared.rows + step * call.num_local_experts);
    }
  }
}

// ---- receive -------------------------------------------------------------------------------------------------------

/// A strip of a rank's answer. False: it will not come.
__device__ __forceinline__ bool take_answer(const CallParams& call, Block& block, Form form, int rank, int token,
                                            int strip, Strip<2, 0>& answer) {
  const std::byte* const region = region_of(call, call.team.rank, rank, block.turn);
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

/// One strip of a token whose ranks add. `present`: ranks whose answer counts, this one included. `rows`: of this rank.
__device__ __forceinline__ void add_answers(const CombineParams& p, Block& block, Form form, unsigned present,
                                                int token, int strip, const HomeChoice& choice,
                                                const std::int32_t* rows) {
  const CallParams& call = p.call;
  const int me = call.team.rank;
  const bool mine = choice.rank == me;
  const int row = mine ? rows[choice.expert] : -1;
  uint4 own[2];
  Sums sums = {};
  weigh(sums, __ballot_sync(kAllLanes, row >= 0), slab_row(p, choice.expert, max(row, 0)), choice.weight, call.hidden,
        strip);
  round_sums(sums, own);
  if (warp_index() == 0) STAMP(call, 10);
  Sums total = {};
  unsigned hosts = __reduce_or_sync(kAllLanes, choice.rank >= 0 ? 1u << choice.rank : 0) & present;
  for (; hosts != 0; hosts &= hosts - 1) {
    const int rank = __ffs(static_cast<int>(hosts)) - 1;
    if (rank == me) {
      add(total, own);
      continue;
    }
    Strip<2, 0> answer;
    if (take_answer(call, block, form, rank, token, strip, answer)) add(total, answer.data);
  }
  uint4 out[2];
  round_sums(total, out);
  store_strip<false>(p.out + token * p.out_row_stride, call.hidden, strip, out);
}

/// Ranks whose flag of a chunk has come. One wait per lane; all lanes get the answer. Pattern B.
__device__ __forceinline__ unsigned await_chunk(const CallParams& call, Block& block, int chunk, bool own_too) {
  const int rank = lane_index();
  bool came = rank == call.team.rank && !own_too;
  if (rank < call.team.num_ranks && (block.present >> rank & 1) != 0 && (own_too || rank != call.team.rank)) {
    came = await_flag(call, block, rank, chunk);
  }
  return __ballot_sync(kAllLanes, came);  // and each lane's acquire covers the warp
}

__device__ inline void receive_answers(const CombineParams& p, Shared& shared, int share, int& known_token) {
  const CallParams& call = p.call;
  Block& block = shared.block;
  const int me = call.team.rank, threads = call.warps * kLanes, blocks = static_cast<int>(gridDim.x);
  const int tokens = call.routing.num_tokens, experts = max(call.num_local_experts, 1);
  const Form form = form_of(call, tokens, block.turn);
  if (form != Form::kRecords) {
    for (int unit = share; unit < tokens * call.pieces; unit += blocks) {
      const int token = unit / call.pieces, strip = unit % call.pieces * call.warps + warp_index();
      const HomeChoice choice = choice_of_lane(call, token);
      if (token != known_token) {
        ptx::barrier_sync(kDataBarrier, threads);  // the table is read
        find_rows(p, shared.rows, {me, token, 1, 1}, static_cast<int>(threadIdx.x), threads);
        ptx::barrier_sync(kDataBarrier, threads);
        known_token = -1;  // only one source
      }
      if (strip < call.cut.strips) add_answers(p, block, form, block.present, token, strip, choice, shared.rows);
    }
    return;
  }
  const int each = chunk_tokens(tokens), batch = min(max(kTableRows / experts, 1), each);
  for (int chunk = share; chunk < num_chunks(tokens); chunk += blocks) {
    const int end = min((chunk + 1) * each, tokens);
    unsigned present = 0;
    for (int first = chunk * each; first < end; first += batch) {
      const int count = min(batch, end - first);
      if (each > 1 || first != known_token) {
        ptx::barrier_sync(kDataBarrier, threads);  // the table is read
        find_rows(p, shared.rows, {me, first, 1, count}, static_cast<int>(threadIdx.x), threads);
        ptx::barrier_sync(kDataBarrier, threads);
        known_token = -1;
      }
      if (first == chunk * each) present = await_chunk(call, block, chunk, false);
      if (warp_index() == 0) STAMP(call, 11);
      for (int token = first; token < first + count; ++token) {
        const HomeChoice choice = choice_of_lane(call, token);
        for (int strip = warp_index(); strip < call.cut.strips; strip += call.warps) {
          add_answers(p, block, form, present, token, strip, choice,
                      shared.rows + (token - first) * call.num_local_experts);
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
  const auto sum = [&](Sums& sums, unsigned choices) {
    if constexpr (kLogFmt) {
      weigh_logfmt(sums, choices, record, choice.weight, call.hidden, strip);
    } else {
      weigh(sums, choices, record, choice.weight, call.hidden, strip);
    }
  };
  const bool counts = choice.rank >= 0 && (present >> choice.rank & 1) != 0;
  Sums total = {};
  if (p.exact) {
    sum(total, __ballot_sync(kAllLanes, counts));
  } else {
    unsigned hosts = __reduce_or_sync(kAllLanes, counts ? 1u << choice.rank : 0);
    for (; hosts != 0; hosts &= hosts - 1) {
      const int rank = __ffs(static_cast<int>(hosts)) - 1;
      Sums part = {};
      sum(part, __ballot_sync(kAllLanes, counts && choice.rank == rank));
      uint4 rounded[2];
      round_sums(part, rounded);
      add(total, rounded);
    }
  }
  uint4 out[2];
  round_sums(total, out);
  store_strip<kLogFmt>(p.out + token * p.out_row_stride, call.hidden, strip, out);
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
__device__ inline void receive_choices(const CombineParams& p, Shared& shared, int share) {
  const CallParams& call = p.call;
  Block& block = shared.block;
  const int tokens = call.routing.num_tokens, each = chunk_tokens(call.max_tokens);
  for (int chunk = share; chunk * each < tokens; chunk += static_cast<int>(gridDim.x)) {
    const unsigned present = await_chunk(call, block, chunk, true);
    for (int token = chunk * each; token < min((chunk + 1) * each, tokens); ++token) {
      const HomeChoice choice = choice_of_lane(call, token);
      const int index = index_at_rank(call, choice);
      const std::byte* record = nullptr;
      if (choice.rank >= 0) {
        record = region_of(call, call.team.rank, choice.rank, block.turn) + call.layout.records +
                 call.cut.record(static_cast<unsigned>(token), index);
      }
      for (int strip = warp_index(); strip < call.cut.strips; strip += call.warps) {
        add_choices<kLogFmt>(p, present, token, strip, choice, record);
      }
    }
  }
}

// ---- kernel --------------------------------------------------------------------------------------------------------

template <bool kLogFmt>
__device__ inline void run_data_warp(const CombineParams& p, Shared& shared) {
  const CallParams& call = p.call;
  Block& block = shared.block;
  const bool sends = (call.halves & kSend) != 0, receives = (call.halves & kReceive) != 0;
  const int threads = call.warps * kLanes;
  int known_token = -1;
  if (!p.per_choice) {  // the rows of this block's first unit: found before the turn is known
    const int token = static_cast<int>(blockIdx.x) / call.pieces;
    if (token < call.max_tokens) {
      find_rows(p, shared.rows, {call.team.rank, token, call.team.num_ranks, 1}, static_cast<int>(threadIdx.x), threads);
      known_token = token;
    }
    ptx::barrier_sync(kDataBarrier, threads);
  }
  if (warp_index() == 0) STAMP(call, 5);
  ptx::barrier_sync(kTurnForData, threads + kLanes);
  if (warp_index() == 0) STAMP(call, 6);
  if (receives) ptx::barrier_sync(kGateBarrier, threads + 2 * kLanes);
  if (warp_index() == 0) STAMP(call, 7);
  if (block.ok == 0 || (receives && block.go == 0)) return;
  if (sends) {
    // Homes of few tokens first.
    if (!p.per_choice) for_each_share(block, [&](int share) { answer_units(p, shared, share, known_token); });
    for_each_share(block, [&](int share) { answer_chunks<kLogFmt>(p, shared, share, known_token); });
    if (is_refresh(block.turn)) {
      const int own = call.routing.num_tokens;
      if (blockIdx.x == 0 && static_cast<int>(threadIdx.x) < call.team.num_ranks &&
          (block.dead >> threadIdx.x & 1) == 0) {  // between head and table
        std::byte* const region = region_of(call, static_cast<int>(threadIdx.x), call.team.rank, block.turn);
        protocol::Shared(word_in(call, region, 1)).store(0, protocol::kRelaxed);
      }
      refresh(
          call, block, call.cut.table_word(static_cast<unsigned>(own), 0),
          [&](int peer) { return num_chunks(tokens_in_chunks(p, block, peer)); },
          blockIdx.x * static_cast<unsigned>(threads) + threadIdx.x, gridDim.x * static_cast<unsigned>(threads));
    }
  }
  if (warp_index() == 0) STAMP(call, 9);
  if (!receives) return;
  for_each_share(block, [&](int share) {
    if (p.per_choice) {
      receive_choices<kLogFmt>(p, shared, share);
    } else {
      receive_answers(p, shared, share, known_token);
    }
  });
  if (warp_index() == 0) STAMP(call, 12);
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
    STAMP(call, 0);
    start(call, block);
    STAMP(call, 1);
    ptx::barrier_arrive(kTurnForData, data_threads + kLanes);
    ptx::barrier_arrive(kTurnForService, 2 * kLanes);
    if (sends && is_clerk_block()) release_marks(call, block);
    if (receives) ptx::barrier_sync(kGateBarrier, data_threads + 2 * kLanes);
    if (!sends || block.ok == 0 || (receives && block.go == 0)) return;
    for_each_share(block, [&](int share) { release_chunks(p, block, share); });
    return;
  }
  if (sends) {  // clerk and gate
    ask(p, block);
  } else {
    ptx::barrier_sync(kTurnForService, 2 * kLanes);
  }
  STAMP(call, 4);
  if (lane_index() == 0) pass_gate(call, block);
  __syncwarp();
  STAMP(call, 2);
  if (!receives) return;
  if (block.go != 0) await_heads(call, block);
  STAMP(call, 3);
  ptx::barrier_arrive(kGateBarrier, data_threads + 2 * kLanes);
}

const Kernel<CombineParams> kCombineBf16(combine_kernel<false>, "low_latency::combine_kernel<bf16>");
const Kernel<CombineParams> kCombineLogFmt(combine_kernel<true>, "low_latency::combine_kernel<logfmt>");

}  // namespace

void launch_combine(const CombineParams& params, int num_sms, bool early, cudaStream_t stream) {
  CombineParams p = params;
  const bool logfmt = p.wire == Wire::kLogFMT;
  p.per_choice = p.call.hook || logfmt || p.exact;
  p.call.hook = p.per_choice;  // records, and whole rows
  p.call.cut = combine_cut(p.call.hidden, logfmt, p.per_choice,
                           core::expert_block(p.call.num_experts, p.call.team.num_ranks, 0).count, p.call.top_k,
                           p.call.max_tokens);
  const int blocks = complete(p.call, num_sms, 2, kMostWarps);
  LaunchShape shape;
  shape.blocks = static_cast<unsigned>(blocks);
  shape.threads = static_cast<unsigned>((p.call.warps + kServiceWarps) * kLanes);
  shape.stream = stream;
  shape.early = early;
  (logfmt ? kCombineLogFmt : kCombineBf16)(shape, p);
}

}  // namespace anyep::cuda::low_latency
