// A rank's share of one round of work, every result of which is known: small integers, so that all sums are exact.
#pragma once

#include <anyep/engine.h>
#include <anyep/error.h>

#include <cstdint>
#include <vector>

namespace anyep::test {

/// @throws std::runtime_error unless it holds. For ranks of other processes, where no EXPECT reaches the test.
void must(bool holds, const char* what, long long got = 0, long long want = 0);

/// Inputs follow from (salt, rank, token, element): another salt, other numbers, so that stale rows are seen.
class Task {
 public:
  static Shape shape();
  static Budget budget(int num_ranks);
  /// Short limits: 2 s per op, 20 s to start, 2 s to close; times ANYEP_TIME_SCALE.
  static Tuning tuning();

  Task(int num_ranks, int rank);

  /// Route, dispatch and combine; rows in the window when salt is odd. Everything is compared. @return a digest of it
  /// all
  std::uint64_t high_throughput(Engine& engine, int salt);
  /// Dispatch and combine; with hooks when salt is odd. Peers that are masked before or after the round may be missing:
  /// their rows are compared only when they are there.
  std::uint64_t low_latency(Engine& engine, int salt);
  /// Both, then a barrier.
  std::uint64_t round(Engine& engine, int salt);
  /// Rounds 0, 1, ... until one fails. For those who survive a peer: it may leave while this rank is still at the end of
  /// the round that the peer is through with, so that no round of a survivor is sure to succeed.
  Error rounds_until_error(Engine& engine);

  /// Low latency: time waited for `peer` since the task was made.
  std::int64_t waited_ns(int peer) const { return waited_[static_cast<std::size_t>(peer)]; }
  /// Ranks whose tokens were missing, or to which this rank's were not sent, in the last low-latency round: bit mask.
  std::uint64_t missing() const { return missing_; }

 private:
  void fill(int salt);
  int expert(int rank, std::int64_t token, int choice, int salt) const;
  int rank_of(int expert) const;
  float value(int rank, std::int64_t token, std::int64_t element, int salt) const;
  std::int64_t tokens_of(int rank) const;
  void check_rows(const Handle& handle, const Rows& rows, int salt) const;
  void check_sums(const Handle& handle, int salt) const;
  void check_slabs(int salt);
  void check_weighted(int salt);

  const int num_ranks_, rank_;
  const Shape shape_;
  std::vector<std::int64_t> ids_;
  std::vector<float> weights_;
  std::vector<std::uint16_t> x_, out_, rows_, slab_;
  std::vector<std::int64_t> row_experts_;
  std::vector<float> row_weights_;
  std::vector<std::int32_t> counts_, source_;
  std::vector<std::int64_t> range_, waited_;
  std::uint64_t missing_ = 0;
};

}  // namespace anyep::test
