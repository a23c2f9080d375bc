// The environment: this is its only reader. Every variable of ours is in one table, with its grammar.
//
// The whole text must parse. Numbers are decimal digits, with at most one point where decimals make sense; no sign,
// exponent, suffix or space. Anything else is kArgument with variable and text.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "core/log.h"

namespace anyep::core {

enum class EnvKind : std::uint8_t {
  kSeconds,  ///< above 0, to the nanosecond
  kFactor,   ///< a number above 0
  kInteger,  ///< 0 to 2^64 - 1
  kChoice,   ///< one of `values`
  kText      ///< not empty; its user parses it
};

struct EnvVariable {
  std::string_view name;
  EnvKind kind = EnvKind::kText;
  std::string_view values;    ///< of kChoice: separated by '|'
  std::string_view fallback;  ///< what holds when it is not set, as text
  std::string_view meaning;   ///< one line
};

/// All ANYEP_* variables, in the order in which `anyep doctor` prints them.
std::span<const EnvVariable> env_variables() noexcept;

/// Below, `name` must be in the table. @throws Error kArgument (op "environment") when the text does not parse.
std::optional<std::chrono::nanoseconds> env_seconds(std::string_view name);
std::optional<double> env_factor(std::string_view name);
std::optional<std::uint64_t> env_integer(std::string_view name);
std::optional<std::string> env_choice(std::string_view name);
std::optional<std::string> env_text(std::string_view name);

/// ANYEP_LOG; garbage counts as the default here, since logging never throws: check_environment() reports it.
LogLevel env_log_level() noexcept;

/// Parses every variable of the table that is set, then logs one warning that lists ANYEP_* names that are not in the
/// table (once per set of names). @throws Error kArgument.
void check_environment();

}  // namespace anyep::core
