#include "core/env.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "core/check.h"
#include "core/fault_point.h"
#include "core/parse.h"

namespace anyep::core {
namespace {

constexpr std::string_view kOp = "environment";
constexpr std::string_view kPrefix = "ANYEP_";

constexpr std::array kVariables = {
    EnvVariable{"ANYEP_BACKEND", EnvKind::kChoice, "auto|cuda|cpu", "auto", "which kind of ranks an engine uses"},
    EnvVariable{"ANYEP_TIMEOUT_S", EnvKind::kSeconds, "", "30",
                "limit of one operation, send to last receive; through deep_ep 100"},
    EnvVariable{"ANYEP_STARTUP_TIMEOUT_S", EnvKind::kSeconds, "", "600", "limit of create and of the first operation"},
    EnvVariable{"ANYEP_CLOSE_TIMEOUT_S", EnvKind::kSeconds, "", "5", "how long close() waits for the peers' last word"},
    EnvVariable{"ANYEP_TIME_SCALE", EnvKind::kFactor, "", "1",
                "multiplies every limit, for sanitizers, emulators and overloaded hosts"},
    EnvVariable{"ANYEP_CHECK", EnvKind::kChoice, "0|1", "0",
                "1 = checked mode: ids, counts and the ranks' parameters at every call, poison and red zones"},
    EnvVariable{"ANYEP_LOG", EnvKind::kChoice, "debug|info|warning|error|off", "warning",
                "least level of the lines that reach the log callback"},
    EnvVariable{"ANYEP_TOPK_IDX_BITS", EnvKind::kChoice, "64|32", "64", "width of deep_ep.topk_idx_t"},
    EnvVariable{"ANYEP_PEER_ACCESS", EnvKind::kChoice, "1|0", "1", "0 = GPUs stage through pinned host memory"},
    EnvVariable{
        "ANYEP_CUDA_MEMORY", EnvKind::kChoice, "auto|vmm|ipc|fabric", "auto",
        "how GPU memory is shared: descriptors of VMM memory, cudaIpc or fabric handles; auto tries the best first"},
    EnvVariable{"ANYEP_COMBINE", EnvKind::kChoice, "ranks|exact", "ranks",
                "exact = low-latency combine rounds once; one row per choice travels"},
    EnvVariable{"ANYEP_CPU_ISA", EnvKind::kChoice, "baseline|v3|v4", "the best that the processor has",
                "x86-64 level of the CPU ranks' loops; the bits are the same for all"},
    EnvVariable{
        "ANYEP_FAULT", EnvKind::kText, "", "none",
        "phase:rank:sequence:action, test builds only: kill, stop, throw, exit or delay a rank at a named point"},
    EnvVariable{"ANYEP_SOAK", EnvKind::kFactor, "", "1", "tests: multiplies the length of the long loads"},
    EnvVariable{"ANYEP_SEED", EnvKind::kInteger, "", "each test's own", "tests: seed of the random loads"},
};

const EnvVariable& variable(std::string_view name, EnvKind kind) {
  const auto found = std::ranges::find(kVariables, name, &EnvVariable::name);
  ANYEP_CHECK(found != kVariables.end() && found->kind == kind, "a variable is read as what the table says");
  return *found;
}

std::optional<std::string> read(const EnvVariable& which) {
  const char* const text = std::getenv(std::string(which.name).c_str());
  if (text == nullptr) return std::nullopt;
  return std::string(text);
}

std::string allowed(const EnvVariable& which) {
  switch (which.kind) {
    case EnvKind::kSeconds:
      return "seconds above 0 like 30 or 0.5, below 2^63 ns, without exponent or unit";
    case EnvKind::kFactor:
      return "a number above 0 like 10 or 0.5, without exponent or unit";
    case EnvKind::kInteger:
      return "digits, 0 to 2^64 - 1";
    case EnvKind::kText:
      return "a text that is not empty";
    case EnvKind::kChoice:
      break;
  }
  std::string list(which.values);
  for (std::size_t at = 0; (at = list.find('|', at)) != std::string::npos; at += 2) list.replace(at, 1, ", ");
  return list;
}

[[noreturn]] void refuse(const EnvVariable& which, std::string_view text) {
  throw_argument(kOp, which.name, quoted(text), allowed(which),
                 fmt::format("Correct it, or unset it for the default ({})", which.fallback));
}

bool is_choice(std::string_view values, std::string_view text) {
  while (true) {
    const std::size_t bar = values.find('|');
    if (values.substr(0, bar) == text) return true;
    if (bar == std::string_view::npos) return false;
    values.remove_prefix(bar + 1);
  }
}

// Parses with `parse`, a function from text to optional; refuses what gives none.
template <class Parse>
auto parsed(const EnvVariable& which, Parse&& parse) -> decltype(parse(std::string_view{})) {
  const std::optional<std::string> text = read(which);
  if (!text) return std::nullopt;
  auto value = parse(std::string_view(*text));
  if (!value) refuse(which, *text);
  return value;
}

std::optional<std::chrono::nanoseconds> positive_seconds(std::string_view text) {
  const auto value = parse_seconds(text);
  return value && value->count() > 0 ? value : std::nullopt;
}

std::optional<double> positive_decimal(std::string_view text) {
  const auto value = parse_decimal(text);
  return value && *value > 0 ? value : std::nullopt;
}

void check_one(const EnvVariable& which) {
  switch (which.kind) {
    case EnvKind::kSeconds:
      env_seconds(which.name);
      return;
    case EnvKind::kFactor:
      env_factor(which.name);
      return;
    case EnvKind::kInteger:
      env_integer(which.name);
      return;
    case EnvKind::kChoice:
      env_choice(which.name);
      return;
    case EnvKind::kText:
      env_text(which.name);
      return;
  }
}

std::vector<std::string> unknown_names() {
  std::vector<std::string> names;
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    const std::string_view line(*entry);
    const std::string_view name = line.substr(0, line.find('='));
    if (name.starts_with(kPrefix) && std::ranges::find(kVariables, name, &EnvVariable::name) == kVariables.end()) {
      names.emplace_back(name.substr(0, 64));
    }
  }
  std::ranges::sort(names);
  return names;
}

void warn_about_unknown_names() {
  static std::mutex mutex;
  static std::string& last = *new std::string;  // what was warned about; never destroyed, like the log
  const std::string names = fmt::format("{}", fmt::join(unknown_names(), ", "));
  {
    const std::lock_guard lock(mutex);
    // A warning that nobody could hear does not count as given.
    if (names == last || !log_enabled(LogLevel::kWarning)) return;
    last = names;
  }
  if (!names.empty()) log_warning(fmt::format("environment: unknown variables are ignored: {}", names));
}

}  // namespace

