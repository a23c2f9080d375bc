#include "support/outputs.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <set>
#include <sstream>
#include <stdexcept>

#include "support/guarded.h"

namespace anyep::test {
namespace {

void append(Bytes& out, const void* data, std::size_t bytes) {
  const auto* from = static_cast<const std::byte*>(data);
  out.insert(out.end(), from, from + bytes);
}

Bytes take(std::span<const std::byte>& bytes) {
  std::uint64_t length = 0;
  if (bytes.size() < sizeof length) throw std::runtime_error("a rank's results are cut off");
  std::memcpy(&length, bytes.data(), sizeof length);
  bytes = bytes.subspan(sizeof length);
  if (bytes.size() < length) throw std::runtime_error("a rank's results are cut off");
  const auto part = bytes.first(static_cast<std::size_t>(length));
  bytes = bytes.subspan(part.size());
  return {part.begin(), part.end()};
}

std::string shown(const Bytes& bytes) {
  const bool text = bytes.size() > 4 && std::all_of(bytes.begin(), bytes.end(), [](std::byte byte) {
                      return std::isprint(static_cast<unsigned char>(byte)) != 0;
                    });
  if (text) return "\"" + std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()) + "\"";
  return std::to_string(bytes.size()) + " bytes";
}

std::string hex(const Bytes& bytes, std::size_t from) {
  std::ostringstream out;
  for (std::size_t at = from; at < std::min(from + 8, bytes.size()); ++at) {
    out << "0123456789abcdef"[std::to_integer<unsigned>(bytes[at]) >> 4]
        << "0123456789abcdef"[std::to_integer<unsigned>(bytes[at]) & 15];
  }
  return out.str();
}

std::string difference_of(const Bytes& expected, const Bytes& got) {
  if (expected.size() != got.size()) return "expected " + shown(expected) + ", got " + shown(got);
  const auto place = std::mismatch(expected.begin(), expected.end(), got.begin());
  const auto at = static_cast<std::size_t>(place.first - expected.begin());
  std::size_t count = 0;
  for (std::size_t i = 0; i < got.size(); ++i) count += expected[i] != got[i] ? 1 : 0;
  std::ostringstream out;
  out << count << " of " << got.size() << " bytes differ, the first at " << at << ": expected " << hex(expected, at)
      << ", got " << hex(got, at);
  return out.str();
}

}  // namespace

void RankOutputs::put_text(int step, std::string_view field, std::string_view text) {
  Bytes bytes;
  append(bytes, text.data(), text.size());
  put(step, field, std::move(bytes));
}

std::string RankOutputs::name(int step, std::string_view field) {
  std::string number = std::to_string(step);
  number.insert(0, number.size() < 4 ? 4 - number.size() : 0, '0');
  return number + " " + std::string(field);
}

const Bytes& RankOutputs::get(int step, std::string_view field) const {
  const auto found = fields_.find(name(step, field));
  if (found == fields_.end()) throw std::out_of_range("no result \"" + name(step, field) + "\"");
  return found->second;
}

std::string RankOutputs::text(int step, std::string_view field) const {
  const Bytes& bytes = get(step, field);
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

Bytes RankOutputs::serialised() const {
  Bytes out;
  const auto add = [&out](const void* data, std::size_t bytes) {
    const std::uint64_t length = bytes;
    append(out, &length, sizeof length);
    append(out, data, bytes);
  };
  for (const auto& [name, bytes] : fields_) {
    add(name.data(), name.size());
    add(bytes.data(), bytes.size());
  }
  return out;
}

RankOutputs RankOutputs::parsed(std::span<const std::byte> bytes) {
  RankOutputs outputs;
  while (!bytes.empty()) {
    const Bytes name = take(bytes);
    outputs.fields_[std::string(reinterpret_cast<const char*>(name.data()), name.size())] = take(bytes);
  }
  return outputs;
}

namespace {

/// Causes before consequences: what failed comes first.
bool tells_a_cause(const std::string& name) {
  return name.ends_with(" failed") || name.ends_with(" error") || name.ends_with(" damage");
}

void compare(const RankOutputs& expected, const RankOutputs& got, const std::string& who,
             std::vector<std::string>& causes, std::vector<std::string>& others) {
  std::set<std::string> names;
  for (const auto& field : expected.fields()) names.insert(field.first);
  for (const auto& field : got.fields()) names.insert(field.first);
  for (const std::string& name : names) {
    const auto left = expected.fields().find(name);
    const auto right = got.fields().find(name);
    const bool has_left = left != expected.fields().end();
    const bool has_right = right != got.fields().end();
    if (has_left && has_right && left->second == right->second) continue;
    std::string line = who + name + ": ";
    if (!has_right)
      line += "missing";
    else if (!has_left)
      line += "unexpected: " + shown(right->second);
    else
      line += difference_of(left->second, right->second);
    (tells_a_cause(name) ? causes : others).push_back(std::move(line));
  }
}

}  // namespace

std::string difference(const Outputs& expected, const Outputs& got) {
  constexpr std::size_t kMostLines = 10;
  std::vector<std::string> lines, others;
  for (std::size_t rank = 0; rank < expected.size(); ++rank) {
    compare(expected[rank], got[rank], "rank " + std::to_string(rank) + ", step ", lines, others);
  }
  lines.insert(lines.end(), others.begin(), others.end());
  std::string text;
  for (std::size_t i = 0; i < std::min(lines.size(), kMostLines); ++i) text += lines[i] + "\n";
  if (lines.size() > kMostLines) text += "and " + std::to_string(lines.size() - kMostLines) + " more\n";
  return text;
}

std::uint64_t digest_of(const Outputs& outputs) {
  Bytes all;
  for (const RankOutputs& rank : outputs) {
    const Bytes bytes = rank.serialised();
    append(all, bytes.data(), bytes.size());
  }
  return digest_of(std::span<const std::byte>(all));
}

}  // namespace anyep::test
