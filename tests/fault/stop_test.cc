// F4 and F5: ranks that are frozen, for less than the limit and for more.
#include <anyep/engine.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "core/fault_point.h"
#include "fault/notes.h"
#include "fault/task.h"

namespace anyep::test {
namespace {

using namespace std::chrono_literals;

constexpr int kSleeper = 1;

void wait_for(const std::function<bool()>& there) {
  const std::int64_t give_up = now_ns() + scaled_ns(20);
  while (!there()) {
    must(now_ns() < give_up, "nothing to wait for any more");
    std::this_thread::sleep_for(1ms);
  }
}

/// The letter that /proc shows for a process: T = stopped.
char state_of(std::int64_t pid) {
  std::ifstream file(fmt::format("/proc/{}/stat", pid));
  std::string text;
  std::getline(file, text);
  const std::size_t bracket = text.rfind(')');
  return bracket == std::string::npos || bracket + 2 >= text.size() ? '?' : text[bracket + 2];
}

/// By a process that is no rank: lets the sleeper go on when `when` has come.
void wake_sleeper(const Notes& notes, const std::function<void()>& when) {
  end_after(30);
  wait_for([&] { return notes[kSleeper].pid != 0 && state_of(notes[kSleeper].pid) == 'T'; });
  when();
  ::kill(static_cast<pid_t>(notes[kSleeper].pid), SIGCONT);
}

Tuning tuning_with(std::chrono::nanoseconds timeout) {
  Tuning tuning = Task::tuning();
  tuning.timeout = timeout;
  return tuning;
}

class StopProcessTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!core::kFaultPoints) GTEST_SKIP() << "this build has no fault points";
  }
  static void expect_all_well(const std::vector<int>& status, const Notes& notes) {
    for (std::size_t rank = 0; rank < status.size(); ++rank) {
      EXPECT_EQ(status[rank], 0) << "process " << rank << ": " << notes[static_cast<int>(rank)].describe();
    }
  }
};

TEST_F(StopProcessTest, AStopBelowTheLimitIsNoErrorAndShowsInTheCounters) {
  constexpr auto kStop = 400ms;
  for (const char* point :
       {"route.after_flag", "dispatch.mid_send", "combine.before_send", "low_latency_dispatch.before_send"}) {
    SCOPED_TRACE(point);
    const Notes notes;
    const LocalGroup group(3);
    expect_all_well(
        LocalGroup::run_processes(4,
                                  [&](int rank) {
                                    if (rank == 3)
                                      return wake_sleeper(notes, [&] { std::this_thread::sleep_for(kStop); });
                                    end_after(30);
                                    notes[rank].pid = ::getpid();
                                    const auto member = group.member(rank);
                                    Engine engine = Engine::create(Task::budget(3), Topology::discover(*member),
                                                                   Task::tuning(), *member);
                                    Task task(3, rank);
                                    task.round(engine, 0);
                                    if (rank == kSleeper) core::set_fault(fmt::format("{}:{}:*:stop", point, rank));
                                    const std::int64_t before = task.waited_ns(kSleeper);
                                    for (int salt = 1; salt <= 4; ++salt) task.round(engine, salt);
                                    engine.close();
                                    const std::int64_t waited = task.waited_ns(kSleeper) - before;
                                    const bool counted = std::string_view(point).starts_with("low_latency");
                                    if (counted && rank != kSleeper) {
                                      const std::int64_t least = std::chrono::nanoseconds(kStop).count() / 2;
                                      must(waited > least, "nanoseconds waited for the sleeper", waited, least);
                                    }
                                  }),
        notes);
    if (HasFailure()) return;
  }
}

/// Until the error; then an engine of the others, used until the sleeper has been awake for a while.
void survive(const LocalGroup& group, int rank, const Notes& notes, int num_ranks, int salt) {
  end_after(30);
  Note& note = notes[rank];
  note.pid = ::getpid();
  try {
    const auto member = group.member(rank);
    Engine engine = Engine::create(Task::budget(num_ranks), Topology::discover(*member), tuning_with(500ms), *member);
    Task task(num_ranks, rank);
    task.round(engine, 0);
    note.step = 1;
    for (;; salt += 2) task.round(engine, salt);
  } catch (const Error& error) {
    note.put(error);
  }
  const std::vector<int> gone = {kSleeper};
  const auto member = group.member_without(rank, gone);
  const int ranks = num_ranks - 1;
  Engine engine = Engine::create(Task::budget(ranks), Topology::discover(*member), Task::tuning(), *member);
  Task task(ranks, member->rank());
  task.round(engine, 100);
  note.rebuilt_ns = now_ns();
  wait_for([&] { return notes[kSleeper].error_ns != 0; });
  for (int more = 101; more < 140; ++more) task.round(engine, more);
  engine.close();
}

void oversleep(const LocalGroup& group, const char* point, const Notes& notes, int num_ranks, int salt) {
  end_after(30);
  Note& note = notes[kSleeper];
  note.pid = ::getpid();
  try {
    const auto member = group.member(kSleeper);
    Engine engine = Engine::create(Task::budget(num_ranks), Topology::discover(*member), tuning_with(500ms), *member);
    Task task(num_ranks, kSleeper);
    task.round(engine, 0);
    core::set_fault(fmt::format("{}:{}:*:stop", point, kSleeper));
    for (;; salt += 2) {
      task.round(engine, salt);
      note.step = note.step + 1;
    }
  } catch (const Error& error) {
    note.put(error);
  }
}

