// The library's log: lines to a callback that the user set, silent otherwise. Any thread may log; logging never throws.
#pragma once

#include <string_view>

namespace anyep::core {

/// The numbers that a LogCallback gets. kOff is a threshold only.
enum class LogLevel : int { kDebug = 0, kInfo = 1, kWarning = 2, kError = 3, kOff = 4 };

/// Would a line of this level reach a callback? Ask before building a costly line.
bool log_enabled(LogLevel level) noexcept;

/// Lines come without a line end. The callback runs on the caller's thread and may log or set another callback itself.
void log(LogLevel level, std::string_view line) noexcept;
void log_debug(std::string_view line) noexcept;
void log_info(std::string_view line) noexcept;
void log_warning(std::string_view line) noexcept;
void log_error(std::string_view line) noexcept;

}  // namespace anyep::core
