// Where the ranks of a measurement meet on the host: threads of one process, or processes forked after it was made.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace anyep::bench {

class Meeting {
 public:
  /// Bytes and numbers that one rank can hand over at once.
  static constexpr std::size_t kMostBytes = 256, kMostNumbers = 8192;

  explicit Meeting(int num_ranks);
  Meeting(const Meeting&) = delete;
  Meeting& operator=(const Meeting&) = delete;
  ~Meeting();

  int num_ranks() const { return num_ranks_; }
  /// Returns within a microsecond or so on all ranks: they poll. @throws std::runtime_error when a rank has not come for a
  /// minute, or has called leave().
  void barrier();
  /// For a rank that gives up: the others' next barrier fails.
  void leave() noexcept;

  /// Everybody's `mine`, of equal size, in rank order. Collective.
  std::vector<std::byte> gather(int rank, std::span<const std::byte> mine);
  /// Element i is the largest of all ranks' i-th. Collective.
  std::vector<double> largest(int rank, std::span<const double> mine);
  double largest(int rank, double mine) { return largest(rank, std::span(&mine, 1)).front(); }
  /// Of all ranks. Collective.
  double sum(int rank, double mine);

 private:
  struct Shared;
  double* numbers(int rank) const;
  std::byte* bytes(int rank) const;

  int num_ranks_;
  std::size_t size_;
  Shared* shared_;
};

}  // namespace anyep::bench
