// What a wait promises when its word does not come, or comes with something else. Each rule gives an empty text, or
// what broke.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <thread>

#include "protocol/barrier.h"
#include "protocol/handoff.h"
#include "protocol/team.h"

namespace anyep::test {

/// One rank alone with a word that a peer (rank 1 of 4) should write.
struct Lonely {
  static constexpr std::uint16_t kCode = protocol::make_code(3, 0x5A5);
  static constexpr protocol::Who kWho{1, 2};
  static constexpr std::uint32_t kOp = 77;

  std::uint64_t word = 0, abort = 0, announced[4] = {}, waited_ns[4] = {};
  std::uint32_t gone[4] = {}, masked[4] = {};
  protocol::Doorbell bell{};
  protocol::FaultRecord record{};

  static std::uint64_t mark(std::uint32_t epoch, std::uint16_t code = kCode) {
    return protocol::make_mark(kGeneration, epoch, code);
  }
  protocol::Waiter waiter(std::uint64_t limit_ns) {
    protocol::Waiter w;
    w.abort = &abort;
    w.doorbell = &bell;
    w.record = &record;
    w.op = kOp;
    w.start_ns = protocol::now_ns();
    w.limit_ns = limit_ns;
    w.announced = announced;
    w.announced_stride = 1;
    w.announcement = mark(9);
    w.gone = gone;
    w.masked = masked;
    w.waited_ns = waited_ns;
    return w;
  }
  protocol::Ended wait_for(std::uint64_t expected, std::uint64_t limit_ns) {
    return protocol::wait(waiter(limit_ns), kWho, word, expected);
  }
};

inline std::string ended_text(const char* rule, protocol::Ended ended, protocol::Ended wanted) {
  if (ended == wanted) return {};
  return std::string(rule) + ": ended with " + std::to_string(static_cast<unsigned>(ended)) + ", not " +
         std::to_string(static_cast<unsigned>(wanted));
}

inline constexpr std::uint64_t kShort = kSecond / 20, kLong = 30 * kSecond;

/// Runs `change` in another thread once this one's wait has gone to sleep.
template <class Change>
protocol::Ended wait_while(Lonely& lonely, std::uint64_t expected, std::uint64_t limit_ns, Change&& change) {
  std::thread other([&] {
    for (int look = 0; look < 10'000 && protocol::Shared(lonely.bell.sleepers).load(protocol::kRelaxed) == 0; ++look) {
      std::this_thread::sleep_for(std::chrono::microseconds(300));
    }
    change();
  });
  const protocol::Ended ended = lonely.wait_for(expected, limit_ns);
  other.join();
  return ended;
}

inline std::string rule_limit() {
  Lonely lonely;
  const std::uint64_t from_ns = protocol::now_ns();
  const protocol::Ended ended = lonely.wait_for(Lonely::mark(5), kShort);
  const std::uint64_t took = protocol::now_ns() - from_ns;
  if (ended != protocol::Ended::kTimeout) return ended_text("limit", ended, protocol::Ended::kTimeout);
  if (took < kShort) return "limit: ended before it";
  if (lonely.waited_ns[1] < kShort || lonely.waited_ns[0] != 0) return "limit: the wait was not counted for its peer";
  const protocol::FaultRecord& record = lonely.record;
  const bool whole = record.claimed == 1 && record.ready == 1 && record.peer == 1 && record.phase == 2 &&
                     record.ended == static_cast<std::uint32_t>(ended) && record.expected == Lonely::mark(5) &&
                     record.seen == 0 && record.elapsed_ns >= kShort && record.limit_ns == kShort &&
                     record.op == Lonely::kOp;
  return whole ? std::string() : "limit: the record does not say what happened";
}

/// Nobody rings: the limit of a sleep is what brings the sleeper back.
inline std::string rule_abort() {
  Lonely lonely;
  const std::uint64_t from_ns = protocol::now_ns();
  const protocol::Ended ended =
      wait_while(lonely, Lonely::mark(5), kLong, [&] { protocol::Shared(lonely.abort).store(1, protocol::kRelaxed); });
  if (ended != protocol::Ended::kAborted) return ended_text("abort", ended, protocol::Ended::kAborted);
  return protocol::now_ns() - from_ns < 5 * kSecond ? std::string() : "abort: seen late";
}

/// In whatever stage of its wait the abort word finds it: spinning, yielding, asleep.
inline std::string rule_abort_at_any_time() {
  for (int round = 0; round < 300; ++round) {
    Lonely lonely;
    protocol::Ended ended = protocol::Ended::kReached;
    std::thread waiter([&] { ended = lonely.wait_for(Lonely::mark(5), kLong); });
    for (int spin = 0; spin < round * 40; ++spin) protocol::relax();
    protocol::Shared(lonely.abort).store(1, protocol::kRelaxed);
    waiter.join();
    if (ended != protocol::Ended::kAborted) return ended_text("abort while waiting", ended, protocol::Ended::kAborted);
  }
  return {};
}

inline std::string rule_gone() {
  Lonely lonely;
  return ended_text("gone",
                    wait_while(lonely, Lonely::mark(5), kLong,
                               [&] { protocol::Shared(lonely.gone[1]).store(1u, protocol::kRelease); }),
                    protocol::Ended::kPeerGone);
}

/// A peer may publish and then leave: what has landed counts. It does both between a look at the word and the next look
/// around.
inline std::string rule_published_then_gone() {
  Lonely lonely;
  const std::uint64_t expected = Lonely::mark(5);
  unsigned looks = 0;
  const auto there = [&](std::uint64_t seen) {
    if (protocol::reached(seen, expected)) return true;
    if (++looks == protocol::kSpinPolls + 2) {
      protocol::Shared(lonely.word).store(expected, protocol::kRelease);
      protocol::Shared(lonely.gone[1]).store(1u, protocol::kRelease);
    }
    return false;
  };
  const protocol::Ended ended = protocol::wait_until(lonely.waiter(kLong), Lonely::kWho, lonely.word, expected, there);
  return ended_text("published, then gone", ended, protocol::Ended::kReached);
}

inline std::string rule_masked() {
  Lonely lonely;
  const protocol::Ended ended = wait_while(lonely, Lonely::mark(5), kLong,
                                           [&] { protocol::Shared(lonely.masked[1]).store(1u, protocol::kRelaxed); });
  if (ended != protocol::Ended::kMasked) return ended_text("masked", ended, protocol::Ended::kMasked);
  return lonely.record.claimed == 0 ? std::string() : "masked: a mask is no fault and leaves no record";
}

inline std::string rule_another_call() {
  Lonely lonely;
  lonely.word = Lonely::mark(5, protocol::make_code(4, 0));
  const protocol::Ended ended = lonely.wait_for(Lonely::mark(5), kShort);
  if (ended != protocol::Ended::kMismatch) return ended_text("another call", ended, protocol::Ended::kMismatch);
  return lonely.record.seen == lonely.word ? std::string() : "another call: the record does not say which";
}

/// The peer is in another call at this place and never writes the word.
inline std::string rule_announced() {
  Lonely lonely;
  return ended_text(
      "announced",
      wait_while(
          lonely, Lonely::mark(5), kLong,
          [&] {
            protocol::Shared(lonely.announced[1]).store(Lonely::mark(9, protocol::make_code(1, 1)), protocol::kRelaxed);
          }),
      protocol::Ended::kMismatch);
}

/// A rank of an earlier group that wakes up writes marks of its own generation.
inline std::string rule_generation() {
  Lonely lonely;
  lonely.word = protocol::make_mark(kGeneration - 1, 6, Lonely::kCode);
  return ended_text("another generation", lonely.wait_for(Lonely::mark(5), kShort), protocol::Ended::kTimeout);
}

inline std::string rule_ahead() {
  Lonely lonely;
  lonely.word = Lonely::mark(6, protocol::make_code(1, 1));
  const std::string ahead = ended_text("ahead", lonely.wait_for(Lonely::mark(5), kShort), protocol::Ended::kReached);
  if (!ahead.empty()) return ahead;
  lonely.word = Lonely::mark(protocol::next_epoch(0xFFFF'FFFFu));
  return ended_text("ahead over the wrap", lonely.wait_for(Lonely::mark(0xFFFF'FFFEu), kShort),
                    protocol::Ended::kReached);
}

inline std::string rule_behind() {
  Lonely lonely;
  lonely.word = Lonely::mark(4);
  const std::string behind = ended_text("behind", lonely.wait_for(Lonely::mark(5), kShort), protocol::Ended::kTimeout);
  if (!behind.empty()) return behind;
  Lonely wrap;
  wrap.word = Lonely::mark(0xFFFF'FFFFu);
  return ended_text("behind the wrap", wrap.wait_for(Lonely::mark(protocol::next_epoch(0xFFFF'FFFFu)), kShort),
                    protocol::Ended::kTimeout);
}

/// Several waits of one op may fail at once; a watcher reads what the first one left.
inline std::string rule_first_record_wins() {
  for (int round = 0; round < 200; ++round) {
    protocol::FaultRecord record{};
    const auto leave = [&](std::int32_t peer) {
      protocol::leave_record(record, static_cast<std::uint32_t>(peer) + 10, protocol::Ended::kTimeout, {peer, 7},
                             static_cast<std::uint64_t>(peer), 1, 2, 3);
    };
    std::thread one([&] { leave(1); });
    std::thread two([&] { leave(2); });
    std::int32_t first = 0;
    for (int look = 0; look < 1'000'000 && first == 0; ++look) {
      if (protocol::Shared(record.ready).load(protocol::kAcquire) != 0) first = record.peer;
      protocol::yield();
    }
    one.join();
    two.join();
    if (first == 0 || record.peer != first || record.expected != static_cast<std::uint64_t>(first) ||
        record.phase != 7 || record.op != static_cast<std::uint32_t>(first) + 10) {
      return "record: not the first one, or not whole";
    }
  }
  return {};
}

/// A word that comes while the sleeper registers is seen by its second look.
inline std::string rule_second_look() {
  protocol::Doorbell bell{};
  std::uint32_t registered = 0;
  const std::uint64_t from_ns = protocol::now_ns();
  protocol::sleep_unless(bell, 3 * kSecond, [&] {
    registered = protocol::Shared(bell.sleepers).load(protocol::kRelaxed);
    return true;
  });
  if (registered != 1) return "second look: not after registering";
  if (bell.sleepers != 0) return "second look: still registered";
  return protocol::now_ns() - from_ns < kSecond ? std::string() : "second look: slept all the same";
}

/// A ring between the second look and the sleep ends the sleep at once: the bell has moved.
inline std::string rule_ring_before_sleep() {
  protocol::Doorbell bell{};
  const std::uint64_t from_ns = protocol::now_ns();
  protocol::sleep_unless(bell, 3 * kSecond, [&] {
    protocol::ring(bell);
    return false;
  });
  return protocol::now_ns() - from_ns < kSecond ? std::string() : "ring before the sleep: lost";
}

/// Whoever publishes rings, and whoever rings has published: a sleeper that the bell wakes finds its word.
inline std::string rule_rings_after_publishing() {
  protocol::Doorbell bell{};
  bell.sleepers = 1;
  std::uint64_t words[3] = {};  // arrived, credit, barrier
  std::uint32_t sent = 5, taken = 5;
  protocol::Producer producer({&words[1], &words[0], &sent, &bell}, kGeneration, 1);
  protocol::Consumer consumer({&words[1], &words[0], &taken, &bell}, kGeneration, 1);
  for (std::uint32_t round = 0; round < 900; ++round) {
    const std::uint64_t mark = protocol::make_mark(kGeneration, 6 + round / 3, 1);
    std::thread writer([&] {
      if (round % 3 == 0) producer.publish();
      if (round % 3 == 1) consumer.grant(1), consumer.take();
      if (round % 3 == 2) protocol::enter_barrier(words[2], bell, mark);
    });
    for (int look = 0; protocol::Shared(bell.bell).load(protocol::kAcquire) == round; ++look) {
      look < 30'000 ? protocol::relax() : protocol::yield();  // awake when the bell moves
    }
    const bool there = protocol::is_reached(words[round % 3], mark);
    writer.join();
    if (!there) return "the bell rang before the word was there, round " + std::to_string(round);
  }
  return {};
}

struct WaitRule {
  const char* name;
  std::string (*check)();
};
inline constexpr WaitRule kWaitRules[] = {
    {"Limit", rule_limit},
    {"Abort", rule_abort},
    {"AbortAtAnyTime", rule_abort_at_any_time},
    {"Gone", rule_gone},
    {"PublishedThenGone", rule_published_then_gone},
    {"Masked", rule_masked},
    {"AnotherCall", rule_another_call},
    {"Announced", rule_announced},
    {"AnotherGeneration", rule_generation},
    {"Ahead", rule_ahead},
    {"Behind", rule_behind},
    {"FirstRecordWins", rule_first_record_wins},
    {"SecondLook", rule_second_look},
    {"RingBeforeSleep", rule_ring_before_sleep},
    {"RingsAfterPublishing", rule_rings_after_publishing},
};

}  // namespace anyep::test
