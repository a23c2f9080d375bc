// Budget::masks: low latency goes on without a rank that is dead or silent, and with it again when both have agreed.
#include <anyep/engine.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <barrier>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "core/fault_point.h"
#include "fault/notes.h"
#include "fault/task.h"

namespace anyep::test {
namespace {

using namespace std::chrono_literals;

Budget budget_with_masks(int num_ranks) {
  Budget budget = Task::budget(num_ranks);
  budget.masks = true;
  return budget;
}

Engine make_engine(const LocalGroup& group, int rank, std::chrono::nanoseconds timeout) {
  const auto member = group.member(rank);
  Tuning tuning = Task::tuning();
  tuning.timeout = timeout;
  return Engine::create(budget_with_masks(group.num_ranks()), Topology::discover(*member), tuning, *member);
}

std::uint64_t masks_of(Engine& engine) {
  std::vector<std::int32_t> masks(static_cast<std::size_t>(engine.num_ranks()), -1);
  engine.masks(TensorView::dense(masks.data(), DType::kI32, {engine.num_ranks()}));
  std::uint64_t bits = 0;
  for (std::size_t rank = 0; rank < masks.size(); ++rank) bits |= masks[rank] != 0 ? std::uint64_t{1} << rank : 0;
  return bits;
}

void wait_for(const std::function<bool()>& there) {
  const std::int64_t give_up = now_ns() + scaled_ns(20);
  while (!there()) {
    must(now_ns() < give_up, "nothing to wait for any more");
    std::this_thread::sleep_for(1ms);
  }
}

TEST(MasksProcessTest, ADeadRankCostsItsTokensOnly) {
  constexpr int kRanks = 4, kVictim = 2;
  constexpr std::uint64_t kGone = 1u << kVictim;
  for (const char* point : {"between", "low_latency_dispatch.mid_send", "low_latency_dispatch.in_recv",
                            "low_latency_combine.before_send", "low_latency_combine.mid_send"}) {
    if (!core::kFaultPoints) GTEST_SKIP() << "this build has no fault points";
    SCOPED_TRACE(point);
    const LocalGroup group(kRanks);
    const std::vector<int> status = LocalGroup::run_processes(kRanks, [&](int rank) {
      end_after(30);
      Engine engine = make_engine(group, rank, 2s);
      Task task(kRanks, rank);
      task.low_latency(engine, 0);
      must(task.missing() == 0 && masks_of(engine) == 0, "masks of a healthy group");
      engine.barrier();
      if (rank == kVictim) core::set_fault(fmt::format("{}:{}:*:kill", point, rank));
      const std::int64_t start = now_ns();
      for (int salt = 1; salt < 20; ++salt) {
        task.low_latency(engine, salt);
        must((task.missing() & ~kGone) == 0, "missing ranks", static_cast<long long>(task.missing()), kGone);
        if (salt > 2) must(task.missing() == kGone, "missing ranks", static_cast<long long>(task.missing()), kGone);
        if (salt == 19) {
          must(masks_of(engine) == kGone, "masks", static_cast<long long>(masks_of(engine)), kGone);
          must(now_ns() - start < scaled_ns(1), "nanoseconds for 20 rounds", now_ns() - start);
          engine.check();
        }
        engine.barrier();
      }
      // High throughput needs everybody.
      ErrorCode code = ErrorCode::kInternal;
      try {
        task.high_throughput(engine, 1);
      } catch (const Error& error) {
        code = error.code;
      }
      must(code == ErrorCode::kPeerDead || code == ErrorCode::kAborted, "code of high throughput", int(code),
           int(ErrorCode::kPeerDead));
    });
    for (int rank = 0; rank < kRanks; ++rank) {
      EXPECT_TRUE(rank == kVictim ? WIFSIGNALED(status[kVictim]) : status[static_cast<std::size_t>(rank)] == 0)
          << "rank " << rank;
    }
    if (HasFailure()) return;
  }
}

TEST(MasksProcessTest, ALoneSurvivorGoesOn) {
  const LocalGroup group(2);
  const std::vector<int> status = LocalGroup::run_processes(2, [&](int rank) {
    end_after(30);
    Engine engine = make_engine(group, rank, 2s);
    Task task(2, rank);
    task.low_latency(engine, 0);
    if (rank == 1) ::raise(SIGKILL);
    for (int salt = 1; salt < 10; ++salt) task.low_latency(engine, salt);
    must(task.missing() == 2 && masks_of(engine) == 2, "missing ranks", static_cast<long long>(task.missing()), 2);
    engine.close();
  });
  EXPECT_EQ(status[0], 0);
}

/// Who missed whom in which round; both of a pair must have the same view.
class Views {
 public:
  explicit Views(int rounds) : words_(static_cast<std::size_t>(rounds) * 4) {}
  std::atomic<std::uint64_t>& at(int round, int rank) { return words_[static_cast<std::size_t>(round * 4 + rank)]; }

