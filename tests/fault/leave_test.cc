// F6 and the ends of engines and processes: whoever leaves tells why, waits for nobody, and leaves at once.
#include <anyep/engine.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "fault/notes.h"
#include "fault/task.h"

namespace anyep::test {
namespace {

using namespace std::chrono_literals;
using ::testing::HasSubstr;

Engine make_engine(const LocalGroup& group, int rank, const Tuning& tuning = Task::tuning()) {
  const auto member = group.member(rank);
  return Engine::create(Task::budget(group.num_ranks()), Topology::discover(*member), tuning, *member);
}

// ---- F6 --------------------------------------------------------------------------------------------------------------

/// What rank 1 of 3 does between dispatch and combine; the others' code, and what their text must hold.
struct Leave {
  const char* what;
  std::function<void(Engine&)> how;
  ErrorCode code;
  const char* text;
};

void expect_peers_learn(const Leave& leave) {
  SCOPED_TRACE(leave.what);
  constexpr int kRanks = 3, kLeaver = 1;
  const Notes notes;
  const LocalGroup group(kRanks);
  const std::vector<int> status = LocalGroup::run_processes(kRanks, [&](int rank) {
    end_after(30);
    Engine engine = make_engine(group, rank);
    Task task(kRanks, rank);
    if (rank == kLeaver) {
      task.round(engine, 0);
      notes[rank].fault_ns = now_ns();
      leave.how(engine);
      return;
    }
    notes[rank].put(task.rounds_until_error(engine));
    engine.close();
  });
  for (int rank = 0; rank < kRanks; ++rank) {
    const Note& note = notes[rank];
    if (rank == kLeaver) continue;
    EXPECT_EQ(status[static_cast<std::size_t>(rank)], 0) << rank << ": " << note.describe();
    EXPECT_EQ(note.code, static_cast<int>(leave.code)) << note.describe();
    EXPECT_EQ(note.peers, std::uint64_t{1} << kLeaver) << note.describe();
    EXPECT_THAT(note.text, HasSubstr(leave.text)) << note.describe();
    EXPECT_STRNE(note.op, "") << note.describe();
    EXPECT_LT(note.error_ns - notes[kLeaver].fault_ns, scaled_ns(1)) << note.describe();
  }
}

TEST(LeaveProcessTest, PeersLearnWithinASecondHowARankLeft) {
  const std::vector<Leave> leaves = {
      {"an exception", [](Engine&) { throw std::runtime_error("the data loader is empty"); }, ErrorCode::kAborted,
       "without close"},
      {"abandon with a text", [](Engine& engine) { engine.abandon("the loss is not a number"); }, ErrorCode::kAborted,
       "the loss is not a number"},
      {"close before the others", [](Engine& engine) { engine.close(); }, ErrorCode::kAborted, "closed"},
      {"_exit", [](Engine&) { ::_exit(0); }, ErrorCode::kPeerDead, "died"},
      {"exit", [](Engine&) { std::exit(0); }, ErrorCode::kPeerDead, "died"},
      {"SIGTERM", [](Engine&) { ::raise(SIGTERM); }, ErrorCode::kPeerDead, "died"},
      {"SIGINT", [](Engine&) { ::raise(SIGINT); }, ErrorCode::kPeerDead, "died"},
      {"a crash", [](Engine&) { ::signal(SIGSEGV, SIG_DFL), ::raise(SIGSEGV); }, ErrorCode::kPeerDead, "died"}};
  for (const Leave& leave : leaves) {
    expect_peers_learn(leave);
    if (HasFailure()) return;
  }
}

TEST(LeaveTest, AnExceptionThatUnwindsTheEngineReachesThePeersAsThreadsToo) {
  const LocalGroup group(3);
  LocalGroup::run_threads(3, [&](int rank) {
    Engine engine = make_engine(group, rank);
    Task task(3, rank);
    if (rank == 1) {
      task.round(engine, 0);
      try {
        const Engine unwound = std::move(engine);
        throw std::runtime_error("between two ops");
      } catch (const std::runtime_error&) {
        return;
      }
    }
    const Error error = task.rounds_until_error(engine);
    EXPECT_EQ(error.code, ErrorCode::kAborted) << error.what();
    EXPECT_THAT(error.peers, ::testing::ElementsAre(1));
    EXPECT_THAT(error.what(), HasSubstr("without close"));
  });
}

TEST(LeaveTest, PeersLearnOfACallThatTheCallerRefusesAndWhatAllRefuseHarmsNobody) {
  const LocalGroup group(3);
  std::atomic<int> done = 0;
  LocalGroup::run_threads(3, [&](int rank) {
    Engine engine = make_engine(group, rank);
    Task task(3, rank);
    engine.refuse(Op::kDispatch, "no list of tensors");
    if (rank == 1) {
      task.round(engine, 0);
      engine.refuse(Op::kRoute, "x is a list");
    } else {
      const Error error = task.rounds_until_error(engine);
      EXPECT_EQ(error.code, ErrorCode::kAborted) << error.what();
      EXPECT_THAT(error.peers, ::testing::ElementsAre(1));
      EXPECT_THAT(error.what(), HasSubstr("x is a list"));
    }
    for (++done; done < 3;) std::this_thread::sleep_for(1ms);  // an engine that goes tells the peers too
  });
}

TEST(LeaveTest, PeersLearnOfACallWhoseEarlierEventFailed) {
  const LocalGroup group(2);
  std::atomic<int> done = 0;
  LocalGroup::run_threads(2, [&](int rank) {
    Engine engine = make_engine(group, rank);
    Task task(2, rank);
    task.round(engine, 0);
    Shape shape;
    shape.num_experts = 2, shape.top_k = 1, shape.hidden = 8;
    const std::vector<std::int64_t> ids(4, 0);
    Routing routing;
    routing.experts = TensorView::dense(ids.data(), DType::kI64, {4, 1});
    Options wait;
    wait.wait = true;
    const Handle handle = engine.route(shape, routing, {}, wait);
    std::vector<std::uint16_t> x(4 * 8), room(8 * 8);
    const auto dispatch = [&](std::int64_t rows, const Options& options) {
      Rows in, out;
      in.x = TensorView::dense(x.data(), DType::kBF16, {4, 8});
      out.x = TensorView::dense(room.data(), DType::kBF16, {rows, 8});
      return engine.dispatch(in, handle, out, {}, options);
    };
    Options after = wait;
    after.after = {dispatch(rank == 0 ? 3 : 8, {})};  // rank 0 has too little room, which is its own affair
    try {
      dispatch(8, after);
      ADD_FAILURE() << "rank " << rank;
    } catch (const Error& error) {
      EXPECT_EQ(error.code, rank == 0 ? ErrorCode::kCapacity : ErrorCode::kAborted) << error.what();
      EXPECT_THAT(error.what(), HasSubstr("room for 3"));
    }
    for (++done; done < 2;) std::this_thread::sleep_for(1ms);
  });
}

// ---- destructors -----------------------------------------------------------------------------------------------------

std::int64_t time_of(const std::function<void()>& what) {
  const std::int64_t start = now_ns();
  what();
  return now_ns() - start;
}

TEST(DestructorProcessTest, WithDeadPeersItTakesATenthOfASecondAtMost) {
  const Notes notes;
  const LocalGroup group(3);
  LocalGroup::run_processes(3, [&](int rank) {
    end_after(30);
    std::optional<Engine> engine = make_engine(group, rank);
    Task task(3, rank);
    task.round(*engine, 0);
    if (rank != 0) ::raise(SIGKILL);
    // Not noticed yet, or just now: the destructor must not care.
    notes[0].word = static_cast<std::uint64_t>(time_of([&] { engine.reset(); }));
    notes[0].step = 1;
  });
  EXPECT_EQ(notes[0].step, 1);
  EXPECT_LT(static_cast<std::int64_t>(notes[0].word.load()), scaled_ns(0.1));
}

TEST(DestructorTest, WithFrozenPeersItWaitsForNobody) {
  const LocalGroup group(2);
  std::atomic<bool> gone = false;
  LocalGroup::run_threads(2, [&](int rank) {
    std::optional<Engine> engine = make_engine(group, rank);
    Task task(2, rank);
    task.round(*engine, 0);
    while (rank == 1 && !gone) std::this_thread::sleep_for(1ms);  // says nothing, does nothing
    if (rank == 1) return;
    EXPECT_LT(time_of([&] { engine.reset(); }), scaled_ns(0.1));
    gone = true;
  });
}

TEST(DestructorTest, WithOpsInFlightTheyEndWithAnErrorAtOnce) {
  const LocalGroup group(2);
  std::atomic<bool> gone = false;
  LocalGroup::run_threads(2, [&](int rank) {
    std::optional<Engine> engine = make_engine(group, rank);
    Task task(2, rank);
    task.round(*engine, 0);
    while (rank == 1 && !gone) std::this_thread::sleep_for(1ms);
    if (rank == 1) return;
    const std::vector<std::int64_t> ids = {0, 1};
    Routing routing;
    routing.experts = TensorView::dense(ids.data(), DType::kI64, {1, 2});
    Options after_mine;
    const Event never = Event::manual();
    const Handle first = engine->route(Task::shape(), routing);  // the peer never takes part
    after_mine.after = {never};
    const Handle second = engine->route(Task::shape(), routing, {}, after_mine);
    std::this_thread::sleep_for(20ms);
    EXPECT_LT(time_of([&] { engine.reset(); }), scaled_ns(0.1));
    for (const Handle* handle : {&first, &second}) EXPECT_THROW(handle->num_rows(), Error);
    gone = true;
  });
}

TEST(DestructorTest, AnOpThatComesAfterAnEventThatNeverComesHoldsNobodyUp) {
  const LocalGroup group(1);
  std::optional<Engine> engine = make_engine(group, 0);
  const std::vector<std::int64_t> ids = {0, 1};
  Routing routing;
  routing.experts = TensorView::dense(ids.data(), DType::kI64, {1, 2});
  Options options;
  options.after = {Event::manual()};
  const Handle handle = engine->route(Task::shape(), routing, {}, options);
  std::this_thread::sleep_for(10ms);
  EXPECT_LT(time_of([&] { engine.reset(); }), scaled_ns(0.1));
  EXPECT_THROW(handle.num_rows(), Error);
}

TEST(DestructorTest, AFailedEngineClosesAtOnce) {
  const LocalGroup group(2);
  std::atomic<int> done = 0;
  std::atomic<bool> gone = false;
  LocalGroup::run_threads(2, [&](int rank) {
    Engine engine = make_engine(group, rank);
    Task task(2, rank);
    task.round(engine, 0);
    for (++done; done < 2;) std::this_thread::sleep_for(1ms);  // an abort may find the peer at the end of its round
    while (rank == 1 && !gone) std::this_thread::sleep_for(1ms);
    if (rank == 1) return;
    engine.abandon("enough");
    EXPECT_LT(time_of([&] { engine.close(); }), scaled_ns(0.1));
    gone = true;
  });
}

// ---- ends of processes -----------------------------------------------------------------------------------------------

std::unique_ptr<Engine> engine_of_the_process;  // destroyed by exit()

/// Status and time of a child that runs `body` and then exit(), as a program that returns from main() does.
std::pair<int, std::int64_t> run_to_exit(const std::function<void()>& body) {
  const std::int64_t start = now_ns();
  const pid_t child = ::fork();
  if (child == 0) {
    end_after(20);
    try {
      body();
    } catch (const std::exception& error) {
      fmt::print(stderr, "{}\n", error.what());
      ::_exit(99);
    }
    std::exit(7);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return {status, now_ns() - start};
}

TEST(ExitProcessTest, AProcessWithAnEngineInAStaticObjectEndsCleanly) {
  const auto [status, time] = run_to_exit([] {
    const LocalGroup group(1);
    engine_of_the_process = std::make_unique<Engine>(make_engine(group, 0));
    Task(1, 0).round(*engine_of_the_process, 1);
  });
  EXPECT_TRUE(WIFEXITED(status)) << "status " << status;
  EXPECT_EQ(WEXITSTATUS(status), 7);
  EXPECT_LT(time, scaled_ns(1));
}

TEST(ExitProcessTest, RanksThatExitWithoutCloseOrWithDeadPeersEndWithinASecond) {
  const Notes notes;
  const LocalGroup group(3);
  std::vector<std::thread> watchers;
  std::vector<std::pair<int, std::int64_t>> ended(3);
  std::vector<pid_t> children;
  for (int rank = 0; rank < 3; ++rank) {
    const pid_t child = ::fork();
    if (child == 0) {
      end_after(20);
      engine_of_the_process = std::make_unique<Engine>(make_engine(group, rank));
      Task(3, rank).round(*engine_of_the_process, 1);
      if (rank == 2) ::raise(SIGKILL);
      notes[rank].fault_ns = now_ns();
      std::exit(7);  // with the engine's worker, its watcher and a peer that is dead or about to be
    }
    children.push_back(child);
  }
  for (int rank = 0; rank < 3; ++rank) {
    int status = 0;
    ::waitpid(children[static_cast<std::size_t>(rank)], &status, 0);
    if (rank == 2) continue;
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 7) << "status " << status;
    EXPECT_LT(now_ns() - notes[rank].fault_ns, scaled_ns(1));
  }
}

TEST(ExitProcessTest, AForkedChildThatExitsHarmsNeitherItselfNorTheParent) {
  const LocalGroup group(2);
  const std::vector<int> status = LocalGroup::run_processes(2, [&](int rank) {
    end_after(30);
    engine_of_the_process = std::make_unique<Engine>(make_engine(group, rank));
    Engine& engine = *engine_of_the_process;
    Task task(2, rank);
    task.round(engine, 0);
    // The child has a copy of an engine whose worker and watcher are the parent's.
    const std::vector<std::int64_t> ids = {0, 1};
    Routing routing;
    routing.experts = TensorView::dense(ids.data(), DType::kI64, {1, 2});
    const Handle handle = engine.route(Task::shape(), routing);
    must(handle.num_rows() >= 0, "rows");
    const auto [child, time] = run_to_exit([] { engine_of_the_process.reset(); });
    must(WIFEXITED(child) && WEXITSTATUS(child) == 7, "child that destroys the engine", child, 7);
    must(time < scaled_ns(1), "nanoseconds of that child", time, scaled_ns(1));
    const auto [other, other_time] = run_to_exit([] {});  // destroyed among the static objects
    must(WIFEXITED(other) && WEXITSTATUS(other) == 7, "child that exits", other, 7);
    task.round(engine, 1);
    engine.close();
    engine_of_the_process.reset();
  });
  EXPECT_THAT(status, ::testing::Each(0));
}

}  // namespace
}  // namespace anyep::test
