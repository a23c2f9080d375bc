#include "bench/gpu/point.h"

#include <algorithm>
#include <stdexcept>

#include "bench/probes/arguments.h"

namespace anyep::bench {
namespace {

void set(Point& point, const std::string& field) {
  const std::size_t equals = field.find('=');
  if (equals == std::string::npos) throw std::invalid_argument("a point's field is name=value, not " + field);
  const std::string name = field.substr(0, equals), value = field.substr(equals + 1);
  if (name == "tokens") {
    point.tokens = to_number(value, name);
  } else if (name == "hidden") {
    point.hidden = to_number(value, name);
  } else if (name == "topk") {
    point.topk = to_number(value, name);
  } else if (name == "experts") {
    point.experts = to_number(value, name);
  } else if (name == "sms") {
    point.sms = to_number(value, name);
  } else if (name == "seed") {
    point.seed = to_number(value, name);
  } else if (name == "profile") {
    point.profile = value;
  } else if (name == "ops") {
    point.ops = split(value, ',');
  } else if (name == "dtype") {
    point.dtypes = split(value, ',');
  } else if (name == "memory") {
    point.memories = split(value, ',');
  } else if (name == "idle") {
    point.idle = to_number(value, name) != 0;
  } else if (name == "product") {
    point.product = to_number(value, name) != 0;
  } else if (name == "max_tokens") {
    point.max_tokens = to_number(value, name);
  } else {
    throw std::invalid_argument("a point has no field " + name);
  }
}

}  // namespace

bool Point::wants(const std::string& op) const {
  return std::find(ops.begin(), ops.end(), op) != ops.end();
}

std::string Point::routing() const {
  return profile + ":" + std::to_string(seed);
}

workload::Batch Point::batch(int num_ranks) const {
  workload::Request request;
  request.profile = workload::parse_profile(profile);
  request.seed = static_cast<std::uint64_t>(seed);
  request.num_experts = experts;
  request.top_k = topk;
  request.num_ranks = num_ranks;
  request.tokens_per_rank = tokens;
  return workload::generate(request);
}

std::vector<Point> parse_points(const std::string& text, const std::vector<std::string>& default_ops) {
  std::vector<Point> points;
  for (const std::string& part : split(text, ';')) {
    Point point;
    point.ops = default_ops;
    for (const std::string& field : split(part, ' ')) set(point, field);
    for (const std::string& op : point.ops) {
      if (std::find(default_ops.begin(), default_ops.end(), op) == default_ops.end()) {
        throw std::invalid_argument("no operation named " + op + " here");
      }
    }
    points.push_back(std::move(point));
  }
  return points;
}

}  // namespace anyep::bench
