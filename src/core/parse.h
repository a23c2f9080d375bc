// Strict parsing of numbers in text that users write: variables, fault points, options. The whole text, or nothing.
#pragma once

#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>

namespace anyep::core {

/// Digits only, up to 2^64 - 1.
std::optional<std::uint64_t> parse_integer(std::string_view text) noexcept;
/// Digits, or digits.digits; finite.
std::optional<double> parse_decimal(std::string_view text) noexcept;
/// As parse_decimal, exact: at most nine decimals, at most the seconds that 63 bits of nanoseconds hold. Zero is a
/// value.
std::optional<std::chrono::nanoseconds> parse_seconds(std::string_view text) noexcept;
/// For messages: in double quotes, without control characters, cut after 64.
std::string quoted(std::string_view text);

inline std::optional<std::uint64_t> parse_integer(std::string_view text) noexcept {
  std::uint64_t value = 0;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);  // takes no sign and no space for unsigned types
  if (error != std::errc{} || stop != end) return std::nullopt;
  return value;
}

inline std::optional<double> parse_decimal(std::string_view text) noexcept {
  const auto is_digit = [](char c) { return c >= '0' && c <= '9'; };
  const std::size_t point = text.find('.');
  for (std::size_t at = 0; at < text.size(); ++at) {
    if (at != point && !is_digit(text[at])) return std::nullopt;
  }
  if (text.empty() || point == 0 || point == text.size() - 1) return std::nullopt;
  double value = 0;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value, std::chars_format::fixed);
  if (error != std::errc{} || stop != end || !std::isfinite(value)) return std::nullopt;
  return value;
}

inline std::optional<std::chrono::nanoseconds> parse_seconds(std::string_view text) noexcept {
  constexpr std::size_t kDecimals = 9;
  constexpr std::int64_t kPerSecond = 1'000'000'000;
  const std::size_t point = text.find('.');
  const std::optional<std::uint64_t> whole = parse_integer(text.substr(0, point));
  if (!whole || *whole > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max() / kPerSecond - 1)) {
    return std::nullopt;
  }
  std::uint64_t fraction_ns = 0;
  if (point != std::string_view::npos) {
    const std::string_view decimals = text.substr(point + 1);
    const std::optional<std::uint64_t> digits = parse_integer(decimals);
    if (!digits || decimals.size() > kDecimals) return std::nullopt;
    fraction_ns = *digits;
    for (std::size_t count = decimals.size(); count < kDecimals; ++count) fraction_ns *= 10;
  }
  return std::chrono::nanoseconds(static_cast<std::int64_t>(*whole) * kPerSecond +
                                  static_cast<std::int64_t>(fraction_ns));
}

inline std::string quoted(std::string_view text) {
  constexpr std::size_t kMostCharacters = 64;
  std::string result = "\"";
  for (const char c : text.substr(0, kMostCharacters)) {
    result += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? '?' : c;
  }
  if (text.size() > kMostCharacters) result += "...";
  return result + '"';
}

}  // namespace anyep::core
