// High-throughput combine inside one NVLink domain.
//
//   after   out[t] == bias + the sum, over ranks ascending, of that rank's row for token t: FP32, rounded once
//   roles   senders: rows of x to slots at their homes (none where homes gather x); sum warps: one token, or a piece of it,
//           a ticket; weight warps: 32 tokens a ticket; the block that is through last tells the peers what it has read
//   moves   x anywhere: to slot [rank][row inside the pair] at the home, 4 rows a chunk. x in the window: homes read it.
//           Own rows go through no slot
//   syncs   combine_turn.cuh
//   needs   the same dtype, hidden, number of weights and turn on every rank
#include <algorithm>

#include "core/layout.h"
#include "cuda/kernels/combine_send.cuh"
#include "cuda/kernels/combine_sum.cuh"
#include "cuda/runtime/launch.h"

namespace anyep::cuda {
namespace {

/// Forms of the kernel, by what this rank does with its own x. What the peers do is seen from their offers.
enum class Form {
  kPush,    ///< senders by bulk copies; sums straight from memory
  kGather,  ///< no senders; sums by bulk copies
  kPlain    ///< ordinary accesses of any alignment, on any GPU
};

constexpr int kSendWarps = 4, kSumWarps = 20, kGatherWarps = 15, kWeightWarps = 2;

template <Form kForm>
constexpr int kMaxWarps = kForm == Form::kGather ? kGatherWarps + kWeightWarps : kSendWarps + kSumWarps;

/// The whole turn of one block. Without weights their code is left out: with it, the sums' loops spill, and an acquire
/// empties the L1 where spilled registers lie (push by 16 SMs, 4096 rows: 222 us instead of 208).
/// False for a thread that has failed. kOfSeveral: of a launch that takes several turns.
template <Form kForm, bool kWeighted, class Type, bool kOfSeveral = false>
__device__ __forceinline__ bool run_block(const CombineLaunch& a) {
  std::byte* const stages = ptx::dynamic_shared<128>();
  __shared__ std::uint64_t loaded[kGatherWarps * kSumStages];
  __shared__ Turn turn;
  __shared__ TurnRows rows;
  __shared__ RankRows ranks_of_warp[kMaxWarps<kForm>][kMaxRanks];
  static_assert(kSendWarps * kSendStages <= kGatherWarps * kSumStages);
  ptx::grid_dependency_wait();
  const CombineParams& p = a.params;
  const int thread = static_cast<int>(threadIdx.x), n = p.team.num_ranks;
  RankRows* const ranks = ranks_of_warp[warp_index()];
  const int warp = warp_index(), senders = a.plan.send_warps, sums = a.plan.sum_warps;

  // What needs no turn, before the barrier: the first tickets.
  const bool sends = warp < senders, adds = !sends && warp < senders + sums;
  Tickets tickets(p.team, sends ? kPileChunks : adds ? kPileTokens : kPileWeights);
  tickets.start(!adds ? 1 : kForm == Form::kGather ? 3 : 2);
  std::uint32_t offer_ticket = 1;
  if (warp == senders && lane_index() == 0) offer_ticket = draw_ticket(p.team, kPileOffer);
  bool ok = thread >= n || find_rows(a, thread, rows);
  open_turn(p.team, kSeqCombine, turn);
  if (__syncthreads_and(ok ? 1 : 0) == 0) {
    if (!ok) refuse_rows(a, turn, thread, rows);
    return false;
  }
  if (turn.left) return false;

  if (sends) {
    if constexpr (kForm == Form::kPush) {
      ok = BulkSender(a, turn, rows, tickets,
                      stages + static_cast<std::uint32_t>(warp * kSendStages) * a.plan.piece_bytes,
                      loaded + warp * kSendStages)
               .run();
    } else if constexpr (kForm == Form::kPlain) {
      ok = PlainSender(a, turn, rows).run(tickets);
    }
  } else if (adds) {
    if (warp == senders && from_lane(offer_ticket, 0) == 0) ok = offer_rows(p, turn, rows);
    if constexpr (kForm == Form::kPush) {
      ok = ok && sum_tokens<Type>(a, turn, ranks, tickets, WideAccess{});
    } else if constexpr (kForm == Form::kGather) {
      ok = ok && BulkSums<Type>(a, turn, ranks,
                                stages + static_cast<std::uint32_t>(warp * kSumStages * n) * a.plan.piece_bytes,
                                loaded + warp * kSumStages)
                     .run(tickets);
    } else if constexpr (kForm == Form::kPlain) {
      ok = ok && (a.plan.width == 16 ? sum_tokens<Type>(a, turn, ranks, tickets, WideAccess{})
                                     : sum_tokens<Type>(a, turn, ranks, tickets, NarrowAccess{a.plan.width}));
    }
  } else if constexpr (kWeighted) {
    ok = WeightSums(a, turn, ranks).run(tickets);
  }

  if (!last_to_finish(p.team, kSeqCombine, !ok)) return ok;
  if (thread < n && thread != p.team.rank) {
    const std::uint64_t mark = read_mark(p.team, turn.number);
    publish(word_of(p.team, thread, p.team.layout.combine_read, p.team.rank), mark);  // patterns D, F
    if (p.x_in_window != Grant::kNone) {  // behind this kernel x may be overwritten
      ok = reach(p.team, turn, thread, kWaitAfterFlag, word_of(p.team, p.team.rank, p.team.layout.combine_read, thread),
                 mark);
    }
  }
  if (__syncthreads_and(ok ? 1 : 0) == 0) return false;
  if (thread == 0) {
    end_turn(p.team, kSeqCombine, turn);
    if (kOfSeveral) ptx::red_add_release_gpu(&p.team.state->further_turns, 1);  // pattern D: read on this GPU
  }
  return true;
}

/// All blocks, turn by turn: the next one begins when the last block has ended this one. All blocks must run for that; they
/// do, since a rank's launches fit its share of its GPU.
template <class Type>
__device__ void run_further_turns(const CombineLaunch& given) {
  __shared__ CombineLaunch a;
  ptx::grid_dependency_wait();
  const std::int64_t step = given.params.last_token - given.params.first_token, most = most_tokens(given.params);
  std::uint64_t ended = given.params.team.state->further_turns;  // of earlier launches: no turn ends without this block
  for (std::int64_t first = given.params.first_token; first < most; first += step) {
    if (threadIdx.x == 0) {
      a = given;
      a.params.first_token = first;
      a.params.last_token = first + step;
    }
    __syncthreads();  // the turn is cut
    bool ok = run_block<Form::kPlain, true, Type, true>(a);
    ++ended;
    if (ok && threadIdx.x == 0 && first + step < most) ok = wait_for_further_turn(given.params.team, ended);
    if (__syncthreads_and(ok ? 1 : 0) == 0) return;  // also: one thread has acquired what the turn left, all go on
  }
}

}  // namespace

template <class Type>
__global__ void __launch_bounds__(kMaxWarps<Form::kPlain>* kLanes, 1)
    combine_further_kernel(const __grid_constant__ CombineLaunch a) {
  run_further_turns<Type>(a);
}

template <int kFormIndex, bool kWeighted, class Type>
__global__ void __launch_bounds__(kMaxWarps<static_cast<Form>(kFormIndex)>* kLanes, 1)
    combine_kernel(const __grid_constant__ CombineLaunch a) {
  constexpr Form kForm = static_cast<Form>(kFormIndex);
  if constexpr (kForm == Form::kPlain || ptx::kBulkCopies)
    (void)run_block<kForm, kWeighted, Type>(a);  // else never launched
}

namespace {

/// All kernels of one element type.
template <class Type>
struct Kernels {
  static constexpr int kPush = static_cast<int>(Form::kPush), kGather = static_cast<int>(Form::kGather),
                       kPlain = static_cast<int>(Form::kPlain);
  Kernel<CombineLaunch> push[2] = {{combine_kernel<kPush, false, Type>, "combine_kernel"},
                                   {combine_kernel<kPush, true, Type>, "combine_kernel"}};
  Kernel<CombineLaunch> gather[2] = {{combine_kernel<kGather, false, Type>, "combine_kernel"},
                                     {combine_kernel<kGather, true, Type>, "combine_kernel"}};
  Kernel<CombineLaunch> plain{combine_kernel<kPlain, true, Type>, "combine_kernel"};
  Kernel<CombineLaunch> further{combine_further_kernel<Type>, "combine_further_kernel"};

