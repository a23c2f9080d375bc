// Text for people: aligned tables, bars, numbers with units, a progress line.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace anyep::cli {

/// A column's title and what it means, in one line.
struct Column {
  std::string title;
  std::string meaning;
  bool left = false;
};

class Table {
 public:
  explicit Table(std::vector<Column> columns);
  void add(std::vector<std::string> cells);
  /// Header, rows.
  std::string to_text() const;
  /// One line per column that has a meaning.
  std::string legend() const;

 private:
  std::vector<Column> columns_;
  std::vector<std::vector<std::string>> rows_;
};

/// A bar of `width` characters at most, as long as value / most.
std::string bar(double value, double most, int width);
/// "1.5 GiB", "512 B".
std::string bytes_text(std::uint64_t bytes);
/// Three significant digits: "0.123", "12.3", "1230".
std::string number(double value);
/// "12.3 us", "1.23 ms", "4.56 s".
std::string microseconds_text(double us);

/// One line that moves on a terminal; elsewhere a line at every tenth. On standard error.
class Progress {
 public:
  /// `total` steps; a quiet one shows nothing.
  Progress(std::string title, std::int64_t total);
  static Progress quiet();
  void show(std::int64_t done, const std::string& note = {});
  /// Ends the moving line.
  void finish();

 private:
  std::string title_;
  std::int64_t total_ = 0, last_tenth_ = -1;
  bool terminal_ = false, drawn_ = false;
};

}  // namespace anyep::cli
