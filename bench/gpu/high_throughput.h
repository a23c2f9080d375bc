// One rank's side of a high-throughput measurement on a GPU: tensors there, the calls as a user makes them, their check.
#pragma once

#include <anyep/engine.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "bench/gpu/mirror.h"
#include "bench/support/high_throughput_case.h"

namespace anyep::bench {

/// Calls put work on the stream and return; `i` chooses among copies of inputs and outputs, so that no call finds the last
/// one's rows in a cache.
class GpuHighThroughput {
 public:
  GpuHighThroughput(Engine& engine, const HighThroughputData& data, Memory memory, int num_sms, cudaStream_t stream);

  /// Fresh routing, exact-size outputs, ids and weights: in the window one call, which makes the rows; for tensors of the
  /// caller's route, wait for the counts, dispatch.
  void dispatch(int i);
  /// The same into rows in the window that the caller makes for the worst case, which ids past the last row tell apart; the
  /// host waits for the counts afterwards and cuts the rows to size.
  void dispatch_ahead(int i);
  /// Rows and scales alone, by a handle of before.
  void dispatch_cached(int i);
  /// Sums of answers in BF16. The first call makes and fills them.
  void combine(int i);

  /// After one more call on poisoned outputs. Collective.
  std::int64_t wrong_dispatch();
  std::int64_t wrong_dispatch_ahead();
  std::int64_t wrong_dispatch_cached();
  std::int64_t wrong_combine();
  /// Host time of the last dispatch() or dispatch_ahead() without its wait for the counts.
  double host_us() const { return host_us_; }
  int num_copies() const { return static_cast<int>(inputs_.size()); }

 private:
  struct Input {
    DeviceTensor x, scales;
  };
  struct Output {
    DeviceTensor x, scales, experts, weights;
    OwnedRows owned;
    Rows rows;
  };
  Output make_output() const;
  void make_answers();
  Rows input(int i) const;
  Rows routed_input(int i) const;  ///< with the side data of a fresh dispatch
  Routing routing() const;
  Options options() const;
  StreamRef stream() const { return {stream_}; }
  void finish() const;
  void poison_fresh();
  std::int64_t wrong_rows(const Output& output, bool with_side_data) const;

  Engine* engine_;
  const HighThroughputData* data_;
  Memory memory_;
  int num_sms_;
  cudaStream_t stream_;
  std::vector<Input> inputs_;
  std::vector<Output> outputs_, fresh_;
  DeviceTensor experts_, weights_, answers_, sums_;
  OwnedRows owned_answers_;
  TensorView answers_view_;
  Handle handle_;
  double host_us_ = 0;
};

}  // namespace anyep::bench
