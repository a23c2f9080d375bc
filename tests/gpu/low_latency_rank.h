// One rank that runs drawn low-latency pairs through an engine and has them checked on its GPU.
#pragma once

#include <anyep/bootstrap.h>
#include <anyep/engine.h>
#include <cuda_runtime.h>

#include <memory>
#include <optional>
#include <vector>

#include "low_latency_draw.h"
#include "low_latency_pair_kernels.h"
#include "support/stream_graph.h"

namespace anyep::test {

class LowLatencyRank {
 public:
  /// Collective. Has room for each of `pairs`, two in flight.
  LowLatencyRank(Bootstrap& bootstrap, int num_gpus, const std::vector<PairDraw>& pairs,
                 std::int64_t low_latency_bytes);
  ~LowLatencyRank();
  LowLatencyRank(const LowLatencyRank&) = delete;
  LowLatencyRank& operator=(const LowLatencyRank&) = delete;

  Engine& engine() { return *engine_; }
  cudaStream_t stream() const { return stream_; }

  /// One pair by itself or, where both have hooks only, two in flight together; how many.
  int put(const PairDraw* pairs, int count);
  /// A graph of so many, which bring something else in every replay.
  std::unique_ptr<StreamGraph> capture(const PairDraw* pairs, int count);
  /// What the op before has left is damaged before it is checked, and mended behind.
  void put_damaged(const PairDraw& pair, Field field);

  // ---- a pair with hooks, half by half ----
  // Sends on stream(); a hook and the check behind it on a stream that the caller names, or on the same.
  void send_dispatch(const PairDraw& pair);
  void receive_dispatch() { receive_dispatch(stream_); }
  void receive_dispatch(cudaStream_t stream);
  void send_combine();
  void receive_combine() { receive_combine(stream_); }
  void receive_combine(cudaStream_t stream);

  /// Waits for what is on the stream. @throws Error what the engine has found
  Findings look();

 private:
  static constexpr std::size_t kSets = 2;
  struct One {
    const PairDraw* pair;
    PairCall call;
    PairMemory memory;
    std::optional<Pending> pending;
  };
  PairCall call_of(const PairDraw& pair) const;
  One place(const PairDraw& pair, std::size_t set) const;
  Findings* findings() const { return reinterpret_cast<Findings*>(base_ + kSets * bytes_); }
  std::uint32_t* replay() const { return reinterpret_cast<std::uint32_t*>(base_ + kSets * bytes_ + sizeof(Findings)); }

  void dispatch(One& one);
  void combine(One& one);
  /// Ends the op that is pending, with a hook after this rank was late, perhaps.
  void receive(One& one, bool hook, std::uint32_t place, cudaStream_t stream);
  void put_two(const PairDraw& first, const PairDraw& second);

  int rank_ = 0;
  cudaStream_t stream_ = nullptr;
  std::size_t bytes_ = 0;
  std::byte* base_ = nullptr;
  std::optional<Engine> engine_;
  std::optional<One> open_;  ///< the pair that goes half by half
};

}  // namespace anyep::test
