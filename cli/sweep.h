// The measurements of `anyep bench`: which figures, and the ranks that take them.
#pragma once

#include <anyep/workload.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bench/support/high_throughput_case.h"
#include "bench/support/machine.h"
#include "bench/support/record.h"
#include "cli/team.h"

namespace anyep::cli {

enum class BenchOp { kDispatch, kDispatchCached, kCombine, kPair };
const char* name_of(BenchOp op);

/// One line of the output.
struct FigureSpec {
  std::int64_t tokens = 0;  ///< per rank, at most
  BenchOp op = BenchOp::kDispatch;
  bench::RowType type = bench::RowType::kBF16;
  bench::Memory memory = bench::Memory::kWindow;  ///< of high throughput
  double late_us = 0;                             ///< one rank, another in each iteration, calls so much later
};

enum class Device { kCpu, kCuda };

struct SweepOptions {
  TeamOptions team;
  Device device = Device::kCpu;
  int num_sms = 0;  ///< GPU ranks; 0 = the plan chooses
  workload::ModelPreset model;
  std::string routing;                   ///< its name, for records
  std::vector<workload::Batch> batches;  ///< one per number of tokens
  std::vector<FigureSpec> figures;       ///< in the order of `batches`
  int iterations = 20, warm_up = 5;
  bool check = true;
  bool show_progress = true;
};

struct SweepResult {
  std::vector<bench::Figure> figures;
  double ceiling_gbs = 0;
  std::string ceiling_method;
  bench::Machine machine;
  std::vector<std::string> failures;
};

SweepResult run_sweep(const SweepOptions& options);

}  // namespace anyep::cli
