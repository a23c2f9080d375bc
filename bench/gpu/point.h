// What is measured at one shape, as the command line says it.
#pragma once

#include <anyep/workload.h>

#include <cstdint>
#include <string>
#include <vector>

namespace anyep::bench {

/// "tokens=4096 sms=16 ops=dispatch,combine": fields that are left out keep their defaults.
struct Point {
  std::int64_t tokens = 4096, hidden = 7168;
  int topk = 8, experts = 256, sms = 16, seed = 1;
  std::string profile = "uniform";
  std::vector<std::string>
      ops;  ///< high throughput: dispatch, dispatch_ahead, dispatch_cached, combine; low latency: graph, hook, eager, parts
  std::vector<std::string> dtypes = {"bf16", "fp8"};
  std::vector<std::string> memories = {"window", "caller"};
  bool idle = false;            ///< also from an idle stream
  bool product = false;         ///< also beside a matrix product
  std::int64_t max_tokens = 0;  ///< low latency: what slabs hold of each rank, at least

  bool wants(const std::string& op) const;
  std::string routing() const;  ///< "uniform:1"
  workload::Batch batch(int num_ranks) const;
};

/// Points, separated by ';'; `default_ops` are all there are. @throws std::invalid_argument
std::vector<Point> parse_points(const std::string& text, const std::vector<std::string>& default_ops);

}  // namespace anyep::bench
