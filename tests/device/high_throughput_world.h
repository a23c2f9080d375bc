// Ranks as threads of one process, on the GPUs there are: windows, streams, memory, for tests of the high-throughput
// kernels without an engine.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <barrier>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cuda/kernels/notify.h"
#include "cuda/kernels/team.h"
#include "cuda/window.h"
#include "protocol/word.h"

namespace anyep::test {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

/// Memory handed out from one block, so that nothing is allocated while a peer's kernel waits.
class Arena {
 public:
  void adopt(std::byte* memory, std::size_t bytes) { memory_ = memory, bytes_ = bytes, used_ = 0; }
  void reset() { used_ = 0; }
  std::byte* take(std::size_t bytes, std::size_t beside = 0) {
    std::byte* const at = memory_ + used_ + beside;
    used_ = (used_ + bytes + beside + 255) / 256 * 256;
    if (used_ > bytes_) throw std::runtime_error("the test's arena is full");
    return at;
  }
  template <class T>
  T* array(std::size_t count, std::size_t beside = 0) {
    return reinterpret_cast<T*>(take(count * sizeof(T), beside));
  }

 private:
  std::byte* memory_ = nullptr;
  std::size_t bytes_ = 0, used_ = 0;
};

/// What one rank has.
struct Rank {
  int device = 0;
  cudaStream_t stream = nullptr;
  std::byte* window = nullptr;
  std::byte* memory = nullptr;
  cuda::State* state = nullptr;
  std::uint64_t notifies_with_dispatch = 0;  ///< launched with dispatch_behind
  std::byte* pinned = nullptr;
  std::uint64_t* abort = nullptr;
  protocol::FaultRecord* record = nullptr;
  cuda::CountsPage* page = nullptr;  ///< [kPages]
  Arena heap, arena;                 ///< peers write the heap
};

class World {
 public:
  static constexpr int kPages = 4;

  World(int num_ranks, const Budget& budget, std::size_t arena_bytes, std::uint64_t limit_ns)
      : layout(cuda::WindowLayout::make(budget, num_ranks)),
        ranks(static_cast<std::size_t>(num_ranks)),
        limit_(limit_ns) {
    int devices = 0;
    check(cudaGetDeviceCount(&devices), "devices");
    for (int device = 0; device < devices; ++device) {
      check(cudaSetDevice(device), "device");
      for (int peer = 0; peer < devices; ++peer) {
        if (peer == device) continue;
        const cudaError_t error = cudaDeviceEnablePeerAccess(peer, 0);
        if (error != cudaErrorPeerAccessAlreadyEnabled) check(error, "peer access");
        (void)cudaGetLastError();
      }
    }
    for (int r = 0; r < num_ranks; ++r) make_rank(ranks[static_cast<std::size_t>(r)], r % devices, arena_bytes);
  }
  ~World() {
    for (Rank& rank : ranks) {
      (void)cudaSetDevice(rank.device);
      (void)cudaStreamDestroy(rank.stream);
      (void)cudaFree(rank.window);
      (void)cudaFree(rank.memory);
      (void)cudaFree(rank.state);
      (void)cudaFreeHost(rank.pinned);
    }
  }

  int size() const { return static_cast<int>(ranks.size()); }

  cuda::Team team(int r, std::uint16_t code) {
    Rank& rank = ranks[static_cast<std::size_t>(r)];
    cuda::Team team;
    for (int peer = 0; peer < size(); ++peer) team.window[peer] = ranks[static_cast<std::size_t>(peer)].window;
    team.layout = layout;
    team.rank = r;
    team.num_ranks = size();
    team.generation = 7;
    team.code = code;
    team.state = rank.state;
    team.abort = rank.abort;
    team.record = rank.record;
    team.limit_ns = limit_;
    return team;
  }

  /// Runs `with(r)` in a thread per rank; an exception of any is thrown on.
  void each(const std::function<void(int)>& with) {
    std::vector<std::thread> threads;
    std::vector<std::string> failed(ranks.size());
    for (int r = 0; r < size(); ++r) {
      threads.emplace_back([&, r] {
        try {
          check(cudaSetDevice(ranks[static_cast<std::size_t>(r)].device), "device");
          with(r);
        } catch (const std::exception& error) {
          failed[static_cast<std::size_t>(r)] = error.what();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (const std::string& text : failed) {
      if (!text.empty()) throw std::runtime_error(text);
    }
  }

  void sync_all() {
    for (Rank& rank : ranks) {
      check(cudaSetDevice(rank.device), "device");
      check(cudaDeviceSynchronize(), "synchronize");
    }
  }

  /// The first record left, as text; empty = none.
  std::string fault() const {
    for (std::size_t r = 0; r < ranks.size(); ++r) {
      const protocol::FaultRecord& record = *ranks[r].record;
      if (record.ready == 0) continue;
      return "rank " + std::to_string(r) + " ended " + std::to_string(record.ended) + " peer " +
             std::to_string(record.peer) + " phase " + std::to_string(record.phase) + " expected " +
             std::to_string(record.expected) + " seen " + std::to_string(record.seen);
    }
    return {};
  }

  const cuda::WindowLayout layout;
  std::vector<Rank> ranks;

 private:
  void make_rank(Rank& rank, int device, std::size_t arena_bytes) {
    rank.device = device;
    check(cudaSetDevice(device), "device");
    check(cudaStreamCreateWithFlags(&rank.stream, cudaStreamNonBlocking), "stream");
    check(cudaMalloc(&rank.window, layout.bytes), "window");
    check(cudaMemset(rank.window, 0, layout.bytes), "window");
    check(cudaMalloc(&rank.memory, arena_bytes), "arena");
    check(cudaMalloc(&rank.state, sizeof(cuda::State)), "state");
    cuda::State state{};
    for (std::uint32_t& turn : state.turn) turn = protocol::kFirstEpoch;
    check(cudaMemcpy(rank.state, &state, sizeof state, cudaMemcpyHostToDevice), "state");
    const std::size_t pinned_bytes = 4096 + kPages * sizeof(cuda::CountsPage);
    check(cudaHostAlloc(&rank.pinned, pinned_bytes, cudaHostAllocPortable | cudaHostAllocMapped), "pinned");
    std::memset(rank.pinned, 0, pinned_bytes);
    rank.abort = reinterpret_cast<std::uint64_t*>(rank.pinned);
    rank.record = reinterpret_cast<protocol::FaultRecord*>(rank.pinned + 256);
    rank.page = reinterpret_cast<cuda::CountsPage*>(rank.pinned + 4096);
    rank.heap.adopt(rank.window + layout.heap, layout.heap_bytes);
    rank.arena.adopt(rank.memory, arena_bytes);
    check(cudaDeviceSynchronize(), "synchronize");
  }

  std::uint64_t limit_;
};

/// Spins until the counts of notify are there; false = the rank has failed or 10 s have passed.
inline bool wait_for_page(const Rank& rank, const cuda::CountsPage& page) {
  for (std::uint64_t start = protocol::now_ns();;) {
    if (std::atomic_ref<std::uint64_t>(const_cast<std::uint64_t&>(page.word)).load(std::memory_order_acquire) != 0) {
      return true;
    }
    if (protocol::now_ns() - start > 10'000'000'000u) return false;
    if (std::atomic_ref<std::uint32_t>(rank.record->ready).load(std::memory_order_acquire) != 0) return false;
    std::this_thread::yield();
  }
}

}  // namespace anyep::test
