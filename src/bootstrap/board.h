// Shared memory in which the ranks of one host post bytes for each other, before there is anything else between them.
//
//   word         written by    read by  order               meaning
//   mark         slot's rank   all      release -> acquire  attempt, round (32 bits each); 0 = being written, withdrawn
//   group        slot's rank   all      release -> acquire  the post's members, as a digest
//   size, at     slot's rank   all      release -> acquire  size of its exchange, its bytes; read like a seqlock: good
//                                                           if mark and group are still the same afterwards
//   attempt      slot's rank   all      relaxed             the last attempt that this rank has begun, in any group
//   claim        any, by CAS   any      acquire-release     pid, number of bootstraps that act for the rank
//   pid, start   slot's rank   all      release -> acquire  the last process that claimed the rank; 0 = none has
//   conflict     any           all      release -> acquire  attempt, pid of a second actor for the rank
//   bell         any, by add   all      release -> acquire  futex: rung after every post
//
// A rank keeps two posts for each of the last four groups that it was in. A post is overwritten by the next but one of
// its group: in between lies a round that ends only when every member has read the first. Failed rounds end earlier and
// a fifth group takes the oldest one's place, hence the seqlock; a reader that comes too late finds no post and fails by
// its limit.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>

#include "bootstrap/process.h"

namespace anyep::bootstrap {

/// Names one round of one exchange. Attempts only grow, per rank.
struct Turn {
  std::uint32_t attempt = 0, round = 0;
  friend bool operator==(const Turn&, const Turn&) = default;
};

class Board {
 public:
  static constexpr std::size_t kChunkBytes = 4096;
  /// Maps shared memory that forked children inherit. @throws Error kResource.
  explicit Board(int num_ranks);
  ~Board();
  Board(const Board&) = delete;
  Board& operator=(const Board&) = delete;

  int num_ranks() const noexcept { return num_ranks_; }

  /// This process acts for `rank` from now on, once more. False: the living process `*other` does already; that rank's
  /// exchange fails for all.
  bool claim(int rank, pid_t* other) noexcept;
  /// Undoes one claim() of this process.
  void give_back(int rank) noexcept;
  /// The last process that claimed the rank, whether it still acts for it or not; pid 0 = none has.
  ProcessId process(int rank) const noexcept;
  /// `pid` has claimed the rank and not given it back. It may be dead.
  bool is_claimed_by(int rank, pid_t pid) const noexcept;

  /// Spoils the exchange that `rank` is in or begins next, for all.
  void report_conflict(int rank, pid_t second) noexcept;
  /// The pid of a second actor for `rank`, if that spoils `attempt`; else 0.
  pid_t conflict(int rank, std::uint32_t attempt) const noexcept;

  std::uint32_t last_attempt(int rank) const noexcept;
  void begin_attempt(int rank, std::uint32_t attempt) noexcept;

  /// Up to kChunkBytes of an exchange of `size` bytes.
  void post(int rank, std::uint64_t group, Turn turn, std::uint64_t size, std::span<const std::byte> chunk) noexcept;
  void withdraw(int rank, std::uint64_t group, Turn turn) noexcept;
  /// Copies a rank's post. False: it is not there. `*size` is the post's: the copy counts only if it is the reader's
  /// own.
  bool read(int rank, std::uint64_t group, Turn turn, std::uint64_t* size, std::span<std::byte> chunk) const noexcept;
  /// The latest attempt that has a post in this group; 0 = none.
  std::uint32_t posted_attempt(int rank, std::uint64_t group) const noexcept;

  std::uint32_t bell() const noexcept { return shared_->bell.load(std::memory_order_acquire); }
  void ring() noexcept;
  /// Sleeps until the bell is no longer `seen`, at most `limit`.
  void sleep(std::uint32_t seen, std::chrono::nanoseconds limit) const noexcept;

 private:
  using Word = std::atomic<std::uint64_t>;
  static_assert(Word::is_always_lock_free);
  struct alignas(64) Post {
    Word mark, group, size;
    std::array<Word, kChunkBytes / sizeof(Word)> at;
  };
  struct alignas(64) Lane {
    Word group, used, posted;  // of the rank alone: whose lane this is, how lately it was used, posts so far
    std::array<Post, 2> posts;
  };
  struct alignas(64) Slot {
    Word claim, pid, start, attempt, conflict, num_posts;
    std::array<Lane, 4> lanes;
  };
  struct alignas(64) Shared {
    std::atomic<std::uint32_t> bell;
  };

  static Lane& lane_of(Slot& slot, std::uint64_t group) noexcept;
  static const Post* find(const Slot& slot, std::uint64_t group, Turn turn) noexcept;
  static bool holds(const Post& post, std::uint64_t group, Turn turn) noexcept;
  Slot& slot(int rank) const noexcept { return slots_[rank]; }
  std::size_t mapped_bytes() const noexcept;

  int num_ranks_;
  Shared* shared_ = nullptr;
  Slot* slots_ = nullptr;
};

}  // namespace anyep::bootstrap
