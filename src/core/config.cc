#include <anyep/config.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "core/env.h"
#include "core/tuning.h"

namespace anyep::core {

void check_limit(std::string_view op, std::string_view argument, std::chrono::nanoseconds limit) {
  if (limit.count() > 0 && limit <= kMaxLimit) return;
  throw_argument(op, argument, fmt::format("{} ns", limit.count()), fmt::format("1 to {} ns", kMaxLimit.count()),
                 "No call is without a limit; for a long one say hours");
}

void check_tuning(const Tuning& tuning, std::string_view op) {
  check_limit(op, "tuning.timeout", tuning.timeout);
  check_limit(op, "tuning.startup_timeout", tuning.startup_timeout);
  check_limit(op, "tuning.close_timeout", tuning.close_timeout);
  if (!std::isfinite(tuning.time_scale) || tuning.time_scale <= 0) {
    throw_argument(op, "tuning.time_scale", fmt::format("{}", tuning.time_scale), "a finite number above 0");
  }
}

std::chrono::nanoseconds scaled(std::chrono::nanoseconds limit, const Tuning& tuning) noexcept {
  if (tuning.time_scale == 1.0) return std::min(limit, kMaxLimit);
  const double product_ns = static_cast<double>(limit.count()) * tuning.time_scale;
  if (!(product_ns < static_cast<double>(kMaxLimit.count()))) return kMaxLimit;
  return std::max(std::chrono::nanoseconds(static_cast<std::int64_t>(product_ns)), std::chrono::nanoseconds(1));
}

}  // namespace anyep::core

namespace anyep {

Tuning Tuning::from_environment() {
  core::check_environment();
  Tuning tuning;
  tuning.timeout = core::env_seconds("ANYEP_TIMEOUT_S").value_or(tuning.timeout);
  tuning.startup_timeout = core::env_seconds("ANYEP_STARTUP_TIMEOUT_S").value_or(tuning.startup_timeout);
  tuning.close_timeout = core::env_seconds("ANYEP_CLOSE_TIMEOUT_S").value_or(tuning.close_timeout);
  tuning.time_scale = core::env_factor("ANYEP_TIME_SCALE").value_or(tuning.time_scale);
  tuning.checked = core::env_choice("ANYEP_CHECK").value_or("0") == "1";
  tuning.exact_combine = core::env_choice("ANYEP_COMBINE").value_or("ranks") == "exact";
  core::check_tuning(tuning, "environment");
  return tuning;
}

}  // namespace anyep