std::span<const EnvVariable> env_variables() noexcept {
  return kVariables;
}

std::optional<std::chrono::nanoseconds> env_seconds(std::string_view name) {
  return parsed(variable(name, EnvKind::kSeconds), positive_seconds);
}

std::optional<double> env_factor(std::string_view name) {
  return parsed(variable(name, EnvKind::kFactor), positive_decimal);
}

std::optional<std::uint64_t> env_integer(std::string_view name) {
  return parsed(variable(name, EnvKind::kInteger), parse_integer);
}

std::optional<std::string> env_choice(std::string_view name) {
  const EnvVariable& which = variable(name, EnvKind::kChoice);
  return parsed(which, [&](std::string_view text) {
    return is_choice(which.values, text) ? std::optional<std::string>(text) : std::nullopt;
  });
}

std::optional<std::string> env_text(std::string_view name) {
  return parsed(variable(name, EnvKind::kText),
                [](std::string_view text) { return text.empty() ? std::nullopt : std::optional<std::string>(text); });
}

LogLevel env_log_level() noexcept {
  constexpr std::array<std::string_view, 5> kLevels = {"debug", "info", "warning", "error", "off"};
  const char* const text = std::getenv("ANYEP_LOG");
  const auto found = std::ranges::find(kLevels, std::string_view(text == nullptr ? "" : text));
  return found == kLevels.end() ? LogLevel::kWarning : static_cast<LogLevel>(found - kLevels.begin());
}

void check_environment() {
  for (const EnvVariable& which : kVariables) check_one(which);
  warn_about_unknown_names();
  if (!kFaultPoints && env_text("ANYEP_FAULT")) {
    log_warning("environment: ANYEP_FAULT is set, but this build has no fault points (ANYEP_FAULTS=ON)");
  }
}

}  // namespace anyep::core
