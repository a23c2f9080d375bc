#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <optional>
#include <thread>
#include <utility>

#include "bootstrap/local.h"
#include "core/check.h"
#include "core/topology.h"

namespace anyep::bootstrap {
namespace {

using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

// A peer that runs posts within microseconds; one that waits for a processor needs ours.
constexpr int kSpins = 200;
constexpr int kYields = 50;
// How soon a death is seen, and the longest sleep: nobody rings the bell for one who died.
constexpr auto kLookAfter = 10ms;
// How long a rank that its process gave back before it ended stays open for another one: a later process may take it,
// but survivors who leave a failed engine for a new one give their ranks back, too, and any of them may be killed then.
constexpr auto kTakenOver = 2s;

std::uint64_t digest(const std::vector<int>& members) {
  return core::digest({reinterpret_cast<const char*>(members.data()), members.size() * sizeof(int)});
}

}  // namespace

// One exchange, of which a round moves one chunk.
struct LocalMember::Round {
  struct Seen {
    pid_t pid = 0;
    UniqueFd pidfd = {};
    std::optional<Clock::time_point> ended = {};  ///< when this was noticed
  };

  Step step;
  std::uint64_t size = 0;
  Turn turn = {};
  bool first = false;  ///< of its attempt: may still move to a later attempt
  std::span<const std::byte> mine = {};
  std::vector<std::span<std::byte>> all = {};
  std::vector<int> missing = {};
  std::vector<Seen> processes = {};  ///< by rank, opened when first looked at
};

LocalMember::LocalMember(std::shared_ptr<LocalBoard> shared, std::vector<int> members, int rank)
    : shared_(std::move(shared)),
      board_(shared_->board),
      members_(std::move(members)),
      rank_(rank),
      group_(digest(members_)),
      process_(::getpid()) {
  pid_t other = 0;
  if (board_.claim(on_board(rank_), &other)) return;
  board_.report_conflict(on_board(rank_), process_);
  throw_about({.op = "bootstrap", .rank = rank_}, ErrorCode::kMismatch, {rank_},
              fmt::format("processes {} and {} both claim rank {}", other, process_, rank_));
}

LocalMember::~LocalMember() {
  board_.give_back(on_board(rank_));
}

void LocalMember::all_gather(std::span<const std::byte> mine, std::span<std::byte> all, Deadline deadline) {
  if (all.size() != mine.size() * members_.size()) {
    core::throw_argument("bootstrap", "all.size()", fmt::to_string(all.size()),
                         fmt::format("{} ranks x {} bytes", members_.size(), mine.size()));
  }
  acquire_rank();
  LocalProgress::Last& last = progress().groups[group_];
  const bool goes_on = std::exchange(last.complete, false);
  Round round{.step = {.op = "bootstrap", .phase = "exchange", .rank = rank_, .deadline = deadline},
              .size = mine.size(),
              .turn = goes_on ? Turn{last.turn.attempt, last.turn.round + 1}
                              : Turn{board_.last_attempt(on_board(rank_)) + 1, 0},
              .first = !goes_on};
  try {
    exchange(round, mine, all);
  } catch (...) {
    board_.withdraw(on_board(rank_), group_, round.turn);
    progress().user.store(0, std::memory_order_release);
    throw;
  }
  last = {round.turn, true};
  progress().user.store(0, std::memory_order_release);
}

// One thread at a time acts for a rank: with two, each would take the other's posts for its own.
void LocalMember::acquire_rank() {
  if (process_ != ::getpid()) {
    core::throw_error(ErrorCode::kState, "bootstrap", "made before fork(): call member() in the process that uses it");
  }
  pid_t user = progress().user.load(std::memory_order_relaxed);
  while (user != process_) {  // a user of another process is a copy that fork() made
    if (progress().user.compare_exchange_weak(user, process_, std::memory_order_acquire)) return;
  }
  board_.report_conflict(on_board(rank_), process_);
  throw_about({.op = "bootstrap", .rank = rank_}, ErrorCode::kMismatch, {rank_},
              fmt::format("two threads of process {} act as rank {}", process_, rank_));
}

void LocalMember::exchange(Round& round, std::span<const std::byte> mine, std::span<std::byte> all) {
  round.processes.resize(members_.size());
  round.all.resize(members_.size());
  std::size_t at = 0;
  while (true) {
    const std::size_t count = std::min(Board::kChunkBytes, mine.size() - at);
    round.mine = mine.subspan(at, count);
    for (std::size_t peer = 0; peer < members_.size(); ++peer) {
      round.all[peer] = all.subspan(peer * mine.size() + at, count);
    }
    std::ranges::copy(round.mine, round.all[static_cast<std::size_t>(rank_)].begin());
    begin(round);
    wait_for_all(round);
    at += count;
    if (at == mine.size()) return;
    ++round.turn.round;
    round.first = false;
  }
}

void LocalMember::begin(Round& round) {
  if (round.first) board_.begin_attempt(on_board(rank_), round.turn.attempt);
  round.missing.clear();
  for (int peer = 0; peer < num_ranks(); ++peer) {
    if (peer != rank_) round.missing.push_back(peer);
  }
  board_.post(on_board(rank_), group_, round.turn, round.size, round.mine);
}

// The only loop that waits for others' words outside src/protocol: the doorbells and limits of protocol/wait.h live in
// an engine, and here there is none yet.
void LocalMember::wait_for_all(Round& round) {
  Clock::time_point look_at = Clock::now() + kLookAfter;
  for (int polls = 0;; ++polls) {
    const std::uint32_t bell = board_.bell();  // before looking: what is posted later wakes the sleep below
    collect(round);
    if (round.missing.empty()) return;
    if (polls < kSpins) continue;
    if (polls < kSpins + kYields) {
      std::this_thread::yield();
      continue;
    }
    follow_latest_attempt(round);
    check_conflicts(round);
    const Clock::time_point now = Clock::now();
    if (now >= look_at) {
      check_deaths(round);
      look_at = now + kLookAfter;
    }
    if (now >= round.step.deadline) throw_missing(round.step, round.missing, "come to the exchange");
    board_.sleep(bell, std::min<Clock::duration>(kLookAfter, round.step.deadline - now));
  }
}

void LocalMember::collect(Round& round) {
  std::erase_if(round.missing, [&](int peer) {
    std::uint64_t size = 0;
    if (!board_.read(on_board(peer), group_, round.turn, &size, round.all[static_cast<std::size_t>(peer)]))
      return false;
    if (size == round.size) return true;
    throw_about(round.step, ErrorCode::kMismatch, {peer},
                fmt::format("rank {} brings {} bytes, rank {} brings {}", peer, size, rank_, round.size));
  });
}

void LocalMember::follow_latest_attempt(Round& round) {
  std::uint32_t latest = round.turn.attempt;
  int leader = rank_;
  for (const int peer : round.missing) {
    const std::uint32_t posted = board_.posted_attempt(on_board(peer), group_);
    if (posted <= latest) continue;
    latest = posted;
    leader = peer;
  }
  if (latest == round.turn.attempt) return;
  if (round.first) {
    round.turn.attempt = latest;
    begin(round);
    return;
  }
  throw_about(round.step, ErrorCode::kAborted, {leader},
              fmt::format("rank {} gave up this exchange and has begun another", leader));
}

void LocalMember::check_conflicts(const Round& round) const {
  for (int peer = 0; peer < num_ranks(); ++peer) {
    const pid_t second = board_.conflict(on_board(peer), round.turn.attempt);
    if (second == 0) continue;
    const pid_t first = board_.process(on_board(peer)).pid;
    throw_about(round.step, ErrorCode::kMismatch, {peer},
                second == first ? fmt::format("two threads of process {} act as rank {}", first, peer)
                                : fmt::format("processes {} and {} both claim rank {}", first, second, peer));
  }
}

void LocalMember::check_deaths(Round& round) const {
  std::vector<int> dead;
  const Clock::time_point now = Clock::now();
  for (const int peer : round.missing) {
    const ProcessId process = board_.process(on_board(peer));
    if (process.pid == 0 || process.pid == process_) continue;
    Round::Seen& seen = round.processes[static_cast<std::size_t>(peer)];
    if (seen.pid != process.pid) {
      seen = {process.pid};
      if (look_up(process, seen.pidfd) == Life::kDead) seen.ended = now;
    } else if (!seen.ended && seen.pidfd && has_exited(seen.pidfd.get())) {
      seen.ended = now;
    }
    if (!seen.ended) continue;
    if (board_.is_claimed_by(on_board(peer), seen.pid) || now - *seen.ended >= kTakenOver) dead.push_back(peer);
  }
  if (dead.empty()) return;
  const std::string text = fmt::format("{} died before the exchange was complete", name_ranks(dead));
  throw_about(round.step, ErrorCode::kPeerDead, std::move(dead), text);
}

}  // namespace anyep::bootstrap
