// The trace file: docs/trace_format.md.
#include <fmt/format.h>

#include <array>
#include <charconv>
#include <cmath>
#include <iterator>
#include <optional>
#include <utility>

#include "core/check.h"
#include "core/parse.h"
#include "workload/batch.h"
#include "workload/file.h"
#include "workload/trace.h"

namespace anyep::workload {
namespace {

constexpr std::string_view kFirstLine = "anyep-trace 1";
constexpr std::uint64_t kMostExperts = 1 << 20;
constexpr std::uint64_t kMostTopK = 32;
constexpr std::uint64_t kMostRanks = 1 << 16;
constexpr std::uint64_t kMostTokens = std::uint64_t{1} << 40;

/// Parses the text of a whole file, line by line. Memory grows with the text, never with a number that the text claims.
class Reader {
 public:
  Reader(const std::string& path, std::string_view text) : path_(path), rest_(text) {}

  Batch read() {
    if (next_line() != kFirstLine) reject_line(fmt::format("\"{}\", the first line of a trace", kFirstLine));
    read_header();
    for (std::int64_t token = 0; token < num_tokens_; ++token) read_token(next_line());
    const std::string last = fmt::format("end {}", num_tokens_);
    if (next_line() != last) reject_line(fmt::format("\"{}\", after as many tokens as the header promises", last));
    if (!rest_.empty()) {
      next_line();
      reject_line("nothing after the last line");
    }
    return std::move(batch_);
  }

 private:
  /// The next line without its end. A file that ends without a line end was cut.
  std::string_view next_line() {
    const std::size_t end = rest_.find('\n');
    if (end == std::string_view::npos) {
      line_ = rest_;
      ++line_number_;
      reject_line("a whole line: the file was cut");
    }
    line_ = rest_.substr(0, end);
    rest_.remove_prefix(end + 1);
    ++line_number_;
    return line_;
  }

  [[noreturn]] void reject(const std::string& where, std::string_view got, const std::string& allowed) const {
    core::throw_argument("read_trace", fmt::format("{}, {}", path_, where), core::quoted(got), allowed);
  }
  [[noreturn]] void reject_line(const std::string& allowed) const {
    reject(fmt::format("line {}", line_number_), line_, allowed);
  }

  std::uint64_t integer(std::string_view key, std::string_view text, std::uint64_t least, std::uint64_t most) const {
    const std::optional<std::uint64_t> value = core::parse_integer(text);
    if (!value || *value < least || *value > most) {
      reject(fmt::format("line {}, key {}", line_number_, key), text, fmt::format("{}..{}", least, most));
    }
    return *value;
  }

  void read_header() {
    for (;;) {
      const std::string_view line = next_line();
      if (line == "rows") break;
      if (line.starts_with('#')) continue;
      const std::size_t space = line.find(' ');
      const std::string_view key = line.substr(0, space);
      const std::string_view value = space == std::string_view::npos ? std::string_view() : line.substr(space + 1);
      if (key == "experts") {
        once(key, batch_.num_experts != 0);
        batch_.num_experts = static_cast<int>(integer(key, value, 1, kMostExperts));
      } else if (key == "top_k") {
        once(key, batch_.top_k != 0);
        batch_.top_k = static_cast<int>(integer(key, value, 1, kMostTopK));
      } else if (key == "tokens") {
        once(key, !batch_.tokens_per_rank.empty());
        read_tokens(value);
      } else {
        reject_line("the keys experts, top_k and tokens, then \"rows\"");
      }
    }
    if (batch_.num_experts == 0) missing("experts");
    if (batch_.top_k == 0) missing("top_k");
    if (batch_.tokens_per_rank.empty()) missing("tokens");
  }

  void once(std::string_view key, bool seen) const {
    if (seen) reject(fmt::format("line {}, key {}", line_number_, key), line_, "each key once");
  }
  [[noreturn]] void missing(std::string_view key) const {
    reject(fmt::format("key {}", key), "", "present before \"rows\"");
  }

  void read_tokens(std::string_view text) {
    std::uint64_t sum = 0;
    for (;;) {
      const std::size_t space = text.find(' ');
      const std::uint64_t count = integer("tokens", text.substr(0, space), 0, kMostTokens);
      sum += count;
      batch_.tokens_per_rank.push_back(static_cast<std::int64_t>(count));
      if (space == std::string_view::npos) break;
      text.remove_prefix(space + 1);
    }
    integer("tokens (sum)", std::to_string(sum), 0, kMostTokens);
    integer("tokens (ranks)", std::to_string(batch_.tokens_per_rank.size()), 1, kMostRanks);
    num_tokens_ = static_cast<std::int64_t>(sum);
  }

