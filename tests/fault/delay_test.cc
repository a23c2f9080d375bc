// F7, F8 and load: ranks that are late, everywhere, and more ranks than cores.
#include <anyep/engine.h>
#include <fmt/format.h>
#include <gmock/gmock.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/fault_point.h"
#include "fault/notes.h"
#include "fault/task.h"

namespace anyep::test {
namespace {

using namespace std::chrono_literals;

Engine make_engine(const LocalGroup& group, int rank, const Tuning& tuning = Task::tuning()) {
  const auto member = group.member(rank);
  return Engine::create(Task::budget(group.num_ranks()), Topology::discover(*member), tuning, *member);
}

/// Every rank's digests of some rounds.
std::vector<std::uint64_t> digests_of_threads(int num_ranks, int rounds) {
  std::vector<std::uint64_t> digests(static_cast<std::size_t>(num_ranks));
  const LocalGroup group(num_ranks);
  LocalGroup::run_threads(num_ranks, [&](int rank) {
    Engine engine = make_engine(group, rank);
    Task task(num_ranks, rank);
    std::uint64_t& digest = digests[static_cast<std::size_t>(rank)];
    for (int salt = 0; salt < rounds; ++salt) digest = digest * 31 + task.round(engine, salt);
    engine.close();
  });
  return digests;
}

std::vector<std::uint64_t> digests_of_processes(int num_ranks, int rounds) {
  const Notes notes;
  const LocalGroup group(num_ranks);
  const std::vector<int> status = LocalGroup::run_processes(num_ranks, [&](int rank) {
    end_after(60);
    Engine engine = make_engine(group, rank);
    Task task(num_ranks, rank);
    for (int salt = 0; salt < rounds; ++salt) notes[rank].word = notes[rank].word * 31 + task.round(engine, salt);
    engine.close();
  });
  EXPECT_THAT(status, testing::Each(0));
  std::vector<std::uint64_t> digests;
  for (int rank = 0; rank < num_ranks; ++rank) digests.push_back(notes[rank].word);
  return digests;
}

/// A delay at every point of every op, another one for each rank.
std::string random_delays(std::mt19937_64& random, int num_ranks, int most_ms) {
  std::string faults;
  for (const char* op : {"route", "dispatch", "combine", "low_latency_dispatch", "low_latency_combine", "barrier"}) {
    for (const char* phase : {"before_send", "mid_send", "after_flag", "in_recv"}) {
      for (int rank = 0; rank < num_ranks; ++rank) {
        const auto ms = static_cast<int>(random() % static_cast<unsigned>(most_ms + 1));
        faults += fmt::format("{}{}.{}:{}:*:delay={}", faults.empty() ? "" : ",", op, phase, rank, ms);
      }
    }
  }
  return faults;
}

class DelayTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!core::kFaultPoints) GTEST_SKIP() << "this build has no fault points";
  }
  void TearDown() override {
    if (core::kFaultPoints) core::set_fault("");
  }
};
class DelayProcessTest : public DelayTest {};

TEST_F(DelayTest, RandomDelaysAtEverySendAndReceiveChangeNoBit) {
  constexpr int kRanks = 3, kRounds = 2;
  std::mt19937_64 random(seed_of_test());
  const std::vector<std::uint64_t> undisturbed = digests_of_threads(kRanks, kRounds);
  for (int repeat = 0; repeat < 6 * times_soak(16); ++repeat) {
    core::set_fault(random_delays(random, kRanks, repeat % 2 == 0 ? 2 : 8));
    EXPECT_EQ(digests_of_threads(kRanks, kRounds), undisturbed) << "repeat " << repeat;
  }
}

TEST_F(DelayProcessTest, ProcessesGiveTheBitsOfThreadsUnderDelaysToo) {
  constexpr int kRanks = 4, kRounds = 2;
  std::mt19937_64 random(seed_of_test());
  const std::vector<std::uint64_t> undisturbed = digests_of_threads(kRanks, kRounds);
  EXPECT_EQ(digests_of_processes(kRanks, kRounds), undisturbed);
  for (int repeat = 0; repeat < 3 * times_soak(16); ++repeat) {
    core::set_fault(random_delays(random, kRanks, 5));
    EXPECT_EQ(digests_of_processes(kRanks, kRounds), undisturbed) << "repeat " << repeat;
  }
}

TEST_F(DelayTest, ARankThatIsLateInEveryOpHoldsUpButSpoilsNothing) {
  const std::vector<std::uint64_t> undisturbed = digests_of_threads(3, 2);
  core::set_fault("between:1:*:delay=60");
  EXPECT_EQ(digests_of_threads(3, 2), undisturbed);
}

TEST_F(DelayTest, TheFewestTurnsInFlightDoNotBlockRanksThatAreLateByTurns) {
  // Whole turns: the other ranks run ahead as far as their credit goes.
  const std::vector<std::uint64_t> undisturbed = digests_of_threads(4, 3);
  core::set_fault("combine.in_recv:0:*:delay=25,dispatch.in_recv:1:*:delay=25,combine.mid_send:2:*:delay=10");
  EXPECT_EQ(digests_of_threads(4, 3), undisturbed);
}

// ---- F8 --------------------------------------------------------------------------------------------------------------

