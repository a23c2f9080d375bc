// What a scenario left behind, as named bytes per rank: comparable, and able to cross a process boundary.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace anyep::test {

using Bytes = std::vector<std::byte>;

/// One rank's results. Names are "<step> <field>", steps with leading zeros.
class RankOutputs {
 public:
  void put(int step, std::string_view field, Bytes bytes) { fields_[name(step, field)] = std::move(bytes); }
  void put_text(int step, std::string_view field, std::string_view text);
  template <class T>
  void put_values(int step, std::string_view field, std::span<const T> values) {
    const auto bytes = std::as_bytes(values);
    put(step, field, Bytes(bytes.begin(), bytes.end()));
  }

  bool has(int step, std::string_view field) const { return fields_.contains(name(step, field)); }
  /// @throws std::out_of_range with the name when there is none.
  const Bytes& get(int step, std::string_view field) const;
  template <class T>
  std::vector<T> values(int step, std::string_view field) const {
    const Bytes& bytes = get(step, field);
    std::vector<T> values(bytes.size() / sizeof(T));
    std::copy(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(values.size() * sizeof(T)),
              reinterpret_cast<std::byte*>(values.data()));
    return values;
  }
  std::string text(int step, std::string_view field) const;

  const std::map<std::string, Bytes>& fields() const { return fields_; }
  Bytes serialised() const;
  static RankOutputs parsed(std::span<const std::byte> bytes);

 private:
  static std::string name(int step, std::string_view field);
  std::map<std::string, Bytes> fields_;
};

using Outputs = std::vector<RankOutputs>;

/// Empty when equal, else the first differences: rank, name, byte.
std::string difference(const Outputs& expected, const Outputs& got);
std::uint64_t digest_of(const Outputs& outputs);

}  // namespace anyep::test
