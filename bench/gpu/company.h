// Products of matrices on a stream of their own, beside which operations are timed.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "bench/probes/probes.h"
#include "bench/probes/timer.h"

namespace anyep::bench {

class Company {
 public:
  explicit Company(Timer& timer);
  Company(const Company&) = delete;
  Company& operator=(const Company&) = delete;
  ~Company();

  /// One batch of calls (Timer::queued) while products run. Collective.
  std::vector<double> beside(const Timer::Put& op);
  /// Microseconds of a product while calls ran the last time; of one that runs now, with nothing else put on a stream. Of the
  /// slowest rank. Collective.
  double with_calls();
  double alone();

 private:
  /// More than a batch of calls lasts. Of those, one that surely ran while calls did.
  static constexpr int kProducts = 12, kWatched = 1, kEdge = 4096;
  void start();

  Timer* timer_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t marks_[kProducts + 1];
  DeviceMemory a_, b_, sums_;
};

}  // namespace anyep::bench
