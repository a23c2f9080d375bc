// Counts of one route, exchanged, and every place.
//
//   after   rows_until[s] = rows received from ranks 0..s; row(token, rank) = place + before, in (source, token) order;
//           page: the same and the pairs per local expert, for the host
//   roles   block b counts the tokens of range b; the block that is through last exchanges the counts and finds `before`
//   moves   ranks + 1 + local experts words to each peer
//   syncs   counts.h (pattern G), between blocks pattern D, to the host pattern Q
//   needs   the same num_experts on every rank
#include <algorithm>

#include "cuda/device/warp.cuh"
#include "cuda/device/words.cuh"
#include "cuda/kernels/choices.cuh"
#include "cuda/kernels/notify.h"
#include "cuda/runtime/launch.h"
#include "protocol/counts.h"

namespace anyep::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kLanes;

/// Shared memory of a block behind its fixed part.
struct Scratch {
  std::int32_t* pairs;    ///< [num_experts] of this block; then, in the last block, of this rank's tokens
  std::int32_t* before;   ///< [num_ranges, num_ranks]
  std::uint8_t* rank_of;  ///< [num_experts]

  __device__ Scratch(std::byte* memory, const NotifyParams& p)
      : pairs(reinterpret_cast<std::int32_t*>(memory)),
        before(pairs + p.num_experts),
        rank_of(reinterpret_cast<std::uint8_t*>(before + p.num_ranges * p.team.num_ranks)) {}
  static std::size_t bytes(const NotifyParams& p) {
    return static_cast<std::size_t>(p.num_experts) * 5 + static_cast<std::size_t>(p.num_ranges * p.team.num_ranks) * 4;
  }
};

__device__ int thread_index() {
  return static_cast<int>(threadIdx.x);
}

// ---- a range of tokens ---------------------------------------------------------------------------------------------

/// The first round's ids are on their way while tables are filled: they lie in memory that nobody has touched for long.
__device__ void prefetch_choices(const NotifyParams& p) {
  const std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * p.tokens_per_range + thread_index();
  if (p.experts == nullptr || thread_index() >= p.tokens_per_range || token >= p.num_tokens) return;
  ptx::prefetch_l2(static_cast<const std::byte*>(p.experts) + token * p.token_stride * (p.wide_ids ? 8 : 4));
}

/// Counts the block's range and writes the places inside it. `rows` gets the range's rows per rank. `ranks_of`: zero.
__device__ void count_range(const NotifyParams& p, const Scratch& scratch, std::int32_t* rows,
                            std::uint32_t* ranks_of) {
  __shared__ std::int32_t in_warp[kWarps][kMaxRanks];
  const int n = p.team.num_ranks, lane = lane_index(), warp = warp_index();
  const Choices choices{p.experts, p.wide_ids, p.token_stride, p.choice_stride, p.top_k, p.num_experts};
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * p.tokens_per_range;
  const std::int64_t end = min(begin + p.tokens_per_range, static_cast<std::int64_t>(p.num_tokens));
  unsigned out_of_range = 0;
  for (std::int64_t first = begin; first < end; first += kThreads) {
    const std::int64_t token = first + thread_index();
    if (p.experts != nullptr) {
      out_of_range +=
          count_choices(choices, first, static_cast<std::uint32_t>(min(end - first, std::int64_t{kThreads})),
                        scratch.rank_of, p.pairs_given == nullptr ? scratch.pairs : nullptr, ranks_of);
    }
    __syncthreads();  // ranks_of is whole
    unsigned ranks = ranks_of[thread_index()];
    ranks_of[thread_index()] = 0;
    if (p.in_rank != nullptr) ranks = token < end ? given_ranks(p.in_rank, token, n) : 0;
    int place = 0;  // lane r: of the warp's tokens for rank r
#pragma unroll 1
    for (int rank = 0; rank < n; ++rank) {
      const int going = __popc(__ballot_sync(kAllLanes, (ranks >> rank & 1u) != 0));
      if (lane == rank) place = going;
    }
    if (lane < n) in_warp[warp][lane] = place;
    __syncthreads();  // in_warp is whole
    if (lane < n) {
      place = rows[lane];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) place += w < warp ? in_warp[w][lane] : 0;
    }
#pragma unroll 1
    for (int rank = 0; rank < n; ++rank) {
      const bool goes = (ranks >> rank & 1u) != 0;
      const unsigned earlier = __ballot_sync(kAllLanes, goes) & ((1u << lane) - 1);
      const int mine = from_lane(place, rank) + __popc(earlier);
      if (token < end) p.place[token * n + rank] = goes ? mine : -1;
    }
    __syncthreads();  // everybody has read rows
    if (thread_index() < n) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) rows[thread_index()] += in_warp[w][thread_index()];
    }
    __syncthreads();  // rows is new, in_warp and ranks_of are free
  }
  out_of_range = __reduce_add_sync(kAllLanes, out_of_range);
  if (lane == 0 && out_of_range != 0) {
    atomicAdd(&p.team.state->ids_out_of_range, static_cast<unsigned long long>(out_of_range));
  }
}

