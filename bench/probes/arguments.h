// Arguments of the benchmark programs: --name value pairs, each known to the program.
#pragma once

#include <initializer_list>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace anyep::bench {

class Arguments {
 public:
  /// @throws std::invalid_argument naming what is not known or lacks its value
  Arguments(int argc, char** argv, std::initializer_list<std::string_view> known);

  bool has(const std::string& name) const { return values_.contains(name); }
  std::string text(const std::string& name, const std::string& otherwise) const;
  /// @throws std::invalid_argument
  int number(const std::string& name, int otherwise) const;
  /// A list with commas.
  std::vector<int> numbers(const std::string& name, const std::string& otherwise) const;
  std::vector<std::string> words(const std::string& name, const std::string& otherwise) const;

 private:
  std::map<std::string, std::string> values_;
};

/// "a,b" is a, b. Empty parts are left out.
std::vector<std::string> split(const std::string& text, char separator);
/// @throws std::invalid_argument naming what the number is for
int to_number(const std::string& text, const std::string& what);

}  // namespace anyep::bench
