// One rank's side of a decode measurement on a GPU: slabs there, the calls, their check.
#pragma once

#include <anyep/engine.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>

#include "bench/gpu/mirror.h"
#include "bench/support/low_latency_case.h"

namespace anyep::bench {

class GpuLowLatency {
 public:
  GpuLowLatency(Engine& engine, const LowLatencyData& data, int num_sms, cudaStream_t stream);

  // Merged launches: send and receive in one call.
  void dispatch();
  void combine();
  // Hook mode: receive() ends the send before.
  void dispatch_send();
  void combine_send();
  void receive();
  void pair() {
    dispatch();
    combine();
  }
  void pair_by_hooks();

  /// One more pair on poisoned outputs, merged or by hooks. Collective.
  std::int64_t wrong(bool by_hooks);

 private:
  ExpertSlabs answers_view() const;
  LowLatencyOptions options(Wire wire, bool hook) const;
  StreamRef stream() const { return {stream_}; }
  void finish() const;
  void fill_answers();
  std::int64_t wrong_slabs() const;

  Engine* engine_;
  const LowLatencyData* data_;
  int num_sms_;
  cudaStream_t stream_;
  DeviceTensor x_, experts_, weights_;
  DeviceTensor slab_, scales_, counts_, source_, range_, rows_;
  DeviceTensor answers_, sums_;
  ExpertSlabs slabs_;
  std::optional<Pending> pending_;
};

}  // namespace anyep::bench
