// Ranks as streams of one process over the GPUs present, for tests and measurements of the low-latency kernels. Windows are
// plain device memory; peers reach them by peer access.
#pragma once

#include <cuda_runtime.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cuda/kernels/barrier.h"
#include "cuda/kernels/low_latency_combine.h"
#include "cuda/kernels/low_latency_dispatch.h"
#include "cuda/runtime/launch.h"
#include "protocol/word.h"

#define CHECK_CUDA(call)                                                                     \
  do {                                                                                       \
    if (const cudaError_t error_ = (call); error_ != cudaSuccess) {                          \
      std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_)); \
      std::fflush(stdout);                                                                   \
      _exit(3);                                                                              \
    }                                                                                        \
  } while (0)

namespace anyep::test {

namespace ll = cuda::low_latency;

template <class T>
T* device_memory(std::size_t count) {
  T* pointer = nullptr;
  CHECK_CUDA(cudaMalloc(&pointer, std::max<std::size_t>(count, 1) * sizeof(T)));
  return pointer;
}

/// What the host and the kernels of one rank share, pinned.
struct Control {
  std::uint64_t abort;
  std::uint32_t gone[cuda::kMaxRanks], masked[cuda::kMaxRanks];
  protocol::FaultRecord record;
};

struct Rank {
  int device = 0;
  cudaStream_t stream = nullptr;
  std::byte* window = nullptr;
  cuda::State* state = nullptr;
  ll::Progress* progress = nullptr;
  Control* control = nullptr;
};

class World {
 public:
  World(int num_ranks, std::uint64_t low_latency_bytes)
      : num_ranks_(num_ranks), ranks_(static_cast<std::size_t>(num_ranks)) {
    CHECK_CUDA(cudaGetDeviceCount(&num_gpus_));
    num_gpus_ = std::min(num_gpus_, num_ranks);
    Budget budget;
    budget.low_latency_bytes = static_cast<std::int64_t>(low_latency_bytes);
    layout_ = cuda::WindowLayout::make(budget, num_ranks);
    for (int r = 0; r < num_ranks; ++r) {
      Rank& rank = at(r);
      rank.device = r % num_gpus_;
      CHECK_CUDA(cudaSetDevice(rank.device));
      for (int other = 0; other < num_gpus_; ++other) {
        if (other == rank.device) continue;
        const cudaError_t error = cudaDeviceEnablePeerAccess(other, 0);
        if (error != cudaErrorPeerAccessAlreadyEnabled) CHECK_CUDA(error);
        (void)cudaGetLastError();
      }
      CHECK_CUDA(cudaStreamCreateWithFlags(&rank.stream, cudaStreamNonBlocking));
      rank.window = device_memory<std::byte>(layout_.bytes);
      rank.state = device_memory<cuda::State>(1);
      rank.progress = device_memory<ll::Progress>(1);
      CHECK_CUDA(cudaHostAlloc(reinterpret_cast<void**>(&rank.control), sizeof(Control), cudaHostAllocPortable));
    }
    reset();
  }
  ~World() {
    for (Rank& rank : ranks_) {
      CHECK_CUDA(cudaSetDevice(rank.device));
      CHECK_CUDA(cudaStreamDestroy(rank.stream));
      for (void* memory :
           {static_cast<void*>(rank.window), static_cast<void*>(rank.state), static_cast<void*>(rank.progress)}) {
        CHECK_CUDA(cudaFree(memory));
      }
      CHECK_CUDA(cudaFreeHost(rank.control));
    }
  }
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  /// A new generation: fresh words, but poisoned records. Nothing may run.
  void reset() {
    const ll::Layout cut = ll::Layout::make(layout_.low_latency_bytes, num_ranks_);
    for (Rank& rank : ranks_) {
      CHECK_CUDA(cudaSetDevice(rank.device));
      CHECK_CUDA(cudaMemset(rank.window, 0, layout_.bytes));
      for (unsigned turn = 0; turn < ll::kRegions; ++turn) {
        for (int source = 0; source < num_ranks_; ++source) {
          CHECK_CUDA(cudaMemset(rank.window + layout_.low_latency + cut.region(source, turn) + cut.records, 0xFF,
                                cut.record_bytes));
        }
      }
      cuda::State state{};
      for (std::uint32_t& turn : state.turn) turn = protocol::kFirstEpoch;
      CHECK_CUDA(cudaMemcpy(rank.state, &state, sizeof state, cudaMemcpyHostToDevice));
      CHECK_CUDA(cudaMemset(rank.progress, 0, sizeof(ll::Progress)));
      std::memset(static_cast<void*>(rank.control), 0, sizeof(Control));
      CHECK_CUDA(cudaDeviceSynchronize());
    }
    masks_ = false;
  }
  /// Both sides of the next turn; nothing may run.
  void set_turn(std::uint32_t turn) {
    for (Rank& rank : ranks_) {
      CHECK_CUDA(cudaSetDevice(rank.device));
      CHECK_CUDA(cudaMemcpy(&rank.state->turn[cuda::kSeqLowLatency], &turn, sizeof turn, cudaMemcpyHostToDevice));
      CHECK_CUDA(cudaMemset(rank.progress, 0, sizeof(ll::Progress)));
      set_marks(rank, turn);
    }
  }