__device__ std::int32_t* partial_of(const NotifyParams& p, int range) {
  return p.partial + static_cast<std::int64_t>(range) * (p.num_experts + p.team.num_ranks);
}

__device__ void write_partial(const NotifyParams& p, const Scratch& scratch, const std::int32_t* rows) {
  std::int32_t* const partial = partial_of(p, static_cast<int>(blockIdx.x));
  if (p.pairs_given == nullptr) {
    for (int expert = thread_index(); expert < p.num_experts; expert += kThreads) {
      partial[expert] = scratch.pairs[expert];
    }
  }
  if (thread_index() < p.team.num_ranks) partial[p.num_experts + thread_index()] = rows[thread_index()];
}

// ---- all ranges, in the last block ---------------------------------------------------------------------------------

/// Everything that the exchange is about.
struct Exchange {
  std::int32_t rows[kMaxRanks][kMaxRanks];  ///< [source][destination]
  std::int32_t tokens[kMaxRanks];
  std::int32_t pairs[CountsPage::kMaxLocalExperts];
};

/// One warp: a rank's rows of all ranges, and of the ranges before each.
__device__ std::int32_t scan_ranges(const NotifyParams& p, const Scratch& scratch, int rank) {
  std::int32_t sum = 0;
  for (int first = 0; first < p.num_ranges; first += kLanes) {
    const int range = first + lane_index();
    const std::int32_t rows = range < p.num_ranges ? partial_of(p, range)[p.num_experts + rank] : 0;
    std::int32_t until = rows;
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      const std::int32_t left = __shfl_up_sync(kAllLanes, until, step);
      if (lane_index() >= step) until += left;
    }
    if (range < p.num_ranges) scratch.before[range * p.team.num_ranks + rank] = sum + until - rows;
    sum += from_lane(until, kLanes - 1);
  }
  return sum;
}

__device__ std::int32_t pairs_of(const NotifyParams& p, int expert) {
  if (p.pairs_given != nullptr) return p.pairs_given[expert];
  const std::int32_t* partial = p.partial + expert;
  std::int32_t sum = 0;
#pragma unroll 8
  for (int range = 0; range < p.num_ranges; ++range, partial += p.num_experts + p.team.num_ranks) sum += *partial;
  return sum;
}

/// The words that `source` writes at `holder` in this turn: rows to each rank, tokens, pairs of each of holder's experts.
__device__ std::uint64_t* board_of(const Team& team, const Turn& turn, int holder, int source) {
  const WindowLayout& layout = team.layout;
  return reinterpret_cast<std::uint64_t*>(team.window[holder] + layout.counts) +
         protocol::count_slot(turn.number, static_cast<std::uint64_t>(team.num_ranks),
                              static_cast<std::uint64_t>(source), layout.count_width);
}

__device__ void put(const Team& team, const Turn& turn, int holder, int word, std::int32_t value) {
  protocol::put_count(board_of(team, turn, holder, team.rank)[word], turn.number, static_cast<std::uint32_t>(value));
}

