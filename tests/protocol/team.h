// A team of ranks as threads, for tests of src/protocol: how ranks are delayed, what their waits look at, who found a
// fault. Light headers only: the mutation harness compiles this many times.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "protocol/doorbell.h"
#include "protocol/fault.h"
#include "protocol/platform.h"
#include "protocol/wait.h"
#include "protocol/word.h"

namespace anyep::test {

inline constexpr std::uint16_t kGeneration = 0xABCD;
inline constexpr std::uint64_t kSecond = 1'000'000'000;

/// How a scenario is played.
struct Load {
  int ranks = 2;
  std::uint32_t regions = 2;
  std::uint32_t turns = 2;  ///< per op
  std::uint32_t ops = 600;
  std::uint64_t seed = 1;
  std::uint32_t first_epoch = protocol::kFirstEpoch;
  std::uint32_t delay_one_in = 24;        ///< steps; 0 = no delays
  std::uint64_t limit_ns = 60 * kSecond;  ///< of every wait
  std::uint64_t slow_ns = 0;              ///< a wait that lasts longer is a fault; 0 = none is
};

/// 64 bits that depend on all of three numbers (a splitmix64 finish).
inline std::uint64_t mix(std::uint64_t a, std::uint64_t b, std::uint64_t c) {
  std::uint64_t x = a * 0x9E3779B97F4A7C15u + b * 0xBF58476D1CE4E5B9u + c * 0x94D049BB133111EBu + 0x2545F4914F6CDD1Du;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

/// Keeps the first fault and makes everybody leave.
class Team {
 public:
  explicit Team(const Load& load) : load_(load), seats_(static_cast<std::size_t>(load.ranks)) {}

  const Load& load() const { return load_; }
  protocol::Doorbell& bell(int rank) { return seats_[static_cast<std::size_t>(rank)].bell; }
  std::uint64_t& abort_word(int rank) { return seats_[static_cast<std::size_t>(rank)].abort; }

  [[gnu::format(printf, 2, 3)]] void fail(const char* format, ...) {
    char text[256];
    std::va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    {
      const std::lock_guard lock(mutex_);
      if (fault_.empty()) fault_ = text;
    }
    for (Seat& seat : seats_) protocol::Shared(seat.abort).store(1, protocol::kRelaxed);
  }
  /// Empty when nothing went wrong. After run().
  const std::string& fault() const { return fault_; }

  /// Runs body(rank, role) in one thread per rank and role.
  template <class Body>
  void run(int roles, Body&& body) {
    std::vector<std::thread> threads;
    for (int rank = 0; rank < load_.ranks; ++rank) {
      for (int role = 0; role < roles; ++role) threads.emplace_back([&body, rank, role] { body(rank, role); });
    }
    for (std::thread& thread : threads) thread.join();
    for (Seat& seat : seats_) {
      if (seat.bell.sleepers != 0) fail("%u sleepers are left at a doorbell", seat.bell.sleepers);
    }
  }

 private:
  struct Seat {
    protocol::Doorbell bell{};
    alignas(128) std::uint64_t abort = 0;
  };
  const Load load_;
  std::vector<Seat> seats_;
  std::mutex mutex_;
  std::string fault_;
};

/// One thread of a rank: its delays and its waits.
class Actor {
 public:
  Actor(Team& team, int rank, int role)
      : team_(team),
        rank_(rank),
        state_(mix(team.load().seed, static_cast<std::uint64_t>(rank), static_cast<std::uint64_t>(role))) {}

  Team& team() { return team_; }
  int rank() const { return rank_; }
  std::uint64_t random() { return state_ = mix(state_, 1, 2); }

  /// A step: now and then it takes long, sometimes longer than any sleep of a waiting peer.
  void step() {
    const std::uint32_t one_in = team_.load().delay_one_in;
    if (one_in == 0 || random() % one_in != 0) return;
    if (random() % 32 == 0) {
      std::this_thread::sleep_for(std::chrono::microseconds(random() % 2500));
    } else if (random() % 4 == 0) {
      std::this_thread::yield();
    } else {
      for (std::uint64_t turns = random() % 2000; turns > 0; --turns) protocol::relax();
    }
  }

  /// What a wait of this actor looks at, from now on.
  protocol::Waiter waiter() {
    protocol::Waiter waiter;
    waiter.abort = &team_.abort_word(rank_);
    waiter.doorbell = &team_.bell(rank_);
    waiter.record = &record_;
    waiter.start_ns = protocol::now_ns();
    waiter.limit_ns = team_.load().limit_ns;
    return waiter;
  }

  /// Plays one wait; false when it did not end as it should.
  template <class Wait>
  bool must(const char* what, int peer, Wait&& wait) {
    const protocol::Waiter w = waiter();
    const protocol::Ended ended = wait(w, protocol::Who{peer, 0});
    const std::uint64_t took = protocol::now_ns() - w.start_ns;
    if (ended != protocol::Ended::kReached) {
      team_.fail("rank %d: %s of rank %d ended with %u after %.3f s", rank_, what, peer, static_cast<unsigned>(ended),
                 static_cast<double>(took) * 1e-9);
      return false;
    }
    if (team_.load().slow_ns != 0 && took > team_.load().slow_ns) {
      team_.fail("rank %d: %s of rank %d took %.3f s", rank_, what, peer, static_cast<double>(took) * 1e-9);
      return false;
    }
    return true;
  }

 private:
  Team& team_;
  const int rank_;
  std::uint64_t state_;
  protocol::FaultRecord record_{};
};

}  // namespace anyep::test
