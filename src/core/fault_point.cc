#include "core/fault_point.h"

#include "core/check.h"

#if defined(ANYEP_FAULTS) && ANYEP_FAULTS

#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "core/env.h"
#include "core/parse.h"

namespace anyep::core {
namespace {

enum class Action { kKill, kStop, kThrow, kExit, kDelay };

struct Fault {
  std::string phase;
  std::optional<std::uint64_t> rank, sequence;  // none = any
  Action action = Action::kKill;
  std::chrono::milliseconds delay{0};
  std::atomic<bool> fired{false};
};

using Faults = std::vector<std::unique_ptr<Fault>>;

[[noreturn]] void refuse(std::string_view text) {
  throw_argument("fault_point", "ANYEP_FAULT", quoted(text),
                 "phase:rank:sequence:action, rank and sequence digits or *, action kill, stop, throw, exit or "
                 "delay=<milliseconds>");
}

bool is_phase(std::string_view text) {
  return !text.empty() && text.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_.") == std::string_view::npos;
}

// "*" gives none. False: neither that nor digits.
bool parse_any_or_integer(std::string_view text, std::optional<std::uint64_t>& value) {
  if (text == "*") return true;
  value = parse_integer(text);
  return value.has_value();
}

bool parse_action(std::string_view text, Fault& fault) {
  constexpr std::string_view kDelayIs = "delay=";
  constexpr std::uint64_t kMostDelayMs = 3'600'000;
  if (text == "kill")
    fault.action = Action::kKill;
  else if (text == "stop")
    fault.action = Action::kStop;
  else if (text == "throw")
    fault.action = Action::kThrow;
  else if (text == "exit")
    fault.action = Action::kExit;
  else if (text.starts_with(kDelayIs)) {
    const auto milliseconds = parse_integer(text.substr(kDelayIs.size()));
    if (!milliseconds || *milliseconds > kMostDelayMs) return false;
    fault.action = Action::kDelay;
    fault.delay = std::chrono::milliseconds(static_cast<std::int64_t>(*milliseconds));
  } else {
    return false;
  }
  return true;
}

std::unique_ptr<Fault> parse_one(std::string_view text) {
  std::array<std::string_view, 4> part;
  std::string_view rest = text;
  for (std::size_t at = 0; at < part.size(); ++at) {
    const std::size_t colon = rest.find(':');
    if ((colon == std::string_view::npos) != (at == part.size() - 1)) refuse(text);
    part[at] = rest.substr(0, colon);
    if (colon != std::string_view::npos) rest.remove_prefix(colon + 1);
  }
  auto fault = std::make_unique<Fault>();
  fault->phase = part[0];
  if (!is_phase(part[0]) || !parse_any_or_integer(part[1], fault->rank) ||
      !parse_any_or_integer(part[2], fault->sequence) || !parse_action(part[3], *fault)) {
    refuse(text);
  }
  return fault;
}

std::shared_ptr<const Faults> parse(std::string_view text) {
  auto faults = std::make_shared<Faults>();
  while (!text.empty()) {
    const std::size_t comma = text.find(',');
    faults->push_back(parse_one(text.substr(0, comma)));
    if (comma == std::string_view::npos) break;
    text.remove_prefix(comma + 1);
    if (text.empty()) refuse(",");
  }
  return faults;
}

struct Current {
  std::mutex mutex;
  std::shared_ptr<const Faults> faults;  // null until first needed: then those of the environment
};

Current& current() {
  static Current& instance = *new Current;
  return instance;
}

std::atomic<FaultHook> current_hook = nullptr;

std::shared_ptr<const Faults> faults_now() {
  const std::lock_guard lock(current().mutex);
  if (!current().faults) current().faults = parse(env_text("ANYEP_FAULT").value_or(""));
  return current().faults;
}

void act(const Fault& fault, int rank, std::uint64_t sequence) {
  switch (fault.action) {
    case Action::kKill:
      ::kill(::getpid(), SIGKILL);
      return;
    case Action::kStop:
      ::kill(::getpid(), SIGSTOP);
      return;
    case Action::kExit:
      ::_exit(3);
    case Action::kDelay:
      std::this_thread::sleep_for(fault.delay);
      return;
    case Action::kThrow:
      throw std::runtime_error(fmt::format("planted fault at {}, rank {}, sequence {}", fault.phase, rank, sequence));
  }
}

}  // namespace

void fault_point(const char* phase, int rank, std::uint64_t sequence) {
  if (const FaultHook hook = current_hook.load(std::memory_order_acquire)) hook(phase, rank, sequence);
  const std::shared_ptr<const Faults> faults = faults_now();
  for (const auto& fault : *faults) {
    if (fault->phase != phase) continue;
    if (fault->rank && (rank < 0 || *fault->rank != static_cast<std::uint64_t>(rank))) continue;
    if (fault->sequence && *fault->sequence != sequence) continue;
    if (fault->action != Action::kDelay && fault->fired.exchange(true, std::memory_order_relaxed)) continue;
    act(*fault, rank, sequence);
  }
}

void set_fault_hook(FaultHook hook) noexcept {
  current_hook.store(hook, std::memory_order_release);
}

void set_fault(std::string_view faults) {
  std::shared_ptr<const Faults> next = parse(faults);
  const std::lock_guard lock(current().mutex);
  current().faults = std::move(next);
}

}  // namespace anyep::core

#else

namespace anyep::core {

void set_fault(std::string_view) {
  throw_error(ErrorCode::kUnsupported, "fault_point",
              "this build has no fault points. Configure a test build with -DANYEP_FAULTS=ON");
}

}  // namespace anyep::core

#endif
