// The ranks of one command: forked processes or threads, memory that all of them write, and how each of them ended.
#pragma once

#include <anyep/bootstrap.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace anyep::cli {

/// Zeroed memory that forked ranks share with their parent. Made before the ranks start.
class SharedMemory {
 public:
  explicit SharedMemory(std::size_t bytes);
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory();
  std::byte* data() const { return data_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

/// Series of numbers, one per (rank, series). Each rank writes its own; the parent reads when all have ended.
class Board {
 public:
  Board(int num_ranks, int num_series, int capacity);
  /// Ignored beyond the capacity.
  void add(int rank, int series, double value);
  std::vector<double> values(int rank, int series) const;
  /// Element i is the largest of the ranks' i-th.
  std::vector<double> slowest(int series) const;
  double sum(int series) const;      ///< over ranks and values
  double largest(int series) const;  ///< likewise

 private:
  struct Series {
    std::uint64_t count = 0;
  };
  std::size_t index(int rank, int series) const;
  Series& head(int rank, int series) const;
  double* numbers(int rank, int series) const;

  int num_ranks_, num_series_, capacity_;
  SharedMemory memory_;
};

struct TeamOptions {
  int num_ranks = 1;
  bool threads = false;
};

/// Runs body(rank, bootstrap) on every rank; an exception ends that rank alone. One line per rank that failed: "rank 2:
/// ...".
std::vector<std::string> run_team(const TeamOptions& options, const std::function<void(int, Bootstrap&)>& body);

}  // namespace anyep::cli
