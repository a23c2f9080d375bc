// LocalGroup with ranks as forked processes, and how deaths show there.
#include <gmock/gmock.h>
#include <signal.h>
#include <sys/mman.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "bootstrap/memfd.h"
#include "bootstrap/process.h"
#include "tests/unit/bootstrap_world.h"
#include "tests/unit/thrown.h"

namespace anyep {
namespace {

using namespace test;
using testing::ElementsAre;
using testing::HasSubstr;

int gather_sum(Bootstrap& bootstrap, int mine, Deadline deadline) {
  std::vector<int> all(static_cast<std::size_t>(bootstrap.num_ranks()));
  bootstrap.all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(all)), deadline);
  int sum = 0;
  for (const int value : all) sum += value;
  return sum;
}

TEST(BootstrapProcess, RanksGatherAcrossProcesses) {
  const LocalGroup group(4);
  run_world(4, [&](int rank) {
    const auto bootstrap = group.member(rank);
    for (int round = 0; round < 50; ++round) EXPECT_EQ(gather_sum(*bootstrap, rank + round, in(20s)), 6 + 4 * round);
    std::vector<std::byte> mine(10000, static_cast<std::byte>(rank)), all(40000);
    bootstrap->all_gather(mine, all, in(20s));
    for (std::size_t at = 0; at < all.size(); ++at) ASSERT_EQ(all[at], static_cast<std::byte>(at / 10000));
  });
}

TEST(BootstrapProcess, AKilledRankIsNamedSoonAndTheRestGoOn) {
  const LocalGroup group(4);
  run_world(4,
            [&](int rank) {
              const auto bootstrap = group.member(rank);
              EXPECT_EQ(gather_sum(*bootstrap, 1, in(20s)), 4);
              if (rank == 2) ::raise(SIGKILL);
              const auto start = Clock::now();
              const Error error = thrown([&] { gather_sum(*bootstrap, 1, in(30s)); });
              EXPECT_EQ(error.code, ErrorCode::kPeerDead) << error.what();
              EXPECT_THAT(error.peers, ElementsAre(2));
              EXPECT_LT(since(start), 1s);
              const std::vector<int> gone = {2};
              const auto rest = group.member_without(rank, gone);
              EXPECT_EQ(gather_sum(*rest, rest->rank(), in(20s)), 3);
            },
            {2});
}

TEST(BootstrapProcess, ARankKilledBetweenTwoMembersIsNamedToo) {
  const LocalGroup group(3);
  run_world(3,
            [&](int rank) {
              EXPECT_EQ(gather_sum(*group.member(rank), 1, in(20s)), 3);
              if (rank == 2) ::raise(SIGKILL);  // as a survivor on its way from a failed engine to a new one
              const auto start = Clock::now();
              const auto bootstrap = group.member(rank);
              const Error error = thrown([&] { gather_sum(*bootstrap, 1, in(30s)); });
              EXPECT_EQ(error.code, ErrorCode::kPeerDead) << error.what();
              EXPECT_THAT(error.peers, ElementsAre(2));
              EXPECT_LT(since(start), 4s);
            },
            {2});
}

TEST(BootstrapProcess, AllDeadRanksAreNamed) {
  const LocalGroup group(3);
  run_world(3,
            [&](int rank) {
              const auto bootstrap = group.member(rank);
              EXPECT_EQ(gather_sum(*bootstrap, 1, in(20s)), 3);
              if (rank > 0) ::raise(SIGKILL);
              std::this_thread::sleep_for(200ms);
              const Error error = thrown([&] { gather_sum(*bootstrap, 1, in(30s)); });
              EXPECT_THAT(error.peers, ElementsAre(1, 2));
              const std::vector<int> gone = {1, 2};
              EXPECT_EQ(gather_sum(*group.member_without(rank, gone), 5, in(1s)), 5);
            },
            {1, 2});
}

TEST(BootstrapProcess, AStoppedRankIsATimeoutAndNoDeath) {
  const LocalGroup group(2);
  std::atomic<pid_t>* const pid =
      new (::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)) std::atomic<pid_t>(0);
  run_world(2, [&](int rank) {
    const auto bootstrap = group.member(rank);
    if (rank == 1) *pid = ::getpid();
    gather_sum(*bootstrap, 1, in(20s));
    if (rank == 1) {
      ::raise(SIGSTOP);
      return;
    }
    const Error error = thrown([&] { gather_sum(*bootstrap, 1, in(200ms)); });
    EXPECT_EQ(error.code, ErrorCode::kTimeout) << error.what();
    ::kill(*pid, SIGCONT);
  });
  ::munmap(pid, 4096);
}

TEST(BootstrapProcess, TwoProcessesThatClaimOneRankAreNamedOnAllRanks) {
  const LocalGroup group(3);
  run_world(4, [&](int index) {
    const int rank = index == 3 ? 1 : index;  // the fourth process claims rank 1 too
    const Error error = thrown([&] {
      const auto bootstrap = group.member(rank);
      // The first of the two holds its claim until the other has come.
      if (index == 1 || index == 3) std::this_thread::sleep_for(300ms);
      gather_sum(*bootstrap, 1, in(10s));
    });
    EXPECT_EQ(error.code, ErrorCode::kMismatch) << error.what();
    EXPECT_THAT(error.what(), HasSubstr("both claim rank 1"));
    EXPECT_THAT(error.peers, ElementsAre(1));
  });
}

