#include "bench/probes/arguments.h"

#include <algorithm>
#include <charconv>
#include <stdexcept>

namespace anyep::bench {

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(separator, begin), text.size());
    if (end > begin) parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

int to_number(const std::string& text, const std::string& what) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) {
    throw std::invalid_argument(what + " = " + text + ", allowed: a whole number");
  }
  return value;
}

Arguments::Arguments(int argc, char** argv, std::initializer_list<std::string_view> known) {
  std::string allowed;
  for (const std::string_view name : known) allowed += " --" + std::string(name);
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (name.rfind("--", 0) != 0 || std::find(known.begin(), known.end(), name.substr(2)) == known.end()) {
      throw std::invalid_argument("unknown argument " + name + "; there are:" + allowed);
    }
    if (i + 1 == argc) throw std::invalid_argument(name + " needs a value");
    values_[name.substr(2)] = argv[i + 1];
  }
}

std::string Arguments::text(const std::string& name, const std::string& otherwise) const {
  const auto found = values_.find(name);
  return found == values_.end() ? otherwise : found->second;
}

int Arguments::number(const std::string& name, int otherwise) const {
  const auto found = values_.find(name);
  return found == values_.end() ? otherwise : to_number(found->second, "--" + name);
}

std::vector<std::string> Arguments::words(const std::string& name, const std::string& otherwise) const {
  return split(text(name, otherwise), ',');
}

std::vector<int> Arguments::numbers(const std::string& name, const std::string& otherwise) const {
  std::vector<int> numbers;
  for (const std::string& word : words(name, otherwise)) numbers.push_back(to_number(word, "--" + name));
  return numbers;
}

}  // namespace anyep::bench