void expect_sleeper_shut_out(const char* point, int num_ranks, int salt) {
  SCOPED_TRACE(fmt::format("{}, {} ranks, salt {}", point, num_ranks, salt));
  const Notes notes;
  const LocalGroup group(num_ranks);
  const std::vector<int> status = LocalGroup::run_processes(num_ranks + 1, [&](int rank) {
    if (rank == num_ranks) {
      return wake_sleeper(notes, [&] {
        for (int other = 0; other < num_ranks; ++other) {
          if (other != kSleeper) wait_for([&] { return notes[other].rebuilt_ns != 0; });
        }
      });
    }
    rank == kSleeper ? oversleep(group, point, notes, num_ranks, salt) : survive(group, rank, notes, num_ranks, salt);
  });
  for (int rank = 0; rank <= num_ranks; ++rank) {
    EXPECT_EQ(status[static_cast<std::size_t>(rank)], 0) << rank << ": " << notes[rank].describe();
  }
  for (int rank = 0; rank < num_ranks; ++rank) {
    const Note& note = notes[rank];
    EXPECT_EQ(note.code, static_cast<int>(ErrorCode::kTimeout)) << rank << ": " << note.describe();
    if (rank == kSleeper) continue;
    EXPECT_EQ(note.peers, std::uint64_t{1} << kSleeper) << note.describe();
    EXPECT_NE(std::string(note.text).find(fmt::format("rank {}", kSleeper)), std::string::npos) << note.describe();
  }
  EXPECT_LE(notes[kSleeper].step, 1) << "the sleeper took rounds for good that nobody else was in";
}

TEST_F(StopProcessTest, AfterTheLimitTheSleeperIsNamedAndNothingItDoesLaterCounts) {
  for (const char* point : {"between", "route.mid_send", "dispatch.before_send", "dispatch.mid_send",
                            "dispatch.in_recv", "combine.mid_send", "combine.after_flag",
                            "low_latency_dispatch.mid_send", "low_latency_combine.in_recv", "barrier.after_flag"}) {
    expect_sleeper_shut_out(point, 3, 1);
    if (HasFailure()) return;
  }
}

TEST_F(StopProcessTest, TheOtherOfTwoGoesOnAlone) {
  for (const char* point : {"dispatch.after_flag", "low_latency_combine.mid_send"}) {
    expect_sleeper_shut_out(point, 2, 2);
    if (HasFailure()) return;
  }
}

// The sleeper finds all its words in place, and the rows that it gathers are no longer those of its combine.
TEST_F(StopProcessTest, RowsThatWereUsedAnewAreNotTakenByASleeperForItsCombine) {
  const Notes notes;
  const LocalGroup group(2);
  const std::vector<int> status = LocalGroup::run_processes(3, [&](int rank) {
    if (rank == 2) return wake_sleeper(notes, [&] { wait_for([&] { return notes[0].step == 1; }); });
    end_after(30);
    notes[rank].pid = ::getpid();
    const auto member = group.member(rank);
    Engine engine = Engine::create(Task::budget(2), Topology::discover(*member), tuning_with(300ms), *member);
    Shape shape = Task::shape();
    shape.top_k = 1;
    const std::vector<std::int64_t> ids = {0, shape.num_experts - 1};
    Routing routing;
    routing.experts = TensorView::dense(ids.data(), DType::kI64, {2, 1});
    Options wait;
    wait.wait = true;
    const Handle handle = engine.route(shape, routing);
    shape.top_k = 0;
    const OwnedRows rows = engine.make_rows(handle.num_rows(), shape);
    const auto count = static_cast<std::size_t>(handle.num_rows() * shape.hidden);
    std::fill_n(rows.view().x.as<std::uint16_t>(), count, std::uint16_t{0x3F80});
    if (rank == kSleeper) core::set_fault("combine.after_flag:1:*:stop");
    std::vector<std::uint16_t> sums(2 * static_cast<std::size_t>(shape.hidden));
    CombineInput in;
    in.x = rows.view().x;
    Rows out;
    out.x = TensorView::dense(sums.data(), DType::kBF16, {2, shape.hidden});
    try {
      engine.combine(in, handle, out, {}, wait);
    } catch (const Error& error) {
      notes[rank].put(error);
    }
    must(notes[rank].error_ns != 0, "combine returned on rank", rank);
    std::fill_n(rows.view().x.as<std::uint16_t>(), count, std::uint16_t{0xFFFF});
    notes[rank].step = 1;
    wait_for([&] { return notes[1 - rank].step == 1; });
  });
  for (int rank = 0; rank < 3; ++rank) {
    EXPECT_EQ(status[static_cast<std::size_t>(rank)], 0) << rank << ": " << notes[rank].describe();
  }
  EXPECT_EQ(notes[0].code, static_cast<int>(ErrorCode::kTimeout)) << notes[0].describe();
  EXPECT_EQ(notes[1].code, static_cast<int>(ErrorCode::kTimeout)) << notes[1].describe();
}

}  // namespace
}  // namespace anyep::test
