// The table of profile forms: what parses, prints and explains them.
#pragma once

#include <anyep/workload.h>

#include <cstdint>
#include <span>
#include <string_view>

namespace anyep::workload {

/// Which member of Profile a parameter fills.
enum class Field : std::uint8_t { kNone, kValue, kCount, kKept };

struct Parameter {
  Field field = Field::kNone;
  double least = 0, most = 0;
};

struct Form {
  Kind kind;
  std::string_view name;
  std::string_view text;  ///< with its parameters: "khot:N:F"
  Parameter parameters[2] = {};
  int fallback = 0;  ///< value of the one parameter that may be left out; 0 = none may
  std::string_view meaning;
};

std::span<const Form> forms();
const Form& form_of(Kind kind);

}  // namespace anyep::workload