  const Kernel<CombineLaunch>& of(Form form, bool weighted) const {
    return form == Form::kPush ? push[weighted] : form == Form::kGather ? gather[weighted] : plain;
  }
};
const Kernels<Bf16> kBf16Kernels;
const Kernels<Fp16> kFp16Kernels;
const Kernels<Fp32> kFp32Kernels;

const Kernel<CombineLaunch>& kernel_of(DType dtype, Form form, bool weighted) {
  if (dtype == DType::kBF16) return kBf16Kernels.of(form, weighted);
  return dtype == DType::kF16 ? kFp16Kernels.of(form, weighted) : kFp32Kernels.of(form, weighted);
}
const Kernel<CombineLaunch>& further_kernel_of(DType dtype) {
  if (dtype == DType::kBF16) return kBf16Kernels.further;
  return dtype == DType::kF16 ? kFp16Kernels.further : kFp32Kernels.further;
}

std::uint64_t row_bytes_of(DType dtype, std::int64_t hidden) {
  return static_cast<std::uint64_t>(hidden) * (dtype == DType::kF32 ? 4 : 2);
}

/// What all addresses and strides that this rank's kernel touches are aligned to.
std::uint32_t alignment_of(const CombineParams& p) {
  std::uint64_t bits = address_bits(p.x) | static_cast<std::uint64_t>(p.x_row_stride) | address_bits(p.out) |
                       static_cast<std::uint64_t>(p.out_row_stride);
  for (int i = 0; i < 2; ++i) {
    if (p.bias[i] != nullptr) bits |= address_bits(p.bias[i]) | static_cast<std::uint64_t>(p.bias_row_stride[i]);
  }
  return common_alignment(bits);
}

/// From so many SMs on three senders a block fill the wire, and the sums are faster without the fourth (24 SMs: 189 us
/// instead of 201; 8 SMs: 389 instead of 377).
constexpr int kManySms = 16;
/// Sender's buffers hold up to this much of a row; 4 warps with 2 each leave room for L1.
constexpr std::uint64_t kSendPieceBytes = 16 << 10;
/// Two buffers of a gathering warp hold this much of each rank's row; 15 warps of 2 ranks take 210 KiB.
constexpr std::uint64_t kGatherBudget = std::uint64_t{211} << 10, kGatherPieceBytes = 3584;

void cut_rows(CombinePlan& plan, std::uint64_t most_bytes) {
  plan.pieces = static_cast<std::uint32_t>(core::ceil_div(plan.row_bytes, most_bytes));
  plan.piece_bytes = static_cast<std::uint32_t>(core::round_up(core::ceil_div(plan.row_bytes, plan.pieces), 128));
}

CombinePlan make_plan(const CombineParams& p, Form form, int num_sms) {
  CombinePlan plan;
  const auto ranks = static_cast<std::uint64_t>(p.team.num_ranks);
  plan.row_bytes = static_cast<std::uint32_t>(row_bytes_of(p.dtype, p.hidden));
  plan.slot_bytes = static_cast<std::uint32_t>(slot_bytes(p.dtype, p.hidden, p.num_weights));
  plan.slots = slots_of_pair(p.team.layout, plan.slot_bytes);
  plan.weight_warps = p.num_weights > 0 ? kWeightWarps : 0;
  plan.width = alignment_of(p);
  if (form == Form::kGather) {
    // Above four ranks half as much a piece, so that enough warps have room.
    cut_rows(plan, ranks > 4 ? kGatherPieceBytes / 2 : kGatherPieceBytes);
    plan.sum_warps = static_cast<int>(
        std::clamp<std::uint64_t>(kGatherBudget / (kSumStages * ranks * plan.piece_bytes), 1, kGatherWarps));
  } else {
    cut_rows(plan, kSendPieceBytes);
    const int senders = num_sms < kManySms ? kSendWarps : kSendWarps - 1;
    plan.send_warps = p.x_in_window == Grant::kNone && ranks > 1 ? senders : 0;
    plan.sum_warps = kSumWarps - plan.weight_warps;
  }
  return plan;
}

std::size_t shared_bytes(const CombinePlan& plan, const CombineParams& p, Form form) {
  const std::size_t piece = plan.piece_bytes;
  if (form == Form::kPush) return piece * kSendStages * static_cast<std::size_t>(plan.send_warps);
  if (form == Form::kGather) return piece * kSumStages * static_cast<std::size_t>(plan.sum_warps * p.team.num_ranks);
  return 0;
}

}  // namespace

std::uint64_t slot_bytes(DType dtype, std::int64_t hidden, int num_weights) {
  return core::round_up(row_bytes_of(dtype, hidden) + static_cast<std::uint64_t>(num_weights) * 4, 16);
}

void launch_further_turns(const CombineParams& params, int num_sms, cudaStream_t stream) {
  const CombineLaunch a{params, make_plan(params, Form::kPlain, num_sms)};
  const auto warps = static_cast<unsigned>(a.plan.send_warps + a.plan.sum_warps + a.plan.weight_warps);
  further_kernel_of(params.dtype)(
      {.blocks = static_cast<unsigned>(std::max(num_sms, 1)), .threads = warps * kLanes, .stream = stream}, a);
}

void launch_combine(const CombineParams& params, int num_sms, cudaStream_t stream) {
  const bool bulk = device_traits().bulk_copies && alignment_of(params) == 16;
  const bool gather = params.x_in_window != Grant::kNone || params.team.num_ranks == 1;
  const Form form = !bulk ? Form::kPlain : gather ? Form::kGather : Form::kPush;
  const CombineLaunch a{params, make_plan(params, form, num_sms)};
  const auto warps = static_cast<unsigned>(a.plan.send_warps + a.plan.sum_warps + a.plan.weight_warps);
  kernel_of(params.dtype, form, params.num_weights > 0)({.blocks = static_cast<unsigned>(std::max(num_sms, 1)),
                                                         .threads = warps * kLanes,
                                                         .shared_bytes = shared_bytes(a.plan, params, form),
                                                         .stream = stream},
                                                        a);
}

}  // namespace anyep::cuda
