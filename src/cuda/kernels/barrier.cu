// The barrier: one word per peer, so that it tells who is missing.
//
//   after   every unmasked rank has entered as many barriers as this one
//   roles   one block; thread p enters at rank p and waits for rank p
//   syncs   low_latency_flags.pml: words that carry a number, nothing reset; release -> acquire (A, B')
#include "cuda/kernels/barrier.h"

#include "cuda/device/words.cuh"
#include "cuda/runtime/launch.h"
#include "protocol/ready.h"

namespace anyep::cuda {
namespace {

static __device__ __noinline__ bool look(const Team& team, const Turn& turn, int peer) {
  const protocol::Waiter waiter = make_waiter(team, turn.start_ns);
  const protocol::Who who{peer, kWaitInReceive};
  const protocol::Ended ended = protocol::look_around(waiter, who);
  if (ended == protocol::Ended::kReached) return true;
  if (ended == protocol::Ended::kMasked) return false;
  if (team.masked != nullptr && (ended == protocol::Ended::kTimeout || ended == protocol::Ended::kPeerGone)) {
    protocol::Shared(team.masked[peer]).store(1, protocol::kRelaxed);
    return false;
  }
  const std::uint64_t seen =
      protocol::Shared(word_of(team, team.rank, team.layout.barrier, peer)).load(protocol::kRelaxed);
  protocol::give_up(waiter, who, turn.mark, seen, ended);
  return false;
}

__global__ void __launch_bounds__(32) barrier_kernel(const __grid_constant__ BarrierParams p) {
  const Team& team = p.team;
  Turn turn;
  if (!begin_turn(team, kSeqBarrier, turn)) return;
  const int peer = static_cast<int>(threadIdx.x);
  if (peer < team.num_ranks && peer != team.rank &&
      (team.masked == nullptr || protocol::Shared(team.masked[peer]).load(protocol::kRelaxed) == 0)) {
    publish(word_of(team, peer, team.layout.barrier, team.rank), turn.mark);  // pattern A
    std::uint64_t& word = word_of(team, team.rank, team.layout.barrier, peer);
    (void)protocol::wait_ready(
        [&] { return protocol::reached(protocol::Shared(word).load(protocol::kAcquire), turn.mark); },
        [&] { return look(team, turn, peer); });
  }
  __syncwarp();  // all have read the turn, and all acquires come before the end
  if (peer == 0) team.state->turn[kSeqBarrier] = turn.number;
}

// The host's own event, in front of an op; no turn, since peers know nothing of it.
__global__ void __launch_bounds__(32) gate_kernel(const __grid_constant__ GateParams p) {
  if (threadIdx.x != 0) return;
  const protocol::Who who{p.team.rank, kWaitBeforeSend};
  (void)protocol::wait_until(make_waiter(p.team, protocol::now_ns()), who, *p.open, 1,
                             [](std::uint64_t seen) { return seen != 0; });  // pattern Q
}

const Kernel<GateParams> kGate(gate_kernel, "gate_kernel");
const Kernel<BarrierParams> kBarrier(barrier_kernel, "barrier_kernel");

}  // namespace

void launch_barrier(const BarrierParams& params, cudaStream_t stream) {
  LaunchShape shape;
  shape.stream = stream;
  kBarrier(shape, params);
}

void launch_gate(const GateParams& params, cudaStream_t stream) {
  kGate({.blocks = 1, .threads = 32, .shared_bytes = 0, .stream = stream}, params);
}

}  // namespace anyep::cuda
