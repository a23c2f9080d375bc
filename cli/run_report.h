// What `anyep run` prints.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cli/job.h"

namespace anyep::cli {

/// One phase, over its calls; formulas in bench/METRICS.md.
struct PhaseFigures {
  std::string mode, name;
  std::int64_t calls = 0;
  double us_p50 = 0, us_p99 = 0;                         ///< of the slowest rank
  double wire_gbs = 0, logical_gbs = 0, of_ceiling = 0;  ///< 0 where meaningless
};

struct RunReport {
  std::string model, source, ranks_are;
  int num_ranks = 1;
  std::int64_t hidden = 0, tokens = 0, words = 0;
  int num_experts = 0, top_k = 0;
  std::vector<PhaseFigures> phases;
  double ceiling_gbs = 0;  ///< memory copy per rank, all ranks at once
  std::string ceiling_method;
  workload::Statistics routing;
  std::int64_t compared = 0, wrong = 0;
  std::vector<std::string> failures;
  double seconds = 0;

  std::string to_text() const;
  std::string to_json() const;
};

RunReport make_report(const Job& job, const Board& board, const std::string& text_name,
                      const std::vector<std::string>& failures, double seconds);

}  // namespace anyep::cli
