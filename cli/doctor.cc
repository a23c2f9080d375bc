// anyep doctor: what this machine offers, what would be used, and why not the rest.
#include <anyep/config.h>
#include <fmt/core.h>

#include <CLI/App.hpp>
#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench/support/machine.h"
#include "cli/command.h"
#include "cli/probes.h"
#include "cli/table.h"

namespace anyep::cli {
namespace {

const char* name_of(Verdict verdict) {
  switch (verdict) {
    case Verdict::kUsed:
      return "used";
    case Verdict::kFine:
      return "ok";
    case Verdict::kWarning:
      return "warning";
    case Verdict::kMissing:
      return "no";
  }
  return "?";
}

std::string as_text(const std::vector<Finding>& findings) {
  Table table({{"", "", true}, {"", "", true}, {"", "", true}});
  for (const Finding& finding : findings) {
    table.add({finding.topic, name_of(finding.verdict), finding.found});
    if (!finding.advice.empty()) table.add({"", "", "  " + finding.advice});
  }
  const std::string text = table.to_text();
  return text.substr(text.find('\n') + 1);
}

nlohmann::ordered_json as_json(const std::vector<Finding>& findings) {
  auto list = nlohmann::ordered_json::array();
  for (const Finding& finding : findings) {
    list.push_back({{"topic", finding.topic},
                    {"verdict", name_of(finding.verdict)},
                    {"found", finding.found},
                    {"advice", finding.advice}});
  }
  return list;
}

int examine(bool json) {
  const std::vector<Finding> machine = probe_machine(), gpus = probe_gpus(), environment = probe_environment();
  const bool on_gpus = std::ranges::any_of(gpus, [](const Finding& finding) {
    return finding.verdict != Verdict::kMissing && finding.topic == "window memory";
  });
  if (json) {
    const nlohmann::ordered_json all = {{"version", version()},
                                        {"backend", on_gpus ? "cuda" : "cpu"},
                                        {"machine", as_json(machine)},
                                        {"gpus", as_json(gpus)},
                                        {"environment", as_json(environment)}};
    fmt::print("{}\n", all.dump(2));
    return kExitOk;
  }
  fmt::print("anyep {} on {}\n\n{}\nGPUs\n{}\nVariables\n{}\n", version(), bench::this_machine().kernel,
             as_text(machine), as_text(gpus), as_text(environment));
  fmt::print("Would be used: {}CPU ranks, as processes over sealed memory files, or as threads with --threads.\n",
             on_gpus ? "for tensors on GPUs, ranks on them; else " : "");
  return kExitOk;
}

}  // namespace

Command add_doctor(CLI::App& parent) {
  CLI::App* const app = parent.add_subcommand("doctor", "what this machine offers, and what would be used");
  const auto json = std::make_shared<bool>(false);
  app->add_flag("--json", *json, "print JSON");
  return {app, [json] { return examine(*json); }};
}

}  // namespace anyep::cli
