// What a rank on a GPU learns when a peer dies, stops, stays away or does something else: a named error in time, and a context
// that still computes. One process per GPU.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <string>
#include <thread>

#include "support/gpu_rank.h"

namespace anyep::test {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using std::chrono::seconds;

/// What a child tells its parent.
struct Report {
  std::atomic<int> stage;  ///< exchanges done
  int code;                ///< -1 = no error
  int peers;               ///< bit mask
  int computes;            ///< after the error
  int rebuilt;             ///< the rest made a new group and exchanged
  double seconds;          ///< from the fault to the error
  char text[400];
};

/// Shared by the children and the test.
struct Board {
  Report rank[8];
  std::atomic<std::int64_t> fault_ns;  ///< when it happened
};

std::int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count();
}

class GpuFault : public testing::Test {
 protected:
  void SetUp() override {
    gpus_ = gpus_seen_by_a_child();
    if (gpus_ < 2) GTEST_SKIP() << "needs two GPUs, one process each; this machine has " << gpus_;
    board_ =
        static_cast<Board*>(mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    ASSERT_NE(board_, MAP_FAILED);
  }
  void TearDown() override {
    if (board_ != nullptr) munmap(board_, sizeof(Board));
  }

  using Body = std::function<void(GpuRank&, Report&)>;
  /// Two ranks; the survivor, rank 0, must end with an error and then rebuild alone.
  void play(milliseconds limit, const Body& survivor, const Body& other) {
    const LocalGroup group(2);
    children_ = {};
    for (int rank = 0; rank < 2; ++rank) {
      const pid_t child = fork();
      ASSERT_GE(child, 0);
      if (child == 0) {
        run(group, rank, limit, rank == 0 ? survivor : other);
        _exit(0);
      }
      children_.push_back(child);
    }
  }
  void run(const LocalGroup& group, int rank, milliseconds limit, const Body& body) {
    Report& report = board_->rank[rank];
    report.code = -1;
    try {
      const auto bootstrap = group.member(rank);
      GpuRank me(*bootstrap, limit, gpus_);
      try {
        body(me, report);
      } catch (const Error& error) {
        report.seconds = static_cast<double>(now_ns() - board_->fault_ns.load()) * 1e-9;
        report.code = static_cast<int>(error.code);
        for (const int peer : error.peers) report.peers |= 1 << peer;
        snprintf(report.text, sizeof(report.text), "%s", error.what());
        report.computes = me.computes();
        try {
          me.engine().close();
        } catch (const Error&) {
        }
        me.forget();
        const std::vector<int> gone = {1 - rank};
        const auto alone = group.member_without(rank, gone);
        GpuRank again(*alone, seconds(10), gpus_);
        report.rebuilt = again.exchange().empty();
        again.engine().close();
      }
    } catch (const std::exception& error) {
      snprintf(report.text, sizeof(report.text), "outside the exchange: %s", error.what());
      report.code = -2;
    }
  }
  void wait_for_exchanges(int count) const {
    const auto until = Clock::now() + seconds(60);
    while (board_->rank[0].stage < count || board_->rank[1].stage < count) {
      if (Clock::now() > until || board_->rank[0].code == -2) break;
      std::this_thread::sleep_for(milliseconds(2));
    }
  }
  void kill_rank(int rank, int signal) {
    board_->fault_ns = now_ns();
    kill(children_[static_cast<std::size_t>(rank)], signal);
  }
  void join(int rank) {
    int status = 0;
    const auto until = Clock::now() + seconds(60);
    pid_t got = 0;
    while ((got = waitpid(children_[static_cast<std::size_t>(rank)], &status, WNOHANG)) == 0) {
      if (Clock::now() > until) {
        ADD_FAILURE() << "rank " << rank << " does not end";
        kill(children_[static_cast<std::size_t>(rank)], SIGKILL);
        waitpid(children_[static_cast<std::size_t>(rank)], &status, 0);
        return;
      }
      std::this_thread::sleep_for(milliseconds(5));
    }
  }
  void expect_error(int rank, ErrorCode code, int peers, double most_seconds) {
    const Report& report = board_->rank[rank];
    EXPECT_EQ(report.code, static_cast<int>(code)) << report.text;
    EXPECT_EQ(report.peers, peers) << report.text;
    EXPECT_LT(report.seconds, most_seconds) << report.text;
    EXPECT_EQ(report.computes, 1) << report.text;
    EXPECT_EQ(report.rebuilt, 1) << report.text;
    printf("  %.3f s: %s\n", report.seconds, report.text);
  }

  static void exchange_for_ever(GpuRank& me, Report& report) {
    for (;;) {
      const std::string wrong = me.exchange();
      if (!wrong.empty()) throw std::runtime_error(wrong);
      ++report.stage;
    }
  }

  int gpus_ = 0;
  Board* board_ = nullptr;
  std::vector<pid_t> children_;
};

TEST_F(GpuFault, KilledPeerIsNamedInTime) {
  play(seconds(30), exchange_for_ever, exchange_for_ever);
  wait_for_exchanges(20);
  kill_rank(1, SIGKILL);
  join(1);
  join(0);
  expect_error(0, ErrorCode::kPeerDead, 1 << 1, 2.0);
}

/// Its kernels are storing into the survivor at that moment.
TEST_F(GpuFault, PeerThatKillsItselfBehindALaunchIsNamedInTime) {
  play(seconds(30), exchange_for_ever, [this](GpuRank& me, Report& report) {
    for (int i = 0; i < 10; ++i, ++report.stage) (void)me.exchange();
    me.launch();
    board_->fault_ns = now_ns();
    raise(SIGKILL);
  });
  join(1);
  join(0);
  expect_error(0, ErrorCode::kPeerDead, 1 << 1, 2.0);
}

TEST_F(GpuFault, StoppedPeerIsATimeoutThatNamesIt) {
  play(milliseconds(1500), exchange_for_ever, exchange_for_ever);
  wait_for_exchanges(20);
  kill_rank(1, SIGSTOP);
  join(0);
  kill(children_[1], SIGKILL);
  join(1);
  expect_error(0, ErrorCode::kTimeout, 1 << 1, 3.5);
}

TEST_F(GpuFault, PeerThatStaysAwayIsATimeoutThatNamesIt) {
  play(
      milliseconds(1500),
      [this](GpuRank& me, Report&) {
        (void)me.exchange();
        board_->fault_ns = now_ns();
        (void)me.exchange();
      },
      [](GpuRank& me, Report&) {
        (void)me.exchange();
        std::this_thread::sleep_for(seconds(6));
      });
  join(0);
  kill(children_[1], SIGKILL);
  join(1);
  expect_error(0, ErrorCode::kTimeout, 1 << 1, 3.0);
}

TEST_F(GpuFault, AnotherCallAtThisPlaceIsAMismatchOnBothSides) {
  const auto first = [this](GpuRank& me, Report&) {
    (void)me.exchange();
    board_->fault_ns = now_ns();
    (void)me.exchange();
  };
  const auto other = [this](GpuRank& me, Report&) {
    (void)me.exchange();
    board_->fault_ns = now_ns();
    me.launch_combine();
    (void)me.finish();
    throw std::runtime_error("no error");
  };
  play(seconds(20), first, other);
  join(0);
  join(1);
  EXPECT_EQ(board_->rank[0].code, static_cast<int>(ErrorCode::kMismatch)) << board_->rank[0].text;
  EXPECT_EQ(board_->rank[1].code, static_cast<int>(ErrorCode::kMismatch)) << board_->rank[1].text;
  EXPECT_LT(board_->rank[0].seconds, 3.0);
  EXPECT_EQ(board_->rank[0].computes, 1);
  printf("  %s\n  %s\n", board_->rank[0].text, board_->rank[1].text);
}

}  // namespace
}  // namespace anyep::test
