#include "bench/support/record.h"

#include <anyep/config.h>

#include <cmath>
#include <nlohmann/json.hpp>

namespace anyep::bench {
namespace {

using Json = nlohmann::ordered_json;

std::optional<double> rate(std::int64_t rows, const Figure& figure) {
  if (figure.logical_rows == 0 || figure.us_p50 <= 0) return std::nullopt;
  return static_cast<double>(rows * figure.row_bytes) / figure.us_p50 * 1e-3;
}

/// Four digits after the point say more than any clock here.
Json rounded(std::optional<double> value) {
  return value ? Json(std::round(*value * 1e4) / 1e4) : Json(nullptr);
}

}  // namespace

std::optional<double> Figure::wire_gbs() const {
  return rate(wire_rows, *this);
}
std::optional<double> Figure::logical_gbs() const {
  return rate(logical_rows, *this);
}

std::optional<double> Figure::ratio() const {
  const auto wire = wire_gbs();
  return wire && ceiling_gbs > 0 ? std::optional(*wire / ceiling_gbs) : std::nullopt;
}

std::optional<double> Figure::share() const {
  const auto logical = logical_gbs();
  return logical && ceiling_gbs > 0 ? std::optional(*logical / ceiling_gbs) : std::nullopt;
}

std::string to_json_line(const Figure& figure, const Machine& machine) {
  const bool on_gpu = !machine.gpu.empty();
  Json line = {{"date", today()},
               {"gpu", on_gpu ? machine.gpu : "cpu:" + machine.cpu_model},
               {"count", on_gpu ? machine.gpus : machine.cores},
               {"driver", on_gpu ? machine.driver : machine.kernel},
               {"cuda", on_gpu ? Json(machine.cuda) : Json(nullptr)},
               {"commit", version()},
               {"op", figure.op},
               {"kind", figure.kind},
               {"dtype", figure.dtype},
               {"tokens", figure.tokens},
               {"hidden", figure.hidden},
               {"topk", figure.topk},
               {"experts", figure.experts},
               {"ranks", figure.ranks},
               {"sms", figure.threads},
               {"us_p50", rounded(figure.us_p50)},
               {"us_p99", rounded(figure.us_p99)},
               {"wire_gbs", rounded(figure.wire_gbs())},
               {"ceiling_gbs", rounded(figure.ceiling_gbs > 0 ? std::optional(figure.ceiling_gbs) : std::nullopt)},
               {"ratio", rounded(figure.ratio())},
               {"graph", figure.graph},
               {"routing", figure.routing}};
  if (!figure.memory.empty()) line["memory"] = figure.memory;
  if (figure.late_us > 0) line["late_us"] = figure.late_us;
  line["logical_gbs"] = rounded(figure.logical_gbs());
  line["share"] = rounded(figure.share());
  line["wire_rows"] = figure.wire_rows;
  line["iters"] = figure.iterations;
  line["wrong"] = figure.wrong;
  line["api"] = "c++";
  if (!figure.command.empty()) line["command"] = figure.command;
  return line.dump();
}

}  // namespace anyep::bench
