// How deaths show on the links; ranks as forked processes.
#include <gmock/gmock.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include <array>
#include <atomic>
#include <thread>

#include "tests/unit/control_world.h"
#include "tests/unit/thrown.h"

namespace anyep {
namespace {

using namespace test;
using control::Control;
using testing::ElementsAre;
using testing::HasSubstr;

/// Values that all ranks of a test see.
struct Shared {
  std::atomic<std::int64_t> killed_at_ns{0};
  std::array<std::atomic<pid_t>, 4> pids{};
};

class ControlProcess : public testing::Test {
 protected:
  void SetUp() override {
    void* const memory = ::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ASSERT_NE(memory, MAP_FAILED);
    shared_ = new (memory) Shared;
  }
  void TearDown() override { ::munmap(shared_, sizeof(Shared)); }

  static std::int64_t now_ns() { return std::chrono::nanoseconds(Clock::now().time_since_epoch()).count(); }
  void die() {
    shared_->killed_at_ns = now_ns();
    ::raise(SIGKILL);
  }
  std::int64_t ms_since_death() const { return (now_ns() - shared_->killed_at_ns) / 1'000'000; }

  Shared* shared_ = nullptr;
};

TEST_F(ControlProcess, RanksOfProcessesConnectExchangeAndTalk) {
  const LocalGroup group(4);
  run_world(4, [&](int rank) {
    Recorder recorder;
    shared_->pids[static_cast<std::size_t>(rank)] = ::getpid();
    const auto control = connect(group, rank);
    const std::array<std::byte, 1> mine = {static_cast<std::byte>(rank)};
    std::array<std::byte, 4> all{};
    control->all_gather(mine, all, in(20s));
    for (int peer = 0; peer < 4; ++peer) {
      EXPECT_EQ(all[static_cast<std::size_t>(peer)], static_cast<std::byte>(peer));
      EXPECT_EQ(control->same_process(peer), peer == rank);
      EXPECT_EQ(control->pid(peer), shared_->pids[static_cast<std::size_t>(peer)]);
    }
    control->start(recorder);
    control->tell_all(message(5, "hello"));
    for (int peer = 0; peer < 4; ++peer) {
      EXPECT_TRUE(peer == rank || recorder.wait_messages(peer, 1));
    }
    control->tell_all(message(6));
    for (int peer = 0; peer < 4; ++peer) {
      EXPECT_TRUE(peer == rank || recorder.wait_messages(peer, 2));
    }
  });
}

// The process descriptor would take about 20 ms for the memory alone, and a second for a real rank's.
TEST_F(ControlProcess, AKilledRankIsNoticedByItsMutexBeforeItsMemoryIsGone) {
  constexpr std::size_t kResidentBytes = 256U << 20;
  const LocalGroup group(3);
  run_world(3,
            [&](int rank) {
              Recorder recorder;
              const auto control = connect(group, rank);
              std::vector<char> resident;
              if (rank == 1) resident.assign(kResidentBytes, 1);
              meet_at(*control);
              control->start(recorder);
              std::this_thread::sleep_for(50ms);
              if (rank == 1) die();
              ASSERT_TRUE(recorder.wait_death(1));
              EXPECT_LT(ms_since_death(), 100);
              EXPECT_THAT(recorder.deaths(1), ElementsAre("robust mutex"));
              std::this_thread::sleep_for(300ms);  // descriptor and hang-up follow, and add nothing
              EXPECT_THAT(recorder.order(1), ElementsAre("death"));
              EXPECT_FALSE(control->tell(1, message(1)));
              const int other = 2 - rank;
              EXPECT_TRUE(recorder.deaths(other).empty());
              control->tell_all(message(1));
              EXPECT_TRUE(recorder.wait_messages(other, 1));
            },
            {1});
}

TEST_F(ControlProcess, WhatADeadRankHadSaidComesBeforeItsDeath) {
  const LocalGroup group(2);
  run_world(2,
            [&](int rank) {
              Recorder recorder;
              const auto control = connect(group, rank);
              control->start(recorder);
              if (rank == 1) {
                for (int number = 0; number < 100; ++number) control->tell(0, message(3));
                die();
              }
              ASSERT_TRUE(recorder.wait_death(1));
              EXPECT_EQ(recorder.messages(1).size(), 100U);
              EXPECT_EQ(recorder.order(1).back(), "death");
            },
            {1});
}

TEST_F(ControlProcess, AnExitWithoutStopIsADeath) {
  const LocalGroup group(2);
  run_world(2, [&](int rank) {
    Recorder recorder;
    const auto control = connect(group, rank);
    control->start(recorder);
    if (rank == 1) ::_exit(0);
    ASSERT_TRUE(recorder.wait_death(1, 1s));
    EXPECT_THAT(recorder.order(1), ElementsAre("death"));
  });
}

TEST_F(ControlProcess, AnOrderlyStopIsAHangUpAndTheLaterExitNoDeath) {
  const LocalGroup group(2);
  run_world(2, [&](int rank) {
    Recorder recorder;
    const auto control = connect(group, rank);
    control->start(recorder);
    if (rank == 1) {
      shared_->killed_at_ns = now_ns();
      control->tell_all(message(9, "leaving"));
      control->stop();
      std::this_thread::sleep_for(100ms);
      return;
    }
    ASSERT_TRUE(recorder.wait_hangup(1));
    EXPECT_LT(ms_since_death(), 90);
    std::this_thread::sleep_for(300ms);
    EXPECT_THAT(recorder.order(1), ElementsAre("message", "hang-up"));
  });
}

TEST_F(ControlProcess, AStoppedProcessIsNoDeathAndAnswersWhenItGoesOn) {
  const LocalGroup group(2);
  run_world(2, [&](int rank) {
    shared_->pids[static_cast<std::size_t>(rank)] = ::getpid();
    Recorder recorder;
    const auto control = connect(group, rank);
    control->start(recorder);
    if (rank == 1) {
      ASSERT_TRUE(recorder.wait_messages(0, 1));
      control->tell(0, message(2));
      EXPECT_TRUE(recorder.wait_messages(0, 2));
      return;
    }
    ::kill(shared_->pids[1], SIGSTOP);
    EXPECT_TRUE(control->tell(1, message(1)));
    std::this_thread::sleep_for(400ms);
    EXPECT_TRUE(recorder.order(1).empty());
    ::kill(shared_->pids[1], SIGCONT);
    EXPECT_TRUE(recorder.wait_messages(1, 1));
    control->tell(1, message(1));
    EXPECT_TRUE(recorder.deaths(1).empty());
  });
}

TEST_F(ControlProcess, ADeathBeforeStartIsSeenByTheProcessDescriptor) {
  const LocalGroup group(2);
  run_world(2,
            [&](int rank) {
              Recorder recorder;
              const auto control = connect(group, rank);
              meet_at(*control);
              if (rank == 0) control->start(recorder);
              if (rank == 1) {
                std::this_thread::sleep_for(50ms);
                die();
              }
              ASSERT_TRUE(recorder.wait_death(1, 1s));
              EXPECT_THAT(recorder.deaths(1), ElementsAre("pidfd"));
              std::this_thread::sleep_for(50ms);
              EXPECT_THAT(recorder.order(1), ElementsAre("death"));
            },
            {1});
}

TEST_F(ControlProcess, ADeathDuringSetUpIsNamed) {
  const LocalGroup group(3);
  run_world(3,
            [&](int rank) {
              const auto control = connect(group, rank);
              meet_at(*control);
              if (rank == 2) die();
              const Error error = thrown([&] { meet_at(*control); });
              EXPECT_EQ(error.code, ErrorCode::kPeerDead) << error.what();
              EXPECT_THAT(error.peers, ElementsAre(2));
              EXPECT_LT(ms_since_death(), 1000);
            },
            {2});
}

TEST_F(ControlProcess, ADeathDuringConnectIsNamed) {
  for (const int victim : {0, 1, 2}) {
    const LocalGroup group(3);
    run_world(3,
              [&](int rank) {
                Interrupted bootstrap(group.member(rank), [&] {
                  if (rank == victim) die();
                });
                const Error error = thrown([&] { Control::connect(bootstrap, "create", in(20s)); });
                EXPECT_EQ(error.code, ErrorCode::kPeerDead) << error.what();
                EXPECT_THAT(error.peers, ElementsAre(victim));
                EXPECT_LT(ms_since_death(), 1000);
              },
              {victim});
  }
}

// Rank 2 cannot open a single socket more when it comes to connect, and nobody has a link to it yet.
TEST_F(ControlProcess, ARankWithoutDescriptorsFailsTheConnectOnAllWithItsCause) {
  const LocalGroup group(3);
  run_world(3, [&](int rank) {
    rlimit before{};
    ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
    Interrupted bootstrap(group.member(rank), [&] {
      if (rank != 2) return;
      const int next = ::dup(0);
      ::close(next);
      const rlimit limit{static_cast<rlim_t>(next), before.rlim_max};
      ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &limit), 0);
    });
    const auto start = Clock::now();
    const Error error = thrown([&] { Control::connect(bootstrap, "create", in(20s)); });
    ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);  // sanitizers need descriptors
    EXPECT_EQ(error.code, ErrorCode::kResource) << error.what();
    EXPECT_THAT(error.what(), HasSubstr("Too many open files"));
    EXPECT_LT(since(start), 1s);
  });
}