  int num_ranks() const { return num_ranks_; }
  int num_gpus() const { return num_gpus_; }
  const cuda::WindowLayout& layout() const { return layout_; }
  Rank& at(int rank) { return ranks_[static_cast<std::size_t>(rank)]; }
  void allow_masks() { masks_ = true; }
  void set_limit_ms(std::uint64_t limit) { limit_ns_ = limit * 1'000'000; }

  ll::CallParams call(int r, const Shape& shape, unsigned kind) {
    Rank& rank = at(r);
    ll::CallParams call;
    cuda::Team& team = call.team;
    for (int i = 0; i < num_ranks_; ++i) team.window[i] = at(i).window;
    team.layout = layout_;
    team.rank = r;
    team.num_ranks = num_ranks_;
    team.generation = 1;
    std::uint64_t seed = protocol::kDigestSeed;
    for (const std::int64_t value :
         {std::int64_t{shape.num_experts}, std::int64_t{shape.top_k}, shape.hidden, shape.max_tokens}) {
      seed = protocol::digest(seed, static_cast<std::uint64_t>(value));
    }
    team.code = protocol::make_code(kind, seed);
    team.state = rank.state;
    team.abort = &rank.control->abort;
    team.gone = rank.control->gone;
    team.masked = masks_ ? rank.control->masked : nullptr;
    team.record = &rank.control->record;
    team.limit_ns = limit_ns_;
    call.progress = rank.progress;
    call.layout = ll::Layout::make(layout_.low_latency_bytes, num_ranks_);
    call.num_experts = shape.num_experts;
    call.top_k = shape.top_k;
    call.hidden = shape.hidden;
    call.max_tokens = static_cast<int>(shape.max_tokens);
    return call;
  }

  void synchronize() {
    for (Rank& rank : ranks_) {
      CHECK_CUDA(cudaSetDevice(rank.device));
      CHECK_CUDA(cudaStreamSynchronize(rank.stream));
    }
  }
  /// The first rank with a record; -1 = none.
  int failed() {
    for (int r = 0; r < num_ranks_; ++r) {
      if (at(r).control->record.claimed != 0) return r;
    }
    return -1;
  }
  void print_records() {
    for (int r = 0; r < num_ranks_; ++r) {
      const protocol::FaultRecord& record = at(r).control->record;
      if (record.claimed == 0) continue;
      std::printf("  rank %d: ended %u, peer %d, phase %u, expected %llx, seen %llx, %.3f ms\n", r, record.ended,
                  record.peer, record.phase, static_cast<unsigned long long>(record.expected),
                  static_cast<unsigned long long>(record.seen), static_cast<double>(record.elapsed_ns) * 1e-6);
    }
  }

 private:
  /// As if every peer had taken part in `turn`.
  void set_marks(Rank& rank, std::uint32_t turn) {
    const std::uint64_t mark = protocol::make_mark(1, turn, 0);
    for (int peer = 0; peer < num_ranks_; ++peer) {
      CHECK_CUDA(cudaMemcpy(rank.window + layout_.word(layout_.low_latency_mark, peer), &mark, sizeof mark,
                            cudaMemcpyHostToDevice));
    }
  }

  int num_ranks_, num_gpus_ = 0;
  std::vector<Rank> ranks_;
  cuda::WindowLayout layout_;
  bool masks_ = false;
  std::uint64_t limit_ns_ = 5'000'000'000;
};

/// What a watchdog tells about the case that was prepared last.
inline std::string& running() {
  static std::string text;
  return text;
}

/// Ends the process when the whole run takes too long.
inline void watch(int seconds) {
  std::thread([seconds] {
    std::this_thread::sleep_for(std::chrono::seconds(seconds));
    std::printf("WATCHDOG: %d s are over in %s\n", seconds, running().c_str());
    std::fflush(stdout);
    _exit(4);
  }).detach();
}

}  // namespace anyep::test
