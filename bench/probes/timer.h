// How operations on a GPU are timed. METRICS.md says why so.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <vector>

#include "bench/probes/meeting.h"

namespace anyep::bench {

/// Times are microseconds of the slowest rank, operation by operation. All calls are collective.
class Timer {
 public:
  static constexpr int kBatch = 10, kDropped = 3;

  Timer(Meeting& meeting, int rank, cudaStream_t stream);
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  ~Timer();

  cudaStream_t stream() const { return stream_; }
  Meeting& meeting() const { return *meeting_; }
  int rank() const { return rank_; }

  /// Puts the i-th of a batch on the stream.
  using Put = std::function<void(int)>;

  /// kBatch operations that queue up behind each other, as in a stream that the host keeps busy; the first kDropped do
  /// not count. `before` and `after` put what is not timed.
  std::vector<double> queued(const Put& op, const Put& before = {}, const Put& after = {});
  /// As many, each on an idle stream: the ranks meet on the host before each.
  std::vector<double> from_idle(const Put& op);
  /// Host time of this rank's calls in the last batch, microseconds each, those that count.
  const std::vector<double>& host_us() const { return host_us_; }

  /// One replay, over `parts`; ranks meet on the host before.
  double replayed(cudaGraphExec_t graph, int parts);
  /// One replay by this rank, whatever the others do; local.
  double replayed_alone(cudaGraphExec_t graph);

 private:
  void put(int index, const Put& op);
  std::vector<double> elapsed();

  Meeting* meeting_;
  int rank_;
  cudaStream_t stream_;
  cudaEvent_t begin_[kBatch], end_[kBatch];
  std::vector<double> host_us_;
};

/// A graph of what `put` puts on the stream, on the GPU already.
class Graph {
 public:
  Graph(cudaStream_t stream, const std::function<void()>& put);
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph();
  cudaGraphExec_t get() const { return exec_; }

 private:
  cudaGraphExec_t exec_ = nullptr;
};

}  // namespace anyep::bench