__device__ void send_counts(const NotifyParams& p, const Turn& turn, const Scratch& scratch,
                            const std::int32_t* first_expert, Exchange& all) {
  const int n = p.team.num_ranks, me = p.team.rank, lane = lane_index();
  for (int rank = kWarps - 1 - warp_index(); rank < n; rank += kWarps) {  // warps that have fewest experts
    const std::int32_t rows = scan_ranges(p, scratch, rank);
    if (lane == me) all.rows[me][rank] = rows;
    if (lane < n && lane != me) put(p.team, turn, lane, rank, rows);
  }
  if (warp_index() == 0 && lane < n) {
    if (lane == me) all.tokens[me] = p.num_tokens;
    if (lane != me) put(p.team, turn, lane, n, p.num_tokens);
  }
  for (int expert = thread_index(); expert < p.num_experts; expert += kThreads) {
    const std::int32_t pairs = pairs_of(p, expert);
    const int holder = scratch.rank_of[expert];
    const int local = expert - first_expert[holder];
    if (holder == me) {
      all.pairs[local] = pairs;
    } else {
      put(p.team, turn, holder, n + 1 + local, pairs);
    }
  }
  __syncthreads();  // own rows are there; own pairs may be added to
}

static __device__ __noinline__ bool wait_for_count(const Team& team, const Turn& turn, int source, std::uint64_t* word,
                                                   std::uint32_t& value) {
  return protocol::get_count(make_waiter(team, start_of(turn)), {source, kWaitInReceive}, *word, turn.number, value) ==
         protocol::Ended::kReached;
}

/// One thread. Outside of what 31 bits hold = no correct peer.
__device__ bool receive_count(const Team& team, const Turn& turn, int source, std::uint64_t& word,
                              std::int32_t& value) {
  std::uint32_t seen = 0;
  if (!wait_for_count(team, turn, source, &word, seen)) return false;
  value = static_cast<std::int32_t>(seen);
  return value >= 0 || give_up_on(team, {source, kWaitInReceive}, turn, INT32_MAX, seen);
}

__device__ bool receive_counts(const NotifyParams& p, const Turn& turn, Exchange& all) {
  const int n = p.team.num_ranks, me = p.team.rank;
  const int words = n + 1 + core::expert_block(p.num_experts, n, me).count;
  bool ok = true;
  for (int item = thread_index(); ok && item < n * words; item += kThreads) {
    const int source = item / words, word = item % words;
    if (source == me) continue;
    std::int32_t value = 0;
    ok = receive_count(p.team, turn, source, board_of(p.team, turn, me, source)[word], value);
    if (word < n) {
      all.rows[source][word] = value;
    } else if (word == n) {
      all.tokens[source] = value;
    } else {
      atomicAdd(all.pairs + word - n - 1, value);
    }
  }
  return ok;
}

/// One thread per rank: what it sends must be tokens that it has, and what it receives must be countable.
__device__ bool check_rank(const NotifyParams& p, const Turn& turn, const Exchange& all, int rank) {
  std::int64_t received = 0;
  for (int other = 0; other < p.team.num_ranks; ++other) {
    if (all.rows[rank][other] > all.tokens[rank]) {
      return give_up_on(p.team, {rank, kWaitInReceive}, turn, static_cast<std::uint64_t>(all.tokens[rank]),
                        static_cast<std::uint64_t>(all.rows[rank][other]));
    }
    received += all.rows[other][rank];
  }
  return received <= INT32_MAX ||
         give_up_on(p.team, {rank, kWaitInReceive}, turn, INT32_MAX, static_cast<std::uint64_t>(received));
}

/// What kernels behind this one need.
__device__ void write_places(const NotifyParams& p, const Scratch& scratch, const Exchange& all) {
  const int n = p.team.num_ranks, me = p.team.rank;
  for (int at = thread_index(); at < p.num_ranges * n; at += kThreads) {
    std::int32_t before = scratch.before[at];
    for (int source = 0; source < me; ++source) before += all.rows[source][at % n];
    p.before[at] = before;
  }
  if (thread_index() < n) {
    std::int32_t until = 0;
    for (int source = 0; source <= thread_index(); ++source) until += all.rows[source][me];
    p.rows_until[thread_index()] = until;
    p.tokens[thread_index()] = all.tokens[thread_index()];
  }
}

