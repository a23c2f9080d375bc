// F11: create() when the operating system refuses something, on one rank.
#include <anyep/engine.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "fault/belongings.h"
#include "fault/failing_calls.h"
#include "fault/notes.h"
#include "fault/task.h"

namespace anyep::test {
namespace {

/// How create() ended on one rank.
struct Outcome {
  bool made = false;              ///< an engine
  std::optional<ErrorCode> code;  ///< none = no engine and no anyep::Error either
  std::string text;
  bool call_failed = false;
  std::int64_t time_ns = 0;
};

Outcome try_create(Bootstrap& member, const Topology& topology, const std::string& call, int nth) {
  Tuning tuning = Task::tuning();
  // A rank that has no memory at all may not even meet the others.
  if (call == "new") tuning.startup_timeout = std::chrono::milliseconds(500);
  Outcome outcome;
  const std::int64_t start = now_ns();
  std::optional<Engine> engine;
  if (nth > 0) fail_call(call, nth);
  try {
    engine = Engine::create(Task::budget(topology.num_ranks()), topology, tuning, member);
    outcome.made = true;
  } catch (const Error& error) {
    outcome.call_failed = stop_failing();
    outcome.code = error.code;
    outcome.text = error.what();
  }
  outcome.call_failed |= stop_failing();
  outcome.time_ns = now_ns() - start;
  if (engine) {
    // All have one, or none: then this works.
    try {
      engine->barrier();
      engine->close();
    } catch (const Error& error) {
      outcome.made = false;
      // The last objects of an engine are made when all have voted.
      if (call == "new" && error.code == ErrorCode::kAborted) outcome.code = error.code;
      outcome.text = fmt::format("an engine that does not work: {}", error.what());
    }
  }
  return outcome;
}

void expect_clean(const std::vector<Outcome>& outcomes, int unlucky, const std::string& call,
                  const std::string& where) {
  const auto all_made = std::ranges::all_of(outcomes, [](const Outcome& one) { return one.made; });
  for (std::size_t rank = 0; rank < outcomes.size(); ++rank) {
    const Outcome& one = outcomes[rank];
    EXPECT_LT(one.time_ns, scaled_ns(2)) << where << " rank " << rank << ": " << one.text;
    if (all_made) continue;
    ASSERT_TRUE(one.code.has_value()) << where << " rank " << rank << (one.made ? " has an engine" : one.text);
    const bool mine = static_cast<int>(rank) == unlucky;
    const bool late = call == "new" && *one.code == ErrorCode::kTimeout;
    EXPECT_TRUE(*one.code == ErrorCode::kResource || (!mine && (late || *one.code == ErrorCode::kAborted)))
        << where << " rank " << rank << ": " << name_of(*one.code) << " " << one.text;
    EXPECT_TRUE(mine || one.text.find(fmt::format("rank {}", unlucky)) != std::string::npos)
        << where << ": " << one.text;
  }
}

/// Every n-th call of that name fails, on one rank of `num_ranks` threads, until there is none left to fail.
int fail_every_call(const std::string& call, int num_ranks, int unlucky, int most) {
  int nth = 1;
  for (; nth <= most; ++nth) {
    const std::string where = fmt::format("{} number {} of rank {}", call, nth, unlucky);
    const Belongings before = Belongings::now();
    std::vector<Outcome> outcomes(static_cast<std::size_t>(num_ranks));
    auto group = std::make_unique<LocalGroup>(num_ranks);
    LocalGroup::run_threads(num_ranks, [&](int rank) {
      const auto member = group->member(rank);
      const Topology topology = Topology::discover(*member);
      outcomes[static_cast<std::size_t>(rank)] = try_create(*member, topology, call, rank == unlucky ? nth : 0);
    });
    group.reset();
    const bool failed = outcomes[static_cast<std::size_t>(unlucky)].call_failed;
    expect_clean(outcomes, unlucky, call, where);
    EXPECT_EQ(Belongings::settled(before).more_than(before), "") << where;
    if (testing::Test::HasFailure() || !failed) break;
  }
  return nth - 1;
}

TEST(ResourceTest, WhicheverCallFailsAllRanksGetACleanErrorAndNothingLeaks) {
  if (!kCallsCanFail) GTEST_SKIP() << "the sanitizer stands before these calls itself";
  LocalGroup::run_threads(2, [](int) {});  // what a process makes once, it makes now
  std::string list;
  for (const std::string& call : failing_calls()) {
    if (call == "new") continue;
    const int first = fail_every_call(call, 2, 0, 40);
    if (HasFailure()) return;
    const int last = fail_every_call(call, 3, 2, 40);
    if (HasFailure()) return;
    list += fmt::format(" {} {}+{}", call, first, last);
  }
  fmt::print("calls that failed one by one:{}\n", list);
}

TEST(ResourceTest, WhicheverAllocationFailsAllRanksGetACleanError) {
  if (!kNewCanFail) GTEST_SKIP() << "the sanitizer allocates itself";
  const int count = fail_every_call("new", 2, 1, 400);
  fmt::print("allocations that failed one by one: {}\n", count);
}

}  // namespace
}  // namespace anyep::test
