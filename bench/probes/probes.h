// One rank's side of the probes: memory, places, and what it takes to time and to check each.
#pragma once

#include <anyep/workload.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "bench/probes/kernels.h"
#include "bench/probes/peer_memory.h"
#include "bench/probes/timer.h"

namespace anyep::bench {

/// Memory on the current device; freed with the object.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  explicit DeviceMemory(std::size_t bytes);
  DeviceMemory(DeviceMemory&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~DeviceMemory();
  std::byte* data() const { return static_cast<std::byte*>(data_); }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

/// What the probes of one run need at most.
struct ProbeLimits {
  std::int64_t tokens = 4096;      ///< of the busiest rank
  std::int64_t row_bytes = 14336;  ///< longest row
  std::int64_t copy_bytes = 0;     ///< of one copy for the links; 0 = that probe is not wanted
};

class Probes {
 public:
  static constexpr int kStepsPerGraph = 40;

  /// Collective; the timer's stream and the current device are the probes'.
  Probes(Timer& timer, const ProbeLimits& limits);
  /// What push and gather move from now on. Collective.
  void set_routing(const workload::Batch& batch);

  // Times of one batch (Timer). Collective.
  std::vector<double> push(int row_bytes, probes::Order order, int sms);
  std::vector<double> gather(int row_bytes, probes::Order order, int sms);
  /// GB/s per rank and direction: median of one batch.
  double copy_gbs(int row_bytes, probes::Direction direction, int sms);
  /// One period of a replayed graph; 0 rows: the flags alone.
  double step(probes::StepForm form, int row_bytes, int rows, int blocks) {
    return timer_->replayed(step_graph(form, row_bytes, rows, blocks), kStepsPerGraph);
  }
  cudaGraphExec_t step_graph(probes::StepForm form, int row_bytes, int rows, int blocks);  ///< local
  double empty_step();
  /// Numbers of blocks with which the step is tried: no more than rows, and all blocks resident. The best is among them.
  static std::vector<int> step_blocks(int rows, int num_ranks, int num_gpus);

  /// Runs each once and counts what arrived wrongly, on all ranks. Collective.
  double wrong_push(int row_bytes, probes::Order order, int sms);
  double wrong_gather(int row_bytes, probes::Order order, int sms);
  /// A step that waited in vain for a peer, on any rank. Collective.
  bool failed();

 private:
  probes::Places places() const;
  probes::Push push_params(int row_bytes) const;
  probes::Gather gather_params(int row_bytes) const;
  unsigned long long wrong() const;

  Timer* timer_;
  ProbeLimits limits_;
  int rank_, num_ranks_;
  std::unique_ptr<PeerMemory> shared_;
  std::size_t flags_at_ = 0, data_at_ = 0, rows_at_ = 0, copy_at_ = 0, copy_to_at_ = 0;
  DeviceMemory x_, out_, words_;
  DeviceMemory places_, before_, source_, token_;
  int num_tokens_ = 0, num_rows_ = 0;
  std::map<std::tuple<probes::StepForm, int, int, int>, std::unique_ptr<Graph>> steps_;
};

}  // namespace anyep::bench
