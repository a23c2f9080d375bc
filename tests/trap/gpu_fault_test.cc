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
#include <climits>
#include <functional>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "support/gpu_rank.h"
#include "support/stream_graph.h"

namespace anyep::test {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using std::chrono::seconds;

/// What the ranks do over and over.
enum class Way { kCalls, kGraphs, kPairs, kHooks, kPairGraphs };

/// Once, on one rank.
class Exchange {
 public:
  /// Collective where graphs are captured.
  Exchange(GpuRank& me, Way way) : me_(me), way_(way) {
    if (way_ == Way::kGraphs) me_.take_worst_case_rows();
    if (way_ == Way::kGraphs || way_ == Way::kPairGraphs) {
      graph_.emplace(me_.stream(), [this] {
        for (int i = 0; i < kInOneGraph; ++i) {
          way_ == Way::kGraphs ? me_.launch_without_host() : me_.launch_pair(GpuRank::Halves::kTogether);
        }
      });
    }
  }
  void launch() {
    if (graph_) return graph_->replay();
    if (way_ == Way::kCalls) return me_.launch();
    me_.launch_pair(way_ == Way::kHooks ? GpuRank::Halves::kByHooks : GpuRank::Halves::kTogether);
  }
  /// @throws Error the engine's
  void finish() {
    if (graph_) {
      anyep::test::finish(me_.stream());
      me_.engine().check();
    }
    const std::string wrong = way_ == Way::kCalls    ? me_.finish()
                              : way_ == Way::kGraphs ? me_.compare()
                              : graph_               ? me_.compare_pair()
                                                     : me_.finish_pair();
    if (!wrong.empty()) throw std::runtime_error(wrong);
  }
  void operator()() {
    launch();
    finish();
  }

 private:
  static constexpr int kInOneGraph = 5;
  GpuRank& me_;
  Way way_;
  std::optional<StreamGraph> graph_;
};

/// What a child tells its parent.
struct Report {
  std::atomic<int> stage;  ///< exchanges done
  int code;                ///< -1 = no error
  int peers;               ///< bit mask
  int computes;            ///< after the error
  int rebuilt;             ///< the rest made a new group and exchanged
  std::atomic<bool> masked;
  int right;       ///< pairs without the masked peer
  double seconds;  ///< from the fault to the error
  char text[1000];
};

/// Shared by the children and the test.
struct Board {
  Report rank[8];
  std::atomic<std::int64_t> fault_ns;  ///< when it happened
  std::atomic<int> last_stage;         ///< after so many all stop
};

std::int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count();
}

struct Case {
  int ranks;
  Way way;
  /// Of masks: a dead peer costs its tokens only.
  bool masks = false;
};

class GpuFault : public testing::TestWithParam<Case> {
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

  /// The last rank; the others must end with an error that names it, and then exchange without it.
  int victim() const { return GetParam().ranks - 1; }
  /// Processes that share a GPU take turns by time slices, milliseconds each: limits are longer and no latency is judged.
  bool shared() const { return GetParam().ranks > gpus_; }
  milliseconds limit(milliseconds alone) const { return shared() ? 10 * alone : alone; }

