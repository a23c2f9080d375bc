// The subcommands of `anyep`, one file each.
#pragma once

#include <functional>
#include <stdexcept>
#include <string>

namespace CLI {
class App;
}

namespace anyep::cli {

/// What the process returns; documented in --help.
enum ExitCode : int {
  kExitOk = 0,
  kExitWrong = 1,   ///< a result differs from what it must be
  kExitUsage = 2,   ///< arguments, files or variables that make no sense
  kExitEngine = 3,  ///< an engine failed, or a rank died
};

/// Thrown by a command for what its caller can correct: exit code kExitUsage.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Command {
  CLI::App* app = nullptr;
  std::function<int()> run;
};

Command add_run(CLI::App& parent);
Command add_bench(CLI::App& parent);
Command add_plan(CLI::App& parent);
Command add_layout(CLI::App& parent);
Command add_doctor(CLI::App& parent);
Command add_info(CLI::App& parent);

}  // namespace anyep::cli
