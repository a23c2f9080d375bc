// One measured figure as a JSON line: the record format that bench/METRICS.md describes.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bench/support/machine.h"

namespace anyep::bench {

struct Figure {
  std::string op;      ///< dispatch, dispatch_cached, combine, pair, ceiling
  std::string kind;    ///< ht or ll
  std::string dtype;   ///< bf16, fp8: what dispatch moves
  std::string memory;  ///< window or caller; empty for low latency
  std::int64_t tokens = 0, hidden = 0;
  int topk = 0, experts = 0, ranks = 0, threads = 1;
  std::string routing;  ///< "uniform:1"
  double late_us = 0;   ///< one rank is late by this much
  double us_p50 = 0, us_p99 = 0;
  std::int64_t iterations = 0;
  std::int64_t wire_rows = 0, logical_rows = 0, row_bytes = 0;  ///< logical_rows = 0: rates are not meaningful
  double ceiling_gbs = 0;                                       ///< 0 = not measured
  std::int64_t wrong = 0;
  bool graph = false;  ///< inside a replayed graph
  std::string command;

  std::optional<double> wire_gbs() const;
  std::optional<double> logical_gbs() const;
  std::optional<double> ratio() const;  ///< wire over ceiling
  std::optional<double> share() const;  ///< logical over ceiling
};

/// One line, without its end.
std::string to_json_line(const Figure& figure, const Machine& machine);

}  // namespace anyep::bench
