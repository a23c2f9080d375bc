#include "workload/profile.h"

#include <fmt/format.h>

#include <array>
#include <charconv>
#include <optional>
#include <vector>

#include "core/check.h"
#include "core/parse.h"

namespace anyep::workload {
namespace {

constexpr Parameter kSigma{Field::kValue, 0, 8};
constexpr Parameter kShare{Field::kValue, 0, 1};
constexpr double kMostCount = 1 << 20;
constexpr Parameter kCountUp{Field::kCount, 1, kMostCount};

constexpr std::array kForms{
    Form{Kind::kUniform, "uniform", "uniform", {}, 0, "every expert alike"},
    Form{Kind::kBalanced, "balanced", "balanced", {}, 0, "exactly even: choices rotate over the experts"},
    Form{Kind::kLognormal, "lognormal", "lognormal:S", {kSigma}, 0, "popularity exp(N(0, S)); sweep 0, 0.4, 1.1, 2.0"},
    Form{Kind::kMaxVio, "maxvio", "maxvio:V", {{Field::kValue, 0, 1000}}, 0, "lognormal made to load one rank 1 + V"},
    Form{Kind::kSorted, "sorted", "sorted:S", {kSigma}, 0, "lognormal, popular experts together: worst placement"},
    Form{Kind::kPowerLaw, "powerlaw", "powerlaw:A", {kSigma}, 0, "popularity with density x^-A; 0.6, 1.01, 1.2, 1.8"},
    Form{Kind::kZipf, "zipf", "zipf:S", {kSigma}, 0, "popularity rank^-S, shuffled; 0.8 to 1.2"},
    Form{Kind::kHotRank,
         "hot-rank",
         "hot-rank:R",
         {{Field::kValue, 1, 1e6}},
         0,
         "one rank gets R times the others' rows"},
    Form{Kind::kHotExperts, "khot", "khot:N:F", {kCountUp, kShare}, 0, "the share F of the choices on N experts"},
    Form{Kind::kGrouped,
         "grouped",
         "grouped:G:K",
         {kCountUp, {Field::kKept, 1, kMostCount}},
         0,
         "sigmoid gate that keeps K of G groups"},
    Form{Kind::kHash, "hash", "hash", {}, 0, "experts by hash of word ids that follow Zipf(1.1)"},
    Form{Kind::kDomain,
         "domain",
         "domain:D",
         {{Field::kCount, 1, 1024}},
         0,
         "requests from D domains, choices that stay"},
    Form{Kind::kDrop, "drop", "drop:P", {kShare}, 0, "the share P of the choices unused, whole tokens too"},
    Form{Kind::kRagged, "ragged", "ragged", {}, 0, "tokens per rank differ, some ranks have none"},
    Form{Kind::kEplb, "eplb", "eplb:SLOTS", {kCountUp}, 0, "lognormal:1.1 with the hottest experts replicated"},
    Form{Kind::kRotating, "rotating", "rotating[:N]", {kCountUp}, 16, "lognormal:1.1 that moves on every N steps"},
    Form{Kind::kBurst, "burst", "burst[:N]", {kCountUp}, 8, "every N-th step a few experts are 10 times as popular"},
    Form{Kind::kDuplicates, "duplicates", "duplicates", {}, 0, "drawn with replacement: equal ids in a row"},
};

std::string all_forms() {
  std::string list;
  for (const Form& form : kForms) list += fmt::format("{}{}", list.empty() ? "" : ", ", form.text);
  return list;
}

[[noreturn]] void reject(std::string_view text, const std::string& why) {
  core::throw_argument("parse_profile", "profile", core::quoted(text), all_forms(), why);
}

std::vector<std::string_view> split_at_colons(std::string_view text) {
  std::vector<std::string_view> parts;
  for (;;) {
    const std::size_t colon = text.find(':');
    parts.push_back(text.substr(0, colon));
    if (colon == std::string_view::npos) return parts;
    text.remove_prefix(colon + 1);
  }
}

bool is_integer(const Parameter& parameter) {
  return parameter.field != Field::kValue;
}

std::string number_text(double value) {
  std::array<char, 400> digits{};
  const auto [end, error] =
      std::to_chars(digits.data(), digits.data() + digits.size(), value, std::chars_format::fixed);
  return error == std::errc{} ? std::string(digits.data(), end) : "?";
}

void set_field(Profile& profile, const Parameter& parameter, double value) {
  switch (parameter.field) {
    case Field::kValue:
      profile.value = value;
      break;
    case Field::kCount:
      profile.count = static_cast<int>(value);
      break;
    case Field::kKept:
      profile.kept = static_cast<int>(value);
      break;
    case Field::kNone:
      break;
  }
}

double get_field(const Profile& profile, const Parameter& parameter) {
  switch (parameter.field) {
    case Field::kValue:
      return profile.value;
    case Field::kCount:
      return profile.count;
    case Field::kKept:
      return profile.kept;
    case Field::kNone:
      break;
  }
  return 0;
}

int num_parameters(const Form& form) {
  int count = 0;
  for (const Parameter& parameter : form.parameters) count += parameter.field != Field::kNone ? 1 : 0;
  return count;
}

}  // namespace

std::span<const Form> forms() {
  return kForms;
}

const Form& form_of(Kind kind) {
  for (const Form& form : kForms) {
    if (form.kind == kind) return form;
  }
  core::throw_argument("profile", "kind", fmt::format("{}", static_cast<int>(kind)), "a named Kind");
}

Profile parse_profile(std::string_view text) {
  const std::vector<std::string_view> parts = split_at_colons(text);
  const Form* form = nullptr;
  for (const Form& candidate : kForms) {
    if (candidate.name == parts.front()) form = &candidate;
  }
  if (form == nullptr) reject(text, "No such name");
  Profile profile{form->kind};
  const int expected = num_parameters(*form);
  if (parts.size() == 1 && form->fallback > 0) {
    set_field(profile, form->parameters[0], form->fallback);
    return profile;
  }
  if (static_cast<int>(parts.size()) != expected + 1) {
    reject(text, fmt::format("{} takes {} parameter{}", form->text, expected, expected == 1 ? "" : "s"));
  }
  for (int index = 0; index < expected; ++index) {
    const Parameter& parameter = form->parameters[index];
    const std::string_view part = parts[static_cast<std::size_t>(index) + 1];
    const std::optional<double> value = core::parse_decimal(part);
    const bool has_form = value && !(is_integer(parameter) && part.find('.') != part.npos);
    if (!has_form || *value < parameter.least || *value > parameter.most) {
      reject(text, fmt::format("Parameter {} of {} is {} from {} to {}", index + 1, form->text,
                               is_integer(parameter) ? "an integer" : "a number", parameter.least, parameter.most));
    }
    set_field(profile, parameter, *value);
  }
  if (profile.kind == Kind::kGrouped && profile.kept > profile.count) reject(text, "K is at most G");
  return profile;
}

std::string to_text(const Profile& profile) {
  const Form& form = form_of(profile.kind);
  std::string text(form.name);
  for (const Parameter& parameter : form.parameters) {
    if (parameter.field != Field::kNone) text += ":" + number_text(get_field(profile, parameter));
  }
  return text;
}

std::string profile_help() {
  std::string help;
  for (const Form& form : kForms) help += fmt::format("{:<14}{}\n", form.text, form.meaning);
  return help;
}

}  // namespace anyep::workload
