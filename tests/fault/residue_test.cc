// F19: engines come and go, ranks are killed, and nothing stays behind.
#include <anyep/engine.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "fault/belongings.h"
#include "fault/notes.h"
#include "fault/task.h"

namespace anyep::test {
namespace {

/// Temporary files of one test, so that others that run beside it do not count.
class OwnTemporaryFolder {
 public:
  OwnTemporaryFolder() {
    if (const char* const given = ::getenv("TMPDIR")) before_ = given;
    std::string name = "/tmp/anyep-test-XXXXXX";
    path_ = ::mkdtemp(name.data());
    ::setenv("TMPDIR", path_.c_str(), 1);
  }
  ~OwnTemporaryFolder() {
    before_ ? ::setenv("TMPDIR", before_->c_str(), 1) : ::unsetenv("TMPDIR");
    std::error_code none;
    std::filesystem::remove_all(path_, none);
  }

 private:
  std::optional<std::string> before_;
  std::string path_;
};

/// Small: the rounds are many.
Budget small_budget() {
  Budget budget;
  budget.rows_bytes = 64 << 10;
  budget.low_latency_bytes = 64 << 10;
  budget.max_experts = 8;
  return budget;
}

Engine make_engine(Bootstrap& member) {
  return Engine::create(small_budget(), Topology::discover(member), Task::tuning(), member);
}

void create_and_close(const LocalGroup& group, int rank, int rounds) {
  const auto member = group.member(rank);
  for (int round = 0; round < rounds; ++round) {
    Engine engine = make_engine(*member);
    if (round % 4 == 0) engine.barrier();
    if (round % 4 != 1) engine.close();  // else the destructor, while others may still be in create
  }
}

TEST(ResidueTest, AThousandEnginesOfThreadsLeaveNothing) {
  const OwnTemporaryFolder folder;
  const int rounds = 700 * times_soak(2);
  const LocalGroup group(2);
  const auto run = [&](int count) {
    LocalGroup::run_threads(2, [&](int rank) { create_and_close(group, rank, count); });
  };
  run(5);
  const Belongings before = Belongings::now();
  const std::int64_t start = now_ns();
  run(rounds);
  fmt::print("{} rounds of 2 threads: {:.2f} ms each\n", rounds,
             static_cast<double>(now_ns() - start) * 1e-6 / static_cast<double>(rounds));
  EXPECT_EQ(Belongings::settled(before).more_than(before), "");
}

TEST(ResidueProcessTest, HundredsOfEnginesOfProcessesLeaveNothing) {
  const OwnTemporaryFolder folder;
  const int rounds = 300 * times_soak(7);
  const LocalGroup group(3);
  const std::vector<int> status = LocalGroup::run_processes(3, [&](int rank) {
    end_after(60.0 * times_soak(10));
    create_and_close(group, rank, 5);
    const Belongings before = Belongings::now();
    const std::int64_t start = now_ns();
    create_and_close(group, rank, rounds);
    if (rank == 0) {
      fmt::print("{} rounds of 3 processes: {:.2f} ms each\n", rounds,
                 static_cast<double>(now_ns() - start) * 1e-6 / static_cast<double>(rounds));
    }
    // Doors of ranks that are still at work may be open.
    Belongings after = Belongings::settled(before);
    after.names = before.names;
    const std::string more = after.more_than(before);
    must(more.empty(), more.c_str());
  });
  EXPECT_THAT(status, testing::Each(0));
  EXPECT_EQ(Belongings::now().names, 0u) << "names in the temporary folder";
}

/// Rounds with work, until a peer is dead; then an engine of the others.
void outlive(const LocalGroup& group, int rank, int victim) {
  const std::vector<int> gone = {victim};
  try {
    const auto member = group.member(rank);
    const int ranks = group.num_ranks();
    Engine engine = Engine::create(Task::budget(ranks), Topology::discover(*member), Task::tuning(), *member);
    Task task(ranks, rank);
    for (int salt = 0;; ++salt) task.round(engine, salt);
  } catch (const Error& error) {
    must(error.code == ErrorCode::kPeerDead, error.what());
  }
  const auto member = group.member_without(rank, gone);
  Engine engine =
      Engine::create(Task::budget(group.num_ranks() - 1), Topology::discover(*member), Task::tuning(), *member);
  Task(group.num_ranks() - 1, member->rank()).round(engine, 1);
  engine.close();
}

TEST(ResidueProcessTest, KilledRanksLeaveNothingEither) {
  const OwnTemporaryFolder folder;
  std::mt19937_64 random(seed_of_test());
  constexpr int kRanks = 3;
  const int rounds = 12 * times_soak(17);
  for (int round = 0; round < rounds; ++round) {
    const auto victim = static_cast<int>(random() % kRanks);
    const std::chrono::microseconds delay(random() % 12'000);  // create takes a few milliseconds of it
    SCOPED_TRACE(fmt::format("rank {} after {} us", victim, delay.count()));
    const LocalGroup group(kRanks);
    const std::vector<int> status = LocalGroup::run_processes(kRanks, [&](int rank) {
      end_after(30);
      const auto claim = group.member(rank);  // a rank that never came is not known to be dead
      if (rank == victim) {
        std::thread([&] {
          std::this_thread::sleep_for(delay);
          ::kill(::getpid(), SIGKILL);
        }).detach();
      }
      const Belongings before = Belongings::now();
      outlive(group, rank, victim);
      Belongings after = Belongings::settled(before);
      after.names = before.names;
      const std::string more = after.more_than(before);
      must(more.empty(), more.c_str());
      while (rank == victim) ::pause();
    });
    for (int rank = 0; rank < kRanks; ++rank) {
      EXPECT_TRUE(rank == victim || status[static_cast<std::size_t>(rank)] == 0) << "rank " << rank;
    }
    EXPECT_EQ(Belongings::now().names, 0u) << "names in the temporary folder";
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace anyep::test
