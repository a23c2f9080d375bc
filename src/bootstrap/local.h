// The bootstrap of one rank of a LocalGroup.
#pragma once

#include <anyep/bootstrap.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "bootstrap/board.h"
#include "bootstrap/peer_error.h"

namespace anyep::bootstrap {

/// How far this process has come with one rank's exchanges.
struct LocalProgress {
  struct Last {
    Turn turn;
    bool complete = false;
  };
  std::atomic<pid_t> user = 0;           ///< the process in which a thread is in an exchange now; 0 = none
  std::map<std::uint64_t, Last> groups;  ///< by digest of the members; touched by the user only
};

/// The memory that the ranks of a group share, and this process's part in it.
struct LocalBoard {
  explicit LocalBoard(int num_ranks) : board(num_ranks), progress(static_cast<std::size_t>(num_ranks)) {}
  Board board;
  std::vector<LocalProgress> progress;
};

/// Exchanges through the board, a chunk per round. After an error the next exchange is a new attempt: it waits for
/// ranks that have begun anew too, and takes no post of an earlier one. Ranks that are themselves in the first round of
/// an attempt move on to the latest one they see; those in a later round get kAborted.
class LocalMember final : public Bootstrap {
 public:
  /// `members`: this group's ranks by their number on the board, ascending; `rank` is an index into it.
  /// @throws Error kMismatch if another living process acts for this rank.
  LocalMember(std::shared_ptr<LocalBoard> shared, std::vector<int> members, int rank);
  ~LocalMember() override;

  int rank() const override { return rank_; }
  int num_ranks() const override { return static_cast<int>(members_.size()); }
  void all_gather(std::span<const std::byte> mine, std::span<std::byte> all, Deadline deadline) override;

 private:
  struct Round;

  int on_board(int peer) const { return members_[static_cast<std::size_t>(peer)]; }
  LocalProgress& progress() const { return shared_->progress[static_cast<std::size_t>(on_board(rank_))]; }
  void acquire_rank();
  void exchange(Round& round, std::span<const std::byte> mine, std::span<std::byte> all);
  void begin(Round& round);
  void wait_for_all(Round& round);
  void collect(Round& round);
  void follow_latest_attempt(Round& round);
  void check_conflicts(const Round& round) const;
  void check_deaths(Round& round) const;

  std::shared_ptr<LocalBoard> shared_;
  Board& board_;
  std::vector<int> members_;
  int rank_;
  std::uint64_t group_;  // digest of members_
  pid_t process_;
};

}  // namespace anyep::bootstrap