  using Body = std::function<void(GpuRank&, Exchange&, Report&)>;
  void play(milliseconds limit, const Body& survivor, const Body& other) {
    const LocalGroup group(GetParam().ranks);
    for (int rank = 0; rank <= victim(); ++rank) {
      const pid_t child = fork();
      ASSERT_GE(child, 0);
      if (child == 0) {
        run(group, rank, limit, rank == victim() ? other : survivor);
        _exit(0);
      }
      children_.push_back(child);
    }
  }
  void run(const LocalGroup& group, int rank, milliseconds limit, const Body& body) {
    Report& report = board_->rank[rank];
    report.code = -1;
    const Way way = GetParam().way;
    const auto serves = GetParam().masks                            ? GpuRank::Serves::kPairsWithMasks
                        : way == Way::kCalls || way == Way::kGraphs ? GpuRank::Serves::kExchanges
                                                                    : GpuRank::Serves::kPairs;
    try {
      const auto bootstrap = group.member(rank);
      GpuRank me(*bootstrap, limit, gpus_, serves);
      try {
        Exchange exchange(me, way);
        body(me, exchange, report);
      } catch (const Error& error) {
        report.seconds = static_cast<double>(now_ns() - board_->fault_ns.load()) * 1e-9;
        report.code = static_cast<int>(error.code);
        for (const int peer : error.peers) report.peers |= 1 << peer;
        snprintf(report.text, sizeof(report.text), "%s", error.what());
        report.computes = me.computes();
        if (rank == victim()) return;
        try {
          me.engine().close();
        } catch (const Error&) {
        }
        me.forget();
        const std::vector<int> gone = {victim()};
        const auto rest = group.member_without(rank, gone);
        GpuRank again(*rest, this->limit(seconds(10)), gpus_, serves);
        Exchange(again, way)();
        report.rebuilt = 1;
        again.engine().close();
      }
    } catch (const std::exception& error) {
      const std::string before = report.text;
      snprintf(report.text, sizeof(report.text), "outside the exchange: %s; before: %s", error.what(), before.c_str());
      report.code = -2;
    }
  }
  template <class Done>
  static void wait_until(const Done& done) {
    const auto until = Clock::now() + seconds(60);
    while (!done() && Clock::now() < until) std::this_thread::sleep_for(milliseconds(1));
  }
  void wait_for_exchanges(int count) const {
    for (int rank = 0; rank <= victim(); ++rank) {
      const Report& report = board_->rank[rank];
      wait_until([&] { return report.stage >= count || report.code == -2; });
    }
  }
  void signal_victim(int signal) {
    board_->fault_ns = now_ns();
    kill(children_[static_cast<std::size_t>(victim())], signal);
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
  void join_survivors() {
    for (int rank = 0; rank < victim(); ++rank) join(rank);
  }
  void end_victim() {
    kill(children_[static_cast<std::size_t>(victim())], SIGKILL);
    join(victim());
  }
  void expect_victim_named(ErrorCode code, double most_seconds) {
    for (int rank = 0; rank < victim(); ++rank) {
      const Report& report = board_->rank[rank];
      EXPECT_EQ(report.code, static_cast<int>(code)) << report.text;
      EXPECT_EQ(report.peers, 1 << victim()) << report.text;
      if (!shared()) {
        EXPECT_LT(report.seconds, most_seconds) << report.text;
      }
      EXPECT_EQ(report.computes, 1) << report.text;
      EXPECT_EQ(report.rebuilt, 1) << report.text;
      printf("  rank %d, %.3f s: %s\n", rank, report.seconds, report.text);
    }
  }

  static void exchange_for_ever(GpuRank&, Exchange& exchange, Report& report) {
    for (;; ++report.stage) exchange();
  }

  int gpus_ = 0;
  Board* board_ = nullptr;
  std::vector<pid_t> children_;
};

using GpuKill = GpuFault;

TEST_P(GpuKill, PeerIsNamedInTime) {
  play(limit(seconds(30)), exchange_for_ever, exchange_for_ever);
  wait_for_exchanges(shared() ? 2 : 20);
  signal_victim(SIGKILL);
  join(victim());
  join_survivors();
  expect_victim_named(ErrorCode::kPeerDead, 2.0);
}

/// Its kernels are storing into the survivors at that moment.
TEST_P(GpuKill, PeerThatKillsItselfBehindALaunchIsNamedInTime) {
  play(limit(seconds(30)), exchange_for_ever, [this](GpuRank&, Exchange& exchange, Report& report) {
    for (int i = 0; i < (shared() ? 2 : 10); ++i, ++report.stage) exchange();
    exchange.launch();
    board_->fault_ns = now_ns();
    raise(SIGKILL);
  });
  join(victim());
  join_survivors();
  expect_victim_named(ErrorCode::kPeerDead, 2.0);
}

using GpuStop = GpuFault;

TEST_P(GpuStop, PeerIsATimeoutThatNamesIt) {
  play(limit(milliseconds(1500)), exchange_for_ever, exchange_for_ever);
  wait_for_exchanges(shared() ? 2 : 20);
  signal_victim(SIGSTOP);
  join_survivors();
  end_victim();
  expect_victim_named(ErrorCode::kTimeout, 3.5);
}

using GpuMask = GpuFault;

/// Pairs go on; once the peer is masked they are right, without its experts.
TEST_P(GpuMask, ADeadPeerCostsItsTokensOnly) {
  const auto survivor = [this](GpuRank& me, Exchange& exchange, Report& report) {
    const TensorView masks = me.new_tensor(DType::kI32, {GetParam().ranks});
    const auto victim_is_masked = [&] {
      std::vector<std::int32_t> masked(static_cast<std::size_t>(GetParam().ranks));
      me.engine().masks(masks, {me.stream()});
      must(cudaMemcpyAsync(masked.data(), masks.data, masked.size() * 4, cudaMemcpyDeviceToHost, me.stream()));
      must(cudaStreamSynchronize(me.stream()));
      return masked[static_cast<std::size_t>(victim())] != 0;
    };
    const auto pair_without = [&](unsigned gone) {
      exchange.launch();
      finish(me.stream());
      me.engine().check();
      ++report.stage;
      return me.compare_pair(gone);
    };
    while (!victim_is_masked()) (void)pair_without(0);
    report.seconds = static_cast<double>(now_ns() - board_->fault_ns.load()) * 1e-9;
    report.masked = true;
    while (report.stage < board_->last_stage) {
      const std::string wrong = pair_without(1u << victim());
      if (!wrong.empty()) throw std::runtime_error("masked, " + wrong);
      ++report.right;
    }
    me.engine().close();
  };
  board_->last_stage = INT_MAX;
  play(limit(seconds(5)), survivor, exchange_for_ever);
  wait_for_exchanges(shared() ? 2 : 20);
  EXPECT_EQ(board_->rank[victim()].code, -1) << board_->rank[victim()].text;
  signal_victim(SIGKILL);
  join(victim());
  int last_stage = 0;
  for (int rank = 0; rank < victim(); ++rank) {
    const Report& report = board_->rank[rank];
    wait_until([&] { return report.masked || report.code != -1; });
    last_stage = std::max<int>(last_stage, report.stage);
  }
  board_->last_stage = last_stage + (shared() ? 50 : 1000);  // all make as many calls
  join_survivors();
  for (int rank = 0; rank < victim(); ++rank) {
    const Report& report = board_->rank[rank];
    EXPECT_EQ(report.code, -1) << report.text;
    EXPECT_GT(report.right, 0);
    if (!shared()) {
      EXPECT_LT(report.seconds, 2.0);
    }
    printf("  rank %d: masked after %.3f s, %d right pairs behind it\n", rank, report.seconds, report.right);
  }
}

using GpuTwo = GpuFault;

TEST_P(GpuTwo, PeerThatStaysAwayIsATimeoutThatNamesIt) {
  play(
      milliseconds(1500),
      [this](GpuRank&, Exchange& exchange, Report&) {
        exchange();
        board_->fault_ns = now_ns();
        exchange();
      },
      [](GpuRank&, Exchange& exchange, Report&) {
        exchange();
        std::this_thread::sleep_for(seconds(6));
      });
  join_survivors();
  end_victim();
  expect_victim_named(ErrorCode::kTimeout, 3.0);
}

TEST_P(GpuTwo, AnotherCallAtThisPlaceIsAMismatchOnBothSides) {
  const auto first = [this](GpuRank&, Exchange& exchange, Report&) {
    exchange();
    board_->fault_ns = now_ns();
    exchange();
  };
  const auto other = [this](GpuRank& me, Exchange& exchange, Report&) {
    exchange();
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

constexpr Way kAllWays[] = {Way::kCalls, Way::kGraphs, Way::kPairs, Way::kHooks, Way::kPairGraphs};

std::vector<Case> every_way(std::initializer_list<int> all_ranks) {
  std::vector<Case> cases;
  for (const int ranks : all_ranks) {
    for (const Way way : kAllWays) cases.push_back({ranks, way});
  }
  return cases;
}

std::string name_of(const testing::TestParamInfo<Case>& info) {
  constexpr const char* kNames[] = {"Calls", "Graphs", "Pairs", "Hooks", "PairGraphs"};
  return std::to_string(info.param.ranks) + kNames[static_cast<std::size_t>(info.param.way)];
}

INSTANTIATE_TEST_SUITE_P(Ranks, GpuKill, testing::ValuesIn(every_way({2, 4})), name_of);
INSTANTIATE_TEST_SUITE_P(Ranks, GpuStop, testing::ValuesIn(every_way({2, 4})), name_of);
INSTANTIATE_TEST_SUITE_P(Ranks, GpuMask,
                         testing::Values(Case{2, Way::kPairs, true}, Case{4, Way::kPairs, true},
                                         Case{4, Way::kHooks, true}),
                         name_of);
INSTANTIATE_TEST_SUITE_P(Ranks, GpuTwo, testing::Values(Case{2, Way::kCalls}), name_of);

}  // namespace
}  // namespace anyep::test
