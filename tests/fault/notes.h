// What the ranks of a fault test saw, in memory that outlives them.
#pragma once

#include <anyep/error.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace anyep::test {

/// CLOCK_MONOTONIC, the same for all processes of a host.
std::int64_t now_ns();

/// One rank's. Written by that rank only.
struct Note {
  std::atomic<std::int64_t> pid{0};
  std::atomic<std::int64_t> fault_ns{0};    ///< the last named point it passed, or when it killed itself
  std::atomic<std::int64_t> error_ns{0};    ///< its first error; 0 = none
  std::atomic<std::int64_t> rebuilt_ns{0};  ///< a right round in a new engine was over
  std::atomic<std::int64_t> step{0};        ///< for tests that count
  std::atomic<std::uint64_t> word{0};       ///< for tests that compare
  std::int32_t code = -1;
  std::uint64_t peers = 0;  ///< bit mask
  std::int64_t elapsed_ns = 0;
  char op[32] = {}, phase[32] = {}, text[1024] = {};

  void put(const Error& error);
  bool names(int rank) const { return (peers >> rank & 1u) != 0; }
  /// For messages of tests.
  std::string describe() const;
};

/// One note per rank, shared with processes that are forked later.
class Notes {
 public:
  static constexpr int kMaxRanks = 16;
  Notes();
  ~Notes();
  Notes(const Notes&) = delete;
  Notes& operator=(const Notes&) = delete;
  Note& operator[](int rank) const { return (*notes_)[static_cast<std::size_t>(rank)]; }

 private:
  std::array<Note, kMaxRanks>* notes_ = nullptr;
};

/// Every named point that this process passes is noted as `fault_ns` of its rank.
void note_points(const Notes& notes);

/// Times of many faults.
class Times {
 public:
  void add(std::int64_t nanoseconds) { all_.push_back(nanoseconds); }
  /// "median 0.3 ms, max 2.1 ms, n = 60"
  std::string describe() const;
  std::int64_t max() const;

 private:
  std::vector<std::int64_t> all_;
};

/// Times ANYEP_TIME_SCALE.
std::int64_t scaled_ns(double seconds);

/// A process that hangs is ended by SIGALRM instead of ending the test run.
void end_after(double seconds);

/// 1, or the factor in ANYEP_SOAK times `long_form` in soak runs.
int times_soak(int long_form);
std::uint64_t seed_of_test();

}  // namespace anyep::test