TEST(BootstrapProcess, AGroupMayBeUsedAgainByLaterProcesses) {
  const LocalGroup group(3);
  for (int repeat = 0; repeat < 3; ++repeat) {
    run_world(3, [&](int rank) {
      if (rank == repeat) std::this_thread::sleep_for(100ms);  // the others see only processes that have ended
      EXPECT_EQ(gather_sum(*group.member(rank), rank, in(20s)), 3);
    });
  }
}

TEST(BootstrapProcess, ARankMayBeTakenOverFromADeadProcess) {
  const LocalGroup group(2);
  run_world(2,
            [&](int rank) {
              const auto bootstrap = group.member(rank);
              gather_sum(*bootstrap, 1, in(20s));
              ::raise(SIGKILL);
            },
            {0, 1});
  std::atomic<int>* const taken =
      new (::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)) std::atomic<int>(0);
  run_world(2, [&](int rank) {
    const auto bootstrap = group.member(rank);
    // A rank whose process has died counts as dead until another one takes its place.
    for (++*taken; *taken < 2;) std::this_thread::yield();
    EXPECT_EQ(gather_sum(*bootstrap, rank, in(20s)), 1);
  });
  ::munmap(taken, 4096);
}

TEST(BootstrapProcess, AMemberMadeBeforeForkIsRefusedInTheChild) {
  const LocalGroup group(2);
  const auto mine = group.member(0);
  run_world(1, [&](int) { EXPECT_EQ(thrown([&] { gather_sum(*mine, 1, in(1s)); }).code, ErrorCode::kState); });
}

TEST(BootstrapProcess, ExitStatusesTellExceptionsAndSignals) {
  const std::vector<int> ended = LocalGroup::run_processes(3, [](int rank) {
    if (rank == 1) {
      std::fclose(stderr);  // its line would only irritate
      throw std::runtime_error("on purpose");
    }
    if (rank == 2) ::raise(SIGKILL);
  });
  EXPECT_EQ(ended[0], 0);
  EXPECT_TRUE(WIFEXITED(ended[1]) && WEXITSTATUS(ended[1]) == 1);
  EXPECT_TRUE(WIFSIGNALED(ended[2]) && WTERMSIG(ended[2]) == SIGKILL);
}

TEST(BootstrapProcess, AProcessIsToldFromALaterOneWithItsPid) {
  using namespace bootstrap;
  UniqueFd pidfd;
  ProcessId self = ProcessId::of_this_process();
  ASSERT_GT(self.start_ticks, 0U);
  EXPECT_EQ(look_up(self, pidfd), Life::kAlive);
  EXPECT_FALSE(has_exited(pidfd.get()));
  ++self.start_ticks;
  EXPECT_EQ(look_up(self, pidfd), Life::kDead);
}

TEST(BootstrapMemfd, OnlySealedMemfdsOfEnoughBytesPass) {
  using namespace bootstrap;
  const UniqueFd good = make_memfd("anyep-test", 8192);
  EXPECT_NO_THROW(check_memfd(good.get(), 8192));
  EXPECT_NE(::ftruncate(good.get(), 4096), 0);
  EXPECT_NE(::ftruncate(good.get(), 16384), 0);
  EXPECT_EQ(thrown([&] { check_memfd(good.get(), 8193); }).code, ErrorCode::kCorrupt);
  const UniqueFd open = make_memfd("anyep-test", 8192, Seals::kNone);
  EXPECT_THAT(thrown([&] { check_memfd(open.get(), 1); }).what(),
              HasSubstr("descriptor is no sealed memfd of at least 1 bytes"));
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  const UniqueFd in_end(ends[0]), out_end(ends[1]);
  EXPECT_EQ(thrown([&] { check_memfd(in_end.get(), 0); }).code, ErrorCode::kCorrupt);
  EXPECT_EQ(thrown([&] { check_memfd(-1, 0); }).code, ErrorCode::kCorrupt);
}

TEST(BootstrapMemfd, FutureWritesCanBeSealedOffWhileTheOwnerGoesOnWriting) {
  using namespace bootstrap;
  const UniqueFd memory = make_memfd("anyep-test", 4096, Seals::kSizeKeepOpen);
  void* const mine = ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, memory.get(), 0);
  ASSERT_NE(mine, MAP_FAILED);
  ASSERT_TRUE(seal_future_writes(memory.get()));
  EXPECT_EQ(::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, memory.get(), 0), MAP_FAILED);
  void* const view = ::mmap(nullptr, 4096, PROT_READ, MAP_SHARED, memory.get(), 0);
  ASSERT_NE(view, MAP_FAILED);
  *static_cast<int*>(mine) = 42;
  EXPECT_EQ(*static_cast<const int*>(view), 42);
  ::munmap(mine, 4096);
  ::munmap(view, 4096);
}

}  // namespace
}  // namespace anyep
