// anyep: the library's tool. Each subcommand lives in a file of its name.
#include <anyep/config.h>
#include <anyep/error.h>
#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>
#include <vector>

#include "cli/command.h"
#include "core/env.h"

namespace {

using namespace anyep;

constexpr const char* kFooter =
    "Start here:\n"
    "  anyep doctor            what this machine offers, and what would be used\n"
    "  anyep run               real text through dispatch, experts and combine on four ranks, checked bit for bit\n"
    "  anyep plan              what one call would do, its memory and its predicted time\n"
    "  anyep bench --help      how fast, in the manner of nccl-tests\n"
    "\n"
    "Exit codes: 0 all is well; 1 a result is wrong; 2 the command line, a file or a variable makes no sense;\n"
    "3 an engine failed or a rank died (its message says who, in what, and why).";

void print_log(int level, std::string_view line) {
  static constexpr const char* kLevels[] = {"debug", "info", "warning", "error"};
  fmt::print(stderr, "anyep {}: {}\n", kLevels[level >= 0 && level <= 3 ? level : 3], line);
}

int report(const char* text, int code) {
  fmt::print(stderr, "anyep: {}\n", text);
  return code;
}

int run(const cli::Command& command) {
  try {
    // The doctor shows what is wrong with variables; the others refuse.
    if (command.app->get_name() != "doctor") core::check_environment();
    return command.run();
  } catch (const cli::UsageError& error) {
    return report(error.what(), cli::kExitUsage);
  } catch (const Error& error) {
    // A value that make_plan or the workload refuses comes from the command line.
    const bool usage = error.code == ErrorCode::kArgument || error.code == ErrorCode::kUnsupported ||
                       error.code == ErrorCode::kCapacity;
    return report(error.what(), usage ? cli::kExitUsage : cli::kExitEngine);
  } catch (const std::exception& error) {
    return report(error.what(), cli::kExitEngine);
  }
}

/// CLI11 would only say that a subcommand is required.
void check_command(const std::vector<cli::Command>& commands, int argc, char** argv) {
  if (argc < 2 || *argv[1] == '-') return;
  std::string names;
  for (const cli::Command& command : commands) {
    if (command.app->get_name() == argv[1]) return;
    names += (names.empty() ? "" : ", ") + command.app->get_name();
  }
  throw CLI::ExtrasError({std::string(argv[1]) + " (subcommands: " + names + ")"});
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("AnyEP: expert parallelism for Mixture-of-Experts models.", "anyep");
  app.footer(kFooter);
  app.set_version_flag("--version", std::string("anyep ") + version());
  app.require_subcommand(1);
  set_log_callback(print_log);

  const std::vector<cli::Command> commands = {cli::add_run(app),    cli::add_bench(app),  cli::add_plan(app),
                                              cli::add_layout(app), cli::add_doctor(app), cli::add_info(app)};
  try {
    check_command(commands, argc, argv);
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? cli::kExitOk : cli::kExitUsage;
  }
  for (const cli::Command& command : commands) {
    if (command.app->parsed()) return run(command);
  }
  return cli::kExitUsage;
}