 private:
  std::vector<std::atomic<std::uint64_t>> words_;
};

TEST(MasksTest, AMaskOfALiveRankHoldsOnBothSidesUntilBothAgree) {
  constexpr int kRanks = 3, kRounds = 80;
  const LocalGroup group(kRanks);
  Views views(kRounds);
  LocalGroup::run_threads(kRanks, [&](int rank) {
    Engine engine = make_engine(group, rank, 5s);
    Task task(kRanks, rank);
    for (int round = 0; round < kRounds; ++round) {
      // 0 and 1 leave each other out; 2 goes on with both.
      if (round == 10) engine.barrier();
      if (round == 10 && rank < 2) engine.mask(1 - rank);
      if (round == 30 && rank == 0) engine.unmask(1);
      task.low_latency(engine, round);
      views.at(round, rank) = task.missing();
      EXPECT_TRUE(rank != 2 || masks_of(engine) == 0u);
      std::this_thread::sleep_for(500us);
    }
    EXPECT_EQ(masks_of(engine), 0u) << "rank " << rank;
    engine.close();
  });
  for (int round = 0; round < kRounds; ++round) {
    const std::uint64_t of_0 = views.at(round, 0), of_1 = views.at(round, 1);
    EXPECT_EQ(of_0 >> 1, of_1) << "round " << round << ": one of the two was alone";
    EXPECT_TRUE(round >= 10 || of_0 == 0u) << round;
    EXPECT_TRUE(round < 10 || round >= 30 || of_0 == 2u) << round;
    EXPECT_EQ(views.at(round, 2), 0u) << round;
  }
}

TEST(MasksTest, BothMayAskAtOnceAndNobodyEverWaitsToTheLimit) {
  constexpr int kRounds = 300;
  const LocalGroup group(2);
  Views views(kRounds);
  std::barrier both(2);
  const std::int64_t start = now_ns();
  LocalGroup::run_threads(2, [&](int rank) {
    Engine engine = make_engine(group, rank, 10s);
    Task task(2, rank);
    for (int round = 0; round < kRounds; ++round) {
      if (round % 30 == 0) {
        while (masks_of(engine) != 0) task.low_latency(engine, 1);  // both end with the same turn
        both.arrive_and_wait();                                     // nobody is masked while the other counts on it
        engine.mask(1 - rank);
        both.arrive_and_wait();
      }
      if (round % 30 == 3) engine.unmask(1 - rank);
      task.low_latency(engine, round);
      views.at(round, rank) = task.missing();
    }
    engine.close();
  });
  EXPECT_LT(now_ns() - start, scaled_ns(8));
  for (int round = 0; round < kRounds; ++round) {
    EXPECT_EQ(views.at(round, 0) >> 1, views.at(round, 1)) << "round " << round << ": one of the two was alone";
    EXPECT_TRUE(round % 30 >= 3 || views.at(round, 0) == 2u) << round;
  }
}

/// Rounds side by side, until both count each other in again. @return their number, at most `most`
int rounds_until_unmasked(Engine& engine, Task& task, std::barrier<>& both, std::atomic<int>& unmasked, int most) {
  both.arrive_and_wait();
  const int before = unmasked;
  bool is_counted = false;
  for (int round = 1; round < most; ++round) {
    both.arrive_and_wait();
    if (unmasked == before + 2) return round;
    both.arrive_and_wait();
    task.low_latency(engine, round);
    if (!is_counted && masks_of(engine) == 0) is_counted = true, ++unmasked;
    std::this_thread::sleep_for(1ms);  // for the words
  }
  return most;
}

// Rank 1's question is about to be sent while the agreement about rank 0's is made: it must not arrive behind it, as a new
// question, which would take that agreement back on one side. The order is made by fault points, which builds for tests alone
// have.
TEST(MasksTest, AQuestionIsNotOvertakenByTheWordsAboutThePeers) {
  if (!core::kFaultPoints) GTEST_SKIP() << "this build has no fault points";
  const LocalGroup group(2);
  std::barrier both(2);
  std::atomic<int> unmasked = 0;
  core::set_fault("unmask.ask:1:*:delay=60");
  LocalGroup::run_threads(2, [&](int rank) {
    Engine engine = make_engine(group, rank, 5s);
    Task task(2, rank);
    for (int repeat = 0; repeat < 3; ++repeat) {
      both.arrive_and_wait();
      engine.mask(1 - rank);
      both.arrive_and_wait();
      if (rank == 0) std::this_thread::sleep_for(20ms);  // rank 1 has written its question down
      const std::int64_t start = now_ns();
      engine.unmask(1 - rank);
      std::this_thread::sleep_for(120ms);
      EXPECT_LT(rounds_until_unmasked(engine, task, both, unmasked, 50), 50) << "rank " << rank;
      EXPECT_LT(now_ns() - start, scaled_ns(2)) << "one waited for the other to the limit";
    }
    engine.close();
  });
  core::set_fault("");
}

// Who masks again closes what it has asked, and what it was asked: other questions are answered all the same.
// The order is made by fault points, which builds for tests alone have.
TEST(MasksTest, AQuestionThatWasTakenBackStandsInNobodysWay) {
  if (!core::kFaultPoints) GTEST_SKIP() << "this build has no fault points";
  const LocalGroup group(2);
  std::barrier both(2);
  std::atomic<int> unmasked = 0;
  LocalGroup::run_threads(2, [&](int rank) {
    Engine engine = make_engine(group, rank, 5s);
    Task task(2, rank);
    const auto begin = [&](const std::string& faults) {
      engine.mask(1 - rank);
      both.arrive_and_wait();
      if (rank == 0) core::set_fault(faults);
      both.arrive_and_wait();
    };
    const auto end = [&](const char* what) {
      EXPECT_LT(rounds_until_unmasked(engine, task, both, unmasked, 50), 50) << what << ", rank " << rank;
      if (rank == 0) core::set_fault("");
    };
    for (int repeat = 0; repeat < 4; ++repeat) {
      const int asker = repeat % 2, other = 1 - asker;
      // While the other is inside an op, which answers at its end; the other asks before it hears that nobody asks any more.
      begin(fmt::format("low_latency_dispatch.before_send:{}:*:delay=60,unmask.offered:{}:*:delay=60", other, asker));
      if (rank == asker) {
        std::this_thread::sleep_for(20ms);
        engine.unmask(other);
        engine.mask(other);
      }
      task.low_latency(engine, 0);
      both.arrive_and_wait();
      if (rank == other) engine.unmask(asker);
      end("taken back");
      // The other masks again while the asker thinks about its offer; the asker asks anew once it has heard of it.
      begin(fmt::format("unmask.offered:{}:*:delay=60", asker));
      if (rank == asker) engine.unmask(other);
      if (rank == other) std::this_thread::sleep_for(20ms), engine.mask(asker);
      both.arrive_and_wait();
      std::this_thread::sleep_for(90ms);
      if (rank == asker) engine.unmask(other);
      end("closed");
      // Rank 0 takes back the question for which rank 1 drops its own.
      begin("unmask.ask:1:*:delay=60");
      if (rank == 0) std::this_thread::sleep_for(20ms);
      engine.unmask(1 - rank);
      if (rank == 0) engine.mask(1);
      both.arrive_and_wait();
      end("crossed");
    }
    engine.close();
  });
}

// Rank 1 sleeps for more than the limit, hurries after the others, and all count each other in from one turn on.
TEST(MasksProcessTest, ASleeperIsMaskedAtTheLimitAndComesBackByAgreement) {
  if (!core::kFaultPoints) GTEST_SKIP() << "this build has no fault points";
  constexpr int kRanks = 3, kSleeper = 1, kRounds = 300, kWake = 60;
  // As much longer as the limits are, or the others end before the sleeper has given up on them.
  const auto step = std::chrono::nanoseconds(scaled_ns(0.003));
  for (const char* point :
       {"low_latency_dispatch.before_send", "low_latency_combine.mid_send", "low_latency_dispatch.in_recv"}) {
    SCOPED_TRACE(point);
    const Notes notes;
    const LocalGroup group(kRanks);
    const std::vector<int> status = LocalGroup::run_processes(kRanks, [&](int rank) {
      end_after(30);
      Note& note = notes[rank];
      note.pid = ::getpid();
      Engine engine = make_engine(group, rank, 200ms);
      Task task(kRanks, rank);
      task.low_latency(engine, 0);
      if (rank == kSleeper) core::set_fault(fmt::format("{}:{}:*:stop", point, rank));
      int missed = 0, last_missed = 0;
      for (int salt = 1; salt <= kRounds; ++salt) {
        task.low_latency(engine, salt);
        note.step = salt;
        if (task.missing() != 0) ++missed, last_missed = salt;
        if (rank != kSleeper) {
          if (rank == 0 && salt == kWake) {
            must(masks_of(engine) == 1u << kSleeper, "masks", static_cast<long long>(masks_of(engine)));
            ::kill(static_cast<pid_t>(notes[kSleeper].pid), SIGCONT);
          }
          std::this_thread::sleep_for(step);  // a decode step's computation; the sleeper skips it to catch up
        } else if (masks_of(engine) == 5 && notes[0].step <= salt + 1) {
          for (const int peer : {0, 2}) engine.unmask(peer);
          std::this_thread::sleep_for(step);
        } else if (masks_of(engine) != 5) {
          std::this_thread::sleep_for(step);
        }
      }
      must(missed > 0, "rounds in which somebody was missed", missed);
      must(last_missed < kRounds - 50, "last round in which somebody was missed", last_missed, kRounds - 50);
      must(masks_of(engine) == 0, "masks at the end", static_cast<long long>(masks_of(engine)), 0);
      engine.close();
    });
    EXPECT_THAT(status, testing::Each(0));
    if (HasFailure()) return;
  }
}

TEST(MasksTest, WhatAMaskedRankSendsAllTheSameIsNotTaken) {
  constexpr int kRanks = 2;
  const LocalGroup group(kRanks);
  LocalGroup::run_threads(kRanks, [&](int rank) {
    Engine engine = make_engine(group, rank, 100ms);
    Task task(kRanks, rank);
    task.low_latency(engine, 0);
    engine.barrier();
    if (rank == 0) engine.mask(1);
    for (int salt = 1; salt < 4; ++salt) {
      if (rank == 0) std::this_thread::sleep_for(20ms);  // so that rank 1's tokens lie there
      task.low_latency(engine, salt);
      EXPECT_TRUE(rank == 1 || task.missing() == 2u) << "round " << salt;
    }
    EXPECT_TRUE(rank == 0 || masks_of(engine) == 1u) << "a rank that is left out finds out at its limit";
    engine.close();
  });
}

TEST(MasksTest, UnmaskingARankThatIsGoneReturns) {
  const LocalGroup group(2);
  std::atomic<bool> gone = false;
  LocalGroup::run_threads(2, [&](int rank) {
    Engine engine = make_engine(group, rank, 100ms);
    Task task(2, rank);
    task.low_latency(engine, 0);
    if (rank == 1) {
      gone = true;
      return;  // without close(): "leaving"
    }
    wait_for([&] { return gone.load(); });
    task.low_latency(engine, 1);
    engine.unmask(1);
    EXPECT_EQ(masks_of(engine), 2u);
    task.low_latency(engine, 2);
    EXPECT_EQ(task.missing(), 2u);
    engine.close();
  });
}

}  // namespace
}  // namespace anyep::test
