// What one process start says of one figure: a line of JSON with every sample, for bench/run_gpu. METRICS.md has the fields.
#pragma once

#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "bench/gpu/point.h"

namespace anyep::bench {

/// A figure's fields and samples, in the order in which they were set.
class Line {
 public:
  Line& text(const std::string& name, const std::string& value);
  Line& number(const std::string& name, double value);
  Line& samples(const std::string& name, const std::vector<double>& values);
  /// tokens, hidden, topk, experts, routing, ranks, sms
  Line& shape(const Point& point, int num_ranks);
  std::string to_json() const;

 private:
  Line& add(const std::string& name, std::string json);
  std::vector<std::pair<std::string, std::string>> fields_;
};

/// Samples of a run by figure, in the order in which figures first came.
class Series {
 public:
  void add(const std::string& figure, const std::vector<double>& values);
  void add(const std::string& figure, double value) { add(figure, std::vector<double>{value}); }
  const std::vector<double>& of(const std::string& figure) const;

 private:
  std::map<std::string, std::vector<double>> values_;
};

}  // namespace anyep::bench
