#include "core/log.h"

#include <anyep/config.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <utility>

#include "core/env.h"

namespace anyep::core {
namespace {

struct Sink {
  std::mutex mutex;
  std::shared_ptr<const LogCallback> callback;
};

// Never destroyed: threads that outlive static destruction may still log.
Sink& sink() {
  static Sink& instance = *new Sink;
  return instance;
}

// kOff until there is a callback, so that a silent log costs one load.
std::atomic<int> least_level{static_cast<int>(LogLevel::kOff)};

}  // namespace

bool log_enabled(LogLevel level) noexcept {
  return level < LogLevel::kOff && static_cast<int>(level) >= least_level.load(std::memory_order_relaxed);
}

void log(LogLevel level, std::string_view line) noexcept {
  if (!log_enabled(level)) return;
  try {
    std::shared_ptr<const LogCallback> callback;
    {
      const std::lock_guard lock(sink().mutex);
      callback = sink().callback;
    }
    if (callback) (*callback)(static_cast<int>(level), line);  // outside the lock: it may log, or set another callback
  } catch (...) {
    // A log line is never worth an operation.
  }
}

void log_debug(std::string_view line) noexcept {
  log(LogLevel::kDebug, line);
}
void log_info(std::string_view line) noexcept {
  log(LogLevel::kInfo, line);
}
void log_warning(std::string_view line) noexcept {
  log(LogLevel::kWarning, line);
}
void log_error(std::string_view line) noexcept {
  log(LogLevel::kError, line);
}

}  // namespace anyep::core

namespace anyep {

void set_log_callback(LogCallback callback) {
  std::shared_ptr<const LogCallback> next;
  if (callback) next = std::make_shared<const LogCallback>(std::move(callback));
  const core::LogLevel level = next ? core::env_log_level() : core::LogLevel::kOff;
  {
    const std::lock_guard lock(core::sink().mutex);
    core::sink().callback.swap(next);
    core::least_level.store(static_cast<int>(level), std::memory_order_relaxed);
  }
  // The old callback dies here, outside the lock: its destructor is the user's code.
}

}  // namespace anyep
