#include "cli/table.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace anyep::cli {
namespace {

constexpr int kProgressWidth = 30;

std::string padded(const std::string& text, std::size_t width, bool left) {
  return left ? fmt::format("{:<{}}", text, width) : fmt::format("{:>{}}", text, width);
}

std::string without_trailing_blanks(std::string line) {
  line.erase(line.find_last_not_of(' ') + 1);
  return line;
}

}  // namespace

Table::Table(std::vector<Column> columns) : columns_(std::move(columns)) {}

void Table::add(std::vector<std::string> cells) {
  cells.resize(columns_.size());
  rows_.push_back(std::move(cells));
}

std::string Table::to_text() const {
  std::vector<std::size_t> widths;
  for (std::size_t c = 0; c < columns_.size(); ++c) {
    widths.push_back(columns_[c].title.size());
    for (const auto& row : rows_) widths[c] = std::max(widths[c], row[c].size());
  }
  std::string text;
  const auto append = [&](auto&& cell_of) {
    std::string line;
    for (std::size_t c = 0; c < columns_.size(); ++c) {
      line += (c == 0 ? "" : "  ") + padded(cell_of(c), widths[c], columns_[c].left);
    }
    text += without_trailing_blanks(line) + "\n";
  };
  append([&](std::size_t c) { return columns_[c].title; });
  for (const auto& row : rows_) append([&](std::size_t c) { return row[c]; });
  return text;
}

std::string Table::legend() const {
  std::size_t width = 0;
  for (const Column& column : columns_) width = std::max(width, column.title.size());
  std::string text;
  for (const Column& column : columns_) {
    if (!column.meaning.empty()) text += fmt::format("  {:<{}}  {}\n", column.title, width, column.meaning);
  }
  return text;
}

std::string bar(double value, double most, int width) {
  if (most <= 0 || value <= 0) return {};
  const double share = std::min(1.0, value / most);
  return std::string(static_cast<std::size_t>(std::max(1L, std::lround(share * width))), '#');
}

std::string bytes_text(std::uint64_t bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  double value = static_cast<double>(bytes);
  std::size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(kUnits)) {
    value /= 1024;
    ++unit;
  }
  return unit == 0 ? fmt::format("{} B", bytes) : fmt::format("{:.2f} {}", value, kUnits[unit]);
}

std::string number(double value) {
  const double size = std::fabs(value);
  if (size >= 100 || value == 0) return fmt::format("{:.0f}", value);
  if (size >= 10) return fmt::format("{:.1f}", value);
  return fmt::format("{:.2f}", value);
}

std::string microseconds_text(double us) {
  if (us < 1000) return number(us) + " us";
  if (us < 1e6) return number(us / 1000) + " ms";
  return number(us / 1e6) + " s";
}

Progress::Progress(std::string title, std::int64_t total)
    : title_(std::move(title)), total_(total), terminal_(isatty(STDERR_FILENO) == 1) {}

Progress Progress::quiet() {
  return Progress({}, 0);
}

void Progress::show(std::int64_t done, const std::string& note) {
  if (total_ <= 0) return;
  const std::int64_t tenth = done * 10 / total_;
  if (terminal_) {
    const std::string filled = bar(static_cast<double>(done), static_cast<double>(total_), kProgressWidth);
    fmt::print(stderr, "\r\033[K{} [{:<{}}] {}/{} {}", title_, filled, kProgressWidth, done, total_, note);
    std::fflush(stderr);
    drawn_ = true;
  } else if (tenth > last_tenth_) {
    fmt::print(stderr, "{}: {}/{} {}\n", title_, done, total_, note);
  }
  last_tenth_ = std::max(last_tenth_, tenth);
}

void Progress::finish() {
  if (drawn_) fmt::print(stderr, "\r\033[K");
  drawn_ = false;
}

}  // namespace anyep::cli