/// Rank 1 of 3 comes `late` after the others; the start-up limit is one second. Errors by rank.
std::vector<std::optional<Error>> create_late(std::chrono::milliseconds late, std::vector<std::int64_t>& times) {
  std::vector<std::optional<Error>> errors(3);
  times.assign(3, 0);
  const LocalGroup group(3);
  LocalGroup::run_threads(3, [&](int rank) {
    const auto member = group.member(rank);
    const Topology topology = Topology::discover(*member);
    Tuning tuning = Task::tuning();
    tuning.startup_timeout = 1s;
    if (rank == 1) std::this_thread::sleep_for(late);
    const std::int64_t start = now_ns();
    try {
      Engine engine = Engine::create(Task::budget(3), topology, tuning, *member);
      Task(3, rank).round(engine, 1);
      engine.close();
    } catch (const Error& error) {
      errors[static_cast<std::size_t>(rank)] = error;
    }
    times[static_cast<std::size_t>(rank)] = now_ns() - start;
  });
  return errors;
}

TEST(LateStartTest, CreateWaitsForALateRank) {
  std::vector<std::int64_t> times;
  for (const auto& error : create_late(400ms, times)) EXPECT_FALSE(error) << error->what();
}

TEST(LateStartTest, ButNotLongerThanTheStartUpLimitAndSaysForWhom) {
  std::vector<std::int64_t> times;
  const std::vector<std::optional<Error>> errors = create_late(
      std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::nanoseconds(scaled_ns(1.3))), times);
  for (std::size_t rank = 0; rank < 3; ++rank) {
    ASSERT_TRUE(errors[rank]) << "rank " << rank;
    EXPECT_EQ(errors[rank]->code, ErrorCode::kTimeout) << errors[rank]->what();
    EXPECT_EQ(errors[rank]->op, "create");
    EXPECT_GE(times[rank], scaled_ns(0.99));
    EXPECT_LE(times[rank], scaled_ns(1.1) + 1'000'000'000);
    if (rank != 1) {
      EXPECT_THAT(errors[rank]->peers, testing::ElementsAre(1)) << errors[rank]->what();
    }
  }
}

// ---- more ranks than cores -------------------------------------------------------------------------------------------

TEST(CrowdTest, MoreRanksThanCoresHaveNoFalseTimeouts) {
  for (const int num_ranks : {8, 16}) {
    const std::int64_t start = now_ns();
    const LocalGroup group(num_ranks);
    LocalGroup::run_threads(num_ranks, [&](int rank) {
      const auto member = group.member(rank);
      // Default limits.
      Engine engine =
          Engine::create(Task::budget(num_ranks), Topology::discover(*member), Tuning::from_environment(), *member);
      Task task(num_ranks, rank);
      for (int salt = 0; salt < 40 * times_soak(20); ++salt) task.round(engine, salt);
      engine.close();
    });
    fmt::print("{} threads on {} cores: {:.0f} ms\n", num_ranks, std::thread::hardware_concurrency(),
               static_cast<double>(now_ns() - start) * 1e-6);
  }
}

TEST(CrowdProcessTest, MoreRanksThanCoresHaveNoFalseTimeouts) {
  for (const int num_ranks : {8, 16}) {
    const std::int64_t start = now_ns();
    const LocalGroup group(num_ranks);
    const std::vector<int> status = LocalGroup::run_processes(num_ranks, [&](int rank) {
      const auto member = group.member(rank);
      Engine engine =
          Engine::create(Task::budget(num_ranks), Topology::discover(*member), Tuning::from_environment(), *member);
      Task task(num_ranks, rank);
      for (int salt = 0; salt < 40 * times_soak(20); ++salt) task.round(engine, salt);
      engine.close();
    });
    EXPECT_THAT(status, testing::Each(0));
    fmt::print("{} processes on {} cores: {:.0f} ms\n", num_ranks, std::thread::hardware_concurrency(),
               static_cast<double>(now_ns() - start) * 1e-6);
  }
}

TEST(CrowdTest, TwoEnginesOfOneGroupAndTwoGroupsInOneProcessDoNotTouchEachOther) {
  const LocalGroup first(3), second(2);
  const auto body = [](const LocalGroup& group, int rank, int salt) {
    Engine one = make_engine(group, rank), two = make_engine(group, rank);
    Task a(group.num_ranks(), rank), b(group.num_ranks(), rank);
    for (int round = 0; round < 10; ++round) {
      a.round(one, salt + round);
      b.round(two, salt + 7 * round);
    }
    if (rank == 0) one.abandon("the first of two");
    EXPECT_THROW(a.round(one, 50), Error);
    b.round(two, 51);
    two.close();
  };
  std::thread other([&] { LocalGroup::run_threads(2, [&](int rank) { body(second, rank, 100); }); });
  LocalGroup::run_threads(3, [&](int rank) { body(first, rank, 0); });
  other.join();
}

TEST(CrowdTest, TwoEnginesAreUsedByTwoThreadsOfEachRankAtOnce) {
  const LocalGroup group(2);
  LocalGroup::run_threads(2, [&](int rank) {
    Engine one = make_engine(group, rank), two = make_engine(group, rank);
    std::thread other([&] {
      Task task(2, rank);
      for (int round = 0; round < 40; ++round) task.round(two, round);
    });
    Task task(2, rank);
    for (int round = 0; round < 40; ++round) task.round(one, 1000 - round);
    other.join();
    one.close();
    two.close();
  });
}

}  // namespace
}  // namespace anyep::test