  void read_token(std::string_view text) {
    for (int choice = 0; choice < batch_.top_k; ++choice) {
      const bool last = choice == batch_.top_k - 1;
      const std::size_t space = text.find(' ');
      if ((space == std::string_view::npos) != last) {
        reject_line(fmt::format("{} choices \"id:weight\", one space between them", batch_.top_k));
      }
      read_choice(text.substr(0, space));
      if (!last) text.remove_prefix(space + 1);
    }
  }

  void read_choice(std::string_view text) {
    const std::size_t colon = text.find(':');
    if (colon == std::string_view::npos) reject_line("\"id:weight\"");
    const std::string_view id_text = text.substr(0, colon);
    std::int64_t id = -1;
    if (id_text != "-1") {
      const std::optional<std::uint64_t> parsed = core::parse_integer(id_text);
      if (!parsed || *parsed >= static_cast<std::uint64_t>(batch_.num_experts)) {
        reject(fmt::format("line {}, id", line_number_), id_text, fmt::format("-1..{}", batch_.num_experts - 1));
      }
      id = static_cast<std::int64_t>(*parsed);
    }
    batch_.experts.push_back(id);
    batch_.weights.push_back(weight(text.substr(colon + 1), id));
  }

  float weight(std::string_view text, std::int64_t id) const {
    float value = 0;
    const char* const end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data(), end, value);
    const bool whole = error == std::errc{} && stop == end;
    if (!whole || !std::isfinite(value) || std::signbit(value) || (id < 0 && value != 0)) {
      reject(fmt::format("line {}, weight", line_number_), text, id < 0 ? "0 where the id is -1" : "finite, 0 or more");
    }
    return value;
  }

  const std::string& path_;
  std::string_view rest_, line_;
  std::int64_t line_number_ = 0;
  std::int64_t num_tokens_ = 0;
  Batch batch_;
};

void append_token(std::string& text, const Batch& batch, std::size_t token) {
  const auto top_k = static_cast<std::size_t>(batch.top_k);
  for (std::size_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
    std::array<char, 32> digits{};
    const auto [end, error] = std::to_chars(digits.data(), digits.data() + digits.size(), batch.weights[slot]);
    ANYEP_CHECK(error == std::errc{}, "a float has at most 16 characters");
    fmt::format_to(std::back_inserter(text), "{}:", batch.experts[slot]);
    text.append(digits.data(), end);
    text += slot + 1 == (token + 1) * top_k ? '\n' : ' ';
  }
}

/// What the reader would refuse is not written.
void check_writable(const Batch& batch) {
  const auto check = [](std::string_view argument, std::int64_t got, std::uint64_t most) {
    if (got < 1 || static_cast<std::uint64_t>(got) > most) {
      core::throw_argument("write_trace", argument, fmt::format("{}", got), fmt::format("1..{}", most));
    }
  };
  check("batch.num_experts", batch.num_experts, kMostExperts);
  check("batch.top_k", batch.top_k, kMostTopK);
  check("batch.tokens_per_rank.size()", std::ssize(batch.tokens_per_rank), kMostRanks);
  check_batch("write_trace", batch, batch.num_experts);
  for (std::size_t slot = 0; slot < batch.weights.size(); ++slot) {
    const float weight = batch.weights[slot];
    if (std::isfinite(weight) && !std::signbit(weight) && (batch.experts[slot] >= 0 || weight == 0)) continue;
    core::throw_argument("write_trace", fmt::format("batch.weights[{}]", slot), fmt::format("{}", weight),
                         "finite, 0 or more, and 0 where the id is -1");
  }
}

}  // namespace

std::string trace_text(const Batch& batch) {
  check_writable(batch);
  std::string text = fmt::format("{}\nexperts {}\ntop_k {}\ntokens", kFirstLine, batch.num_experts, batch.top_k);
  for (const std::int64_t count : batch.tokens_per_rank) text += fmt::format(" {}", count);
  text += "\nrows\n";
  const auto num_tokens = static_cast<std::size_t>(batch.num_tokens());
  for (std::size_t token = 0; token < num_tokens; ++token) append_token(text, batch, token);
  text += fmt::format("end {}\n", num_tokens);
  return text;
}

Batch parse_trace(const std::string& name, std::string_view text) {
  return Reader(name, text).read();
}

void write_trace(const std::string& path, const Batch& batch) {
  write_file("write_trace", path, trace_text(batch));
}

Batch read_trace(const std::string& path) {
  return parse_trace(path, read_file("read_trace", path));
}

}  // namespace anyep::workload
