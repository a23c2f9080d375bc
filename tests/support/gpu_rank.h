// One rank on a GPU that does the same small exchange over and over and knows what must come out.
#pragma once

#if ANYEP_CUDA
#include <anyep/bootstrap.h>
#include <anyep/engine.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

namespace anyep::test {

/// GPUs of this machine, asked in a child: this process must not touch CUDA, its children will.
int gpus_seen_by_a_child();

class GpuRank {
 public:
  /// What the engine has memory for.
  enum class Serves { kExchanges, kPairs, kPairsWithMasks };
  GpuRank(Bootstrap& bootstrap, std::chrono::milliseconds limit, int num_gpus, Serves serves = Serves::kExchanges);
  ~GpuRank();
  GpuRank(const GpuRank&) = delete;
  GpuRank& operator=(const GpuRank&) = delete;

  /// GPU memory, dense, freed with this rank.
  TensorView new_tensor(DType type, const Extents& shape);
  Engine& engine() { return *engine_; }
  cudaStream_t stream() const { return stream_; }
  /// Puts route, dispatch and combine on the stream; waits for the counts only.
  void launch();
  /// Waits for the end and compares. Empty, or what is wrong. Throws the engine's error.
  std::string finish();
  std::string exchange() {
    launch();
    return finish();
  }
  /// The same with route and dispatch as one.
  void launch_fresh();
  /// That one alone; and into the caller's rows, made before or in the call.
  Fresh dispatch_fresh();
  Fresh dispatch_into(const Rows& out, Surplus surplus);
  Fresh dispatch_into(const std::function<Rows()>& out);
  /// Combines what has been dispatched to the front of these rows, and compares.
  std::string exchange_back(Handle handle, TensorView rows);
  /// Dispatch and combine with a handle whose rows have not moved.
  void launch_with(Handle handle);
  /// One part of it.
  void launch_route();
  void launch_combine();
  /// The GPU context still computes and copies.
  bool computes() const;
  void forget() { engine_.reset(); }

  // ---- in a captured graph ----
  /// Rows for all tokens of all ranks, which graphs use.
  void take_worst_case_rows();
  const OwnedRows& worst_case_rows() const { return worst_case_rows_; }
  enum class Together { kNo, kYes };
  /// Puts route, dispatch into the worst case (together: as one) and combine on the stream; waits for nothing.
  void launch_without_host(Together together = Together::kNo);
  /// Other inputs: every replay and every exchange from now on uses these.
  void change_inputs(unsigned salt);
  /// Compares; everything on the stream is done.
  std::string compare();

  // ---- low latency: a dispatch and a combine of the first kPairTokens tokens ----
  enum class Halves { kTogether, kByHooks };
  /// Puts both on the stream; waits for nothing, also in capture.
  void launch_pair(Halves halves);
  std::string finish_pair();
  /// As compare(); of the peers in the bit mask, which died, no answer may have come.
  std::string compare_pair(unsigned gone = 0);

  static constexpr std::int64_t kTokens = 512, kHidden = 2048, kPairTokens = 96;
  static constexpr int kTopK = 4, kExpertsPerRank = 4;

 private:
  Routing routing() const;
  Shape shape() const { return Shape{num_experts_, kTopK}; }
  Rows input() const;
  Shape pair_shape() const { return Shape{num_experts_, kTopK, kHidden, kPairTokens}; }
  void launch_combine_of(const TensorView& rows);
  void take_slabs(std::int64_t num_ranks);
  /// The first rows of out_ against each token's row of x_, times what times() says.
  template <class Times>
  std::string compare_rows(std::int64_t num_rows, const Times& times);

  std::optional<Engine> engine_;
  cudaStream_t stream_ = nullptr;
  int num_experts_ = 0;
  std::int64_t* ids_ = nullptr;
  std::uint16_t *x_ = nullptr, *out_ = nullptr;
  TensorView weights_;  ///< of pairs, all 1
  ExpertSlabs slabs_;   ///< of pairs
  std::vector<void*> memory_;
  std::vector<std::int64_t> host_ids_;
  std::vector<std::uint16_t> host_x_;
  std::vector<Handle> captured_;  ///< alive as long as their graphs
  std::vector<int> ranks_of_;     ///< per token
  std::optional<Handle> handle_;
  OwnedRows rows_;
  OwnedRows worst_case_rows_;  ///< of graphs
  Event done_;
};

}  // namespace anyep::test
#endif
