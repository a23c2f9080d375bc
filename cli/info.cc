// anyep info: what this build is, the models and routing profiles that it knows.
#include <anyep/config.h>
#include <anyep/workload.h>
#include <fmt/core.h>

#include <CLI/App.hpp>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "cli/command.h"
#include "cli/table.h"

namespace anyep::cli {
namespace {

using Json = nlohmann::ordered_json;

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#else
  return std::string("gcc ") + __VERSION__;
#endif
}

std::string architecture() {
#if defined(__x86_64__)
  return "x86-64";
#elif defined(__aarch64__)
  return "aarch64";
#else
  return "other";
#endif
}

int print_json() {
  Json models = Json::array();
  for (const workload::ModelPreset& model : workload::models()) {
    models.push_back({{"name", model.name},
                      {"hidden", model.hidden},
                      {"experts", model.num_experts},
                      {"topk", model.top_k},
                      {"expert_width", model.expert_width},
                      {"groups", model.groups},
                      {"groups_kept", model.groups_kept},
                      {"note", model.note}});
  }
  const Json info = {{"version", version()},
                     {"compiler", compiler()},
                     {"architecture", architecture()},
                     {"backends", Json::array({"cpu"})},
                     {"models", models}};
  fmt::print("{}\n", info.dump(2));
  return kExitOk;
}

int print_text() {
  fmt::print("anyep {}\nbuilt by {} for {}; backends: cpu (processes or threads of one host)\n\n", version(),
             compiler(), architecture());
  Table table({{"model", "name for --model", true},
               {"hidden", "elements of a row on the wire"},
               {"experts", "routed experts"},
               {"top-k", "experts per token"},
               {"width", "intermediate size of one expert, ? = not known"},
               {"groups", "kept/all groups of a grouped gate"},
               {"note", "", true}});
  for (const workload::ModelPreset& model : workload::models()) {
    table.add({std::string(model.name), std::to_string(model.hidden), std::to_string(model.num_experts),
               std::to_string(model.top_k), model.expert_width > 0 ? std::to_string(model.expert_width) : "?",
               model.groups > 1 ? fmt::format("{}/{}", model.groups_kept, model.groups) : "-",
               std::string(model.note)});
  }
  fmt::print("{}\n{}\nRouting profiles, for --profile:\n{}", table.to_text(), table.legend(), workload::profile_help());
  return kExitOk;
}

}  // namespace

Command add_info(CLI::App& parent) {
  CLI::App* const app = parent.add_subcommand("info", "version, model presets, routing profiles");
  const auto json = std::make_shared<bool>(false);
  app->add_flag("--json", *json, "print JSON");
  return {app, [json] { return *json ? print_json() : print_text(); }};
}

}  // namespace anyep::cli