// A child that the user forks holds copies of the links.
TEST_F(ControlProcess, AForkedChildHidesNeitherStopNorDeath) {
  const LocalGroup group(3);
  run_world(3,
            [&](int rank) {
              Recorder recorder;
              auto control = connect(group, rank);
              control->start(recorder);
              if (rank > 0) {
                const pid_t child = ::fork();
                if (child == 0) {
                  if (control->tell(0, message(99))) ::_exit(1);
                  ::usleep(500'000);
                  control.reset();  // must touch neither the links nor the life page
                  ::_exit(0);
                }
                std::this_thread::sleep_for(100ms);
                if (rank == 1) die();
                control->stop();
                int status = 0;
                ::waitpid(child, &status, 0);
                EXPECT_EQ(status, 0);
                return;
              }
              EXPECT_TRUE(recorder.wait_death(1));
              EXPECT_TRUE(recorder.wait_hangup(2));
              EXPECT_THAT(recorder.order(1), ElementsAre("death"));
              EXPECT_THAT(recorder.order(2), ElementsAre("hang-up"));
            },
            {1});
}

TEST_F(ControlProcess, AChildThatEndsDoesNotLookLikeItsParentsDeath) {
  const LocalGroup group(2);
  run_world(2, [&](int rank) {
    Recorder recorder;
    auto control = connect(group, rank);
    control->start(recorder);
    const pid_t child = ::fork();
    if (child == 0) {
      control.reset();
      ::_exit(0);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    EXPECT_EQ(status, 0);
    std::this_thread::sleep_for(150ms);
    control->tell_all(message(1));
    ASSERT_TRUE(recorder.wait_messages(1 - rank, 1));
    EXPECT_EQ(recorder.order(1 - rank).front(), "message");
  });
}

TEST_F(ControlProcess, SignalsOfTheProcessNeverRunOnTheWatcher) {
  const LocalGroup group(2);
  run_world(2, [&](int rank) {
    Recorder recorder;
    const auto control = connect(group, rank);
    control->start(recorder);
    static std::atomic<pid_t> handled_by;
    handled_by = 0;
    ::signal(SIGUSR1, [](int) { handled_by = ::gettid(); });
    sigset_t blocked;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &blocked, nullptr);
    ::kill(::getpid(), SIGUSR1);  // only the watcher could take it now
    std::this_thread::sleep_for(50ms);
    EXPECT_EQ(handled_by, 0);
    pthread_sigmask(SIG_UNBLOCK, &blocked, nullptr);
    EXPECT_EQ(handled_by, ::gettid());
    control->tell_all(message(1));
    EXPECT_TRUE(recorder.wait_messages(1 - rank, 1));
  });
}

TEST_F(ControlProcess, RoundsLeaveNothingBehind) {
  const LocalGroup group(3);
  run_world(3, [&](int rank) {
    const TemporaryFolder folder;
    const auto bootstrap = group.member(rank);
    const auto round = [&] {
      Recorder recorder;
      const auto control = Control::connect(*bootstrap, "create", in(20s));
      meet_at(*control);
      control->start(recorder);
    };
    round();
    const Holdings before;
    for (int repeat = 0; repeat < 100; ++repeat) round();
    EXPECT_EQ(Holdings(), before);
    EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
  });
}

}  // namespace
}  // namespace anyep