/// What the host needs.
__device__ void write_page(const NotifyParams& p, const Exchange& all) {
  const int n = p.team.num_ranks, me = p.team.rank;
  for (int local = thread_index(); local < core::expert_block(p.num_experts, n, me).count; local += kThreads) {
    p.page->pairs[local] = all.pairs[local];
  }
  if (thread_index() < n) {
    const int rank = thread_index();
    std::int32_t until = 0, received = 0;
    for (int source = 0; source < n; ++source) {
      if (source <= rank) until += all.rows[source][me];
      received += all.rows[source][rank];
    }
    p.page->rows_until[rank] = until;
    p.page->tokens[rank] = all.tokens[rank];
    p.page->rows_of[rank] = received;
  }
  if (thread_index() == kLanes) {
    std::int32_t most = 0;
    for (int pair = 0; pair < n * n; ++pair) most = max(most, all.rows[pair / n][pair % n]);
    p.page->most_rows_of_a_pair = most;
  }
}

}  // namespace

__global__ void __launch_bounds__(kThreads) notify_kernel(const __grid_constant__ NotifyParams p) {
  std::byte* const memory = ptx::dynamic_shared<16>();
  __shared__ std::int32_t rows[kMaxRanks], first_expert[kMaxRanks];
  __shared__ std::uint32_t ranks_of[kThreads];
  __shared__ Exchange all;
  __shared__ Turn turn;
  ptx::grid_dependency_wait();
  const Scratch scratch(memory, p);
  prefetch_choices(p);
  fill_rank_of(scratch.rank_of, p.num_experts, p.team.num_ranks);
  for (int expert = thread_index(); expert < p.num_experts; expert += kThreads) scratch.pairs[expert] = 0;
  ranks_of[thread_index()] = 0;
  if (thread_index() < kMaxRanks) rows[thread_index()] = 0;
  if (thread_index() < p.team.num_ranks) {
    first_expert[thread_index()] = core::expert_block(p.num_experts, p.team.num_ranks, thread_index()).first;
  }
  __syncthreads();  // tables are there
  open_turn(p.team, kSeqNotify, turn);
  count_range(p, scratch, rows, ranks_of);
  __syncthreads();  // counts are whole, and the turn is there
  if (turn.left) return;
  write_partial(p, scratch, rows);
  const bool last = last_to_finish(p.team, kSeqNotify, false);
  ptx::grid_dependents_launch();  // what follows in the stream may start; it waits for this kernel's end
  if (!last) return;

  send_counts(p, turn, scratch, first_expert, all);
  bool ok = receive_counts(p, turn, all);
  if (__syncthreads_and(ok ? 1 : 0) == 0) return;
  if (thread_index() < p.team.num_ranks) ok = check_rank(p, turn, all, thread_index());
  write_places(p, scratch, all);
  if (__syncthreads_and(ok ? 1 : 0) == 0) return;  // also: places are whole
  if (thread_index() == 0) {
    end_turn(p.team, kSeqNotify, turn);
    if (p.dispatch_behind)
      ptx::red_add_release_gpu(&p.team.state->places_made, 1);  // pattern D: its reader is on this GPU
  }
  write_page(p, all);
  __syncthreads();                                              // the page is whole
  if (thread_index() == 0) publish(p.page->word, turn.number);  // pattern Q
}

namespace {
const Kernel<NotifyParams> kNotify(notify_kernel, "notify_kernel");
}

int notify_ranges(int num_tokens, int num_sms) {
  // Under 64 tokens a block has less to count than its start costs.
  return std::clamp((num_tokens + 63) / 64, 1, std::max(num_sms, 1));
}

void launch_notify(const NotifyParams& params, cudaStream_t stream) {
  kNotify({.blocks = static_cast<unsigned>(params.num_ranges),
           .threads = kThreads,
           .shared_bytes = Scratch::bytes(params),
           .stream = stream},
          params);
}

}  // namespace anyep::cuda
