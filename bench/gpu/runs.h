// The measurements of one process start, point by point: probes and operations in turn, in the same rounds.
#pragma once

#include <anyep/engine.h>

#include <functional>
#include <string>
#include <vector>

#include "bench/gpu/lines.h"
#include "bench/gpu/point.h"
#include "bench/probes/probes.h"
#include "bench/probes/timer.h"

namespace anyep::bench {

/// What the runs of a rank share.
struct Bench {
  Engine* engine;
  Timer* timer;
  Probes* probes;
  int rank, num_ranks, num_gpus;
  int rounds;                             ///< batches of high throughput, times ten replays of a graph
  std::function<void(Line line)> report;  ///< rank 0's; the others' do nothing
};

/// Pushes, gathers and every operation that the point names. Wrong elements of all ranks. Collective, as all here.
double run_high_throughput(const Bench& bench, const Point& point);
/// Pairs, their parts, and the decode steps of the same rows.
double run_low_latency(const Bench& bench, const Point& point);
/// What the links carry at these numbers of SMs.
void run_copies(const Bench& bench, const std::vector<int>& sms, const std::vector<int>& row_bytes);

}  // namespace anyep::bench
