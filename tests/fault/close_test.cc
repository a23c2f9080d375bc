// Row 55 of the bad-input table: close() twice, with an operation in flight, beside another thread's call, after a fork.
#include <anyep/engine.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "core/fault_point.h"
#include "fault/notes.h"
#include "fault/task.h"

namespace anyep::test {
namespace {

using namespace std::chrono_literals;
using ::testing::Each;

Engine make_engine(const LocalGroup& group, int rank, const Tuning& tuning = Task::tuning()) {
  const auto member = group.member(rank);
  return Engine::create(Task::budget(group.num_ranks()), Topology::discover(*member), tuning, *member);
}

const std::vector<std::int64_t>& some_ids() {
  static const std::vector<std::int64_t> ids = {0, 1};
  return ids;
}

Routing some_routing() {
  Routing routing;
  routing.experts = TensorView::dense(some_ids().data(), DType::kI64, {1, 2});
  return routing;
}

TEST(CloseTest, WaitsForAnOperationInFlight) {
  const LocalGroup group(2);
  std::atomic<bool> closing = false;
  LocalGroup::run_threads(2, [&](int rank) {
    Engine engine = make_engine(group, rank);
    Task(2, rank).round(engine, 0);
    if (rank == 1) {
      while (!closing) std::this_thread::sleep_for(1ms);
      std::this_thread::sleep_for(50ms);  // rank 0 is inside close() by now
    }
    const Handle handle = engine.route(Task::shape(), some_routing());
    closing = true;
    EXPECT_NO_THROW(engine.close());
    EXPECT_EQ(handle.num_tokens(), 1);
    EXPECT_GE(handle.num_rows(), 0) << "the operation has ended well";
    EXPECT_NO_THROW(engine.close());
  });
}

ErrorCode thrown_code(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.code;
  }
  return ErrorCode::kInternal;
}

/// What close() does while an op that may wait for a minute waits for a peer that does nothing.
void close_with_a_hopeless_operation(const LocalGroup& group, int rank, const std::atomic<std::uint64_t>& closed,
                                     const std::function<void()>& report) {
  Tuning tuning = Task::tuning();
  tuning.timeout = 500ms;
  Engine engine = make_engine(group, rank, tuning);
  if (rank == 1) {
    while (closed == 0) std::this_thread::sleep_for(1ms);
    return;  // it leaves without close: rank 0 is gone
  }
  Options options;
  options.timeout = std::chrono::minutes(1);
  const Handle handle = engine.route(Task::shape(), some_routing(), {}, options);
  const std::int64_t start = now_ns();
  ErrorCode code = ErrorCode::kInternal;
  std::string op;
  try {
    engine.close();
  } catch (const Error& error) {
    code = error.code;
    op = error.op;
  }
  const std::int64_t elapsed = now_ns() - start;
  report();
  must(code == ErrorCode::kTimeout, "code of close()", static_cast<long long>(code),
       static_cast<long long>(ErrorCode::kTimeout));
  must(op == "close", "the op that the error names");
  must(elapsed >= scaled_ns(0.49) && elapsed < scaled_ns(2), "nanoseconds until the limit of an op", elapsed,
       scaled_ns(0.5));
  bool threw = false;
  try {
    (void)handle.num_rows();
  } catch (const Error& error) {
    threw = error.code == ErrorCode::kTimeout;
  }
  must(threw, "the operation has ended with the limit as its error");
  engine.close();  // everything local is released
}

TEST(CloseTest, GivesUpOnAnOperationAtTheLimitAndSaysSo) {
  const LocalGroup group(2);
  std::atomic<std::uint64_t> closed = 0;
  LocalGroup::run_threads(
      2, [&](int rank) { EXPECT_NO_THROW(close_with_a_hopeless_operation(group, rank, closed, [&] { closed = 1; })); });
}

// In a process of its own the window is unmapped by close(), and the op looks at it until it leaves.
TEST(CloseProcessTest, GivesUpOnAnOperationAtTheLimitAndSaysSo) {
  const LocalGroup group(2);
  const Notes notes;
  const std::vector<int> status = LocalGroup::run_processes(2, [&](int rank) {
    end_after(60);
    close_with_a_hopeless_operation(group, rank, notes[0].word, [&] { notes[0].word = 1; });
  });
  EXPECT_THAT(status, Each(0));
}

// An op that is busy when close() gives it up, not waiting, writes into windows for a while yet.
TEST(CloseProcessTest, NoMemoryGoesWhileAnOperationIsBusyWithIt) {
  if (!core::kFaultPoints) GTEST_SKIP() << "needs the fault points of test builds";
  const LocalGroup group(2);
  const Notes notes;
  const std::vector<int> status = LocalGroup::run_processes(2, [&](int rank) {
    end_after(60);
    Tuning tuning = Task::tuning();
    tuning.timeout = 100ms;
    Engine engine = make_engine(group, rank, tuning);
    Options options;
    options.timeout = std::chrono::minutes(1);
    if (rank == 0) core::set_fault(fmt::format("route.before_send:0:*:delay={}", scaled_ns(0.5) / 1'000'000));
    const Handle handle = engine.route(Task::shape(), some_routing(), {}, options);
    if (rank == 1) {
      while (notes[0].word == 0) std::this_thread::sleep_for(1ms);
      return;
    }
    ErrorCode code = ErrorCode::kInternal;
    try {
      engine.close();
    } catch (const Error& error) {
      code = error.code;
    }
    notes[0].word = 1;
    must(code == ErrorCode::kTimeout, "code of close()", static_cast<long long>(code),
         static_cast<long long>(ErrorCode::kTimeout));
    std::this_thread::sleep_for(std::chrono::nanoseconds(scaled_ns(0.5)));  // an op that went on would crash now
  });
  EXPECT_THAT(status, Each(0));
}

// Calls that come from other threads while close() goes on, or as another close(), harm nothing.
TEST(CloseTest, CallsAndClosesOfOtherThreadsMeanwhileAreStateErrorsOrLegal) {
  for (int repeat = 0; repeat < 20; ++repeat) {
    const LocalGroup group(2);
    LocalGroup::run_threads(2, [&](int rank) {
      Engine engine = make_engine(group, rank);
      std::atomic<int> others = 0;
      const auto meanwhile = [&](const std::function<void()>& call) {
        return std::thread([&others, call] {
          ++others;
          for (int i = 0; i < 200; ++i) {
            try {
              call();
            } catch (const Error& error) {
              EXPECT_EQ(error.code, ErrorCode::kState) << error.what();
            }
          }
        });
      };
      std::vector<std::thread> threads;
      threads.push_back(meanwhile([&] { (void)engine.layout(Task::shape(), some_routing()); }));
      threads.push_back(meanwhile([&] { (void)engine.make_rows(2, Task::shape()); }));
      threads.push_back(meanwhile([&] { engine.close(); }));
      while (others < 3) std::this_thread::yield();
      try {
        engine.close();
      } catch (const Error& error) {
        EXPECT_EQ(error.code, ErrorCode::kState) << error.what();
      }
      for (std::thread& thread : threads) thread.join();
      EXPECT_NO_THROW(engine.close());
      EXPECT_EQ(thrown_code([&] { engine.check(); }), ErrorCode::kState) << "it is closed";
    });
    if (HasFailure()) return;
  }
}

TEST(CloseTest, BesideACallOfAnotherThreadItWaitsForThatCall) {
  const LocalGroup group(2);
  std::atomic<bool> closing = false;
  LocalGroup::run_threads(2, [&](int rank) {
    Engine engine = make_engine(group, rank);
    Task task(2, rank);
    task.round(engine, 0);
    if (rank == 1) {
      while (!closing) std::this_thread::sleep_for(1ms);
      std::this_thread::sleep_for(50ms);
      engine.barrier();
      engine.close();
      return;
    }
    std::thread caller([&] { EXPECT_NO_THROW(engine.barrier()); });
    std::this_thread::sleep_for(20ms);  // it is inside the barrier, for rank 1 is not
    closing = true;
    EXPECT_NO_THROW(engine.close());
    caller.join();
  });
}

TEST(CloseProcessTest, OfAForkedChildIsAStateErrorAndLeavesTheParentsEngineAlone) {
  const LocalGroup group(1);
  Engine engine = make_engine(group, 0);
  Task task(1, 0);
  task.round(engine, 0);
  const pid_t child = ::fork();
  if (child == 0) {
    for (int twice = 0; twice < 2; ++twice) {
      try {
        engine.close();
        ::_exit(1);
      } catch (const Error& error) {
        if (error.code != ErrorCode::kState) ::_exit(2);
      }
    }
    ::_exit(0);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
  task.round(engine, 1);
  EXPECT_NO_THROW(engine.close());
  EXPECT_NO_THROW(engine.close());
}

}  // namespace
}  // namespace anyep::test
