#include "bench/gpu/lines.h"

#include <fmt/format.h>

namespace anyep::bench {

Line& Line::add(const std::string& name, std::string json) {
  fields_.emplace_back(name, std::move(json));
  return *this;
}

/// Names and profiles: nothing that JSON would need escapes for.
Line& Line::text(const std::string& name, const std::string& value) {
  return add(name, '"' + value + '"');
}

Line& Line::number(const std::string& name, double value) {
  return add(name, fmt::format("{:.10g}", value));
}

Line& Line::samples(const std::string& name, const std::vector<double>& values) {
  std::string json = "[";
  for (std::size_t i = 0; i < values.size(); ++i) json += fmt::format("{}{:.2f}", i == 0 ? "" : ",", values[i]);
  return add(name, json + "]");
}

Line& Line::shape(const Point& point, int num_ranks) {
  number("tokens", static_cast<double>(point.tokens)).number("hidden", static_cast<double>(point.hidden));
  number("topk", point.topk).number("experts", point.experts).text("routing", point.routing());
  return number("ranks", num_ranks).number("sms", point.sms);
}

std::string Line::to_json() const {
  std::string json = "{";
  for (const auto& [name, value] : fields_)
    json += fmt::format("{}\"{}\":{}", json.size() == 1 ? "" : ",", name, value);
  return json + "}";
}

void Series::add(const std::string& figure, const std::vector<double>& values) {
  std::vector<double>& all = values_[figure];
  all.insert(all.end(), values.begin(), values.end());
}

const std::vector<double>& Series::of(const std::string& figure) const {
  static const std::vector<double> none;
  const auto found = values_.find(figure);
  return found == values_.end() ? none : found->second;
}

}  // namespace anyep::bench
