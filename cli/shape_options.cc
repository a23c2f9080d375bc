#include "cli/shape_options.h"

#include <fmt/format.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <charconv>

#include "cli/command.h"
#include "core/limits.h"

namespace anyep::cli {

void ShapeOptions::add_to(CLI::App& app) {
  app.add_option("--model", model, "shape preset; `anyep info` lists them")->capture_default_str();
  app.add_option("--ranks", ranks, "ranks")->capture_default_str()->check(CLI::Range(1, core::kMaxRanks));
  app.add_option("--hidden", hidden, "elements per row instead of the model's")->check(CLI::PositiveNumber);
  app.add_option("--experts", experts, "experts instead of the model's")->check(CLI::PositiveNumber);
  app.add_option("--topk", top_k, "experts per token instead of the model's")->check(CLI::Range(1, core::kMaxTopK));
}

workload::ModelPreset ShapeOptions::model_preset() const {
  workload::ModelPreset preset = workload::find_model(model);
  if (hidden > 0) preset.hidden = hidden;
  if (top_k > 0) preset.top_k = top_k;
  if (experts > 0) {
    preset.num_experts = experts;
    preset.groups = preset.groups_kept = 1;
  }
  if (preset.top_k > preset.num_experts) {
    throw UsageError(fmt::format("--topk = {}, allowed: at most the {} experts", preset.top_k, preset.num_experts));
  }
  if (preset.hidden % 8 != 0) {
    throw UsageError(fmt::format("--hidden = {}, allowed: multiples of 8, since row bytes are multiples of {}",
                                 preset.hidden, core::kRowGranule));
  }
  return preset;
}

Shape ShapeOptions::shape(std::int64_t max_tokens) const {
  const workload::ModelPreset preset = model_preset();
  Shape shape;
  shape.num_experts = preset.num_experts;
  shape.top_k = preset.top_k;
  shape.hidden = preset.hidden;
  shape.max_tokens = max_tokens;
  return shape;
}

std::int64_t parse_bytes(const std::string& text, const std::string& option) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const std::string suffix(end, text.data() + text.size());
  const std::string units = "KMGT";
  const std::size_t unit = suffix.empty() ? 0 : units.find(suffix[0]);
  const int shift = suffix.empty() ? 0 : 10 * static_cast<int>(unit + 1);
  if (error != std::errc{} || value < 0 || suffix.size() > 1 || unit == std::string::npos ||
      value >> (62 - shift) != 0) {
    throw UsageError(fmt::format("{} = {}, allowed: bytes like 1048576, 512K, 64M, 2G", option, text));
  }
  return value << shift;
}

}  // namespace anyep::cli
