// Limits of time: what is allowed, and what they are after scaling.
#pragma once

#include <anyep/config.h>

#include <chrono>
#include <limits>
#include <string_view>

namespace anyep::core {

/// The longest limit. Half of what 63 bits hold (146 years), so that now + limit cannot overflow.
inline constexpr std::chrono::nanoseconds kMaxLimit = std::chrono::nanoseconds::max() / 2;

/// @throws Error kArgument unless 0 < limit <= kMaxLimit; `argument` names it, such as "options.timeout".
void check_limit(std::string_view op, std::string_view argument, std::chrono::nanoseconds limit);

/// All three limits, and that time_scale is finite and above 0. @throws Error kArgument naming the field.
void check_tuning(const Tuning& tuning, std::string_view op);

/// limit * time_scale, at least 1 ns and at most kMaxLimit. Of checked values.
std::chrono::nanoseconds scaled(std::chrono::nanoseconds limit, const Tuning& tuning) noexcept;

}  // namespace anyep::core
