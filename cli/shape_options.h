// The arguments that name a shape, equal in all subcommands.
#pragma once

#include <anyep/config.h>
#include <anyep/workload.h>

#include <cstdint>
#include <string>

namespace CLI {
class App;
}

namespace anyep::cli {

struct ShapeOptions {
  std::string model = "deepseek-v3";
  std::int64_t hidden = 0;  ///< 0, here and below: the model's
  int experts = 0;
  int top_k = 0;
  int ranks = 4;

  void add_to(CLI::App& app);
  /// The preset with what was given instead. @throws Error kArgument for an unknown model, UsageError for what cannot
  /// be.
  workload::ModelPreset model_preset() const;
  /// Shape of BF16 rows.
  Shape shape(std::int64_t max_tokens) const;
};

/// "64", "64K", "64M", "64G" (powers of two). @throws UsageError
std::int64_t parse_bytes(const std::string& text, const std::string& option);

}  // namespace anyep::cli
