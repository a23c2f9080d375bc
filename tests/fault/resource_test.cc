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
  if (call == "new") tuning.startup_timeout = std::chrono::milliseconds(150);
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

// ---- limits of a process -------------------------------------------------------------------------------------------

/// Two processes; rank 1 has `limit` of `resource` while it creates. Then both try again without it.
void create_within(int resource, rlim_t limit, const std::string& where) {
  const Notes notes;
  const LocalGroup group(2);
  const std::vector<int> status = LocalGroup::run_processes(2, [&](int rank) {
    end_after(30);
    const auto member = group.member(rank);
    const Topology topology = Topology::discover(*member);
    const Belongings before = Belongings::now();
    rlimit usual{};
    ::getrlimit(resource, &usual);
    const rlimit tight{limit, usual.rlim_max};
    if (rank == 1) ::setrlimit(resource, &tight);
    const Outcome outcome = try_create(*member, topology, "", 0);
    if (rank == 1) ::setrlimit(resource, &usual);
    must(outcome.made || outcome.code.has_value(), outcome.text.c_str());
    must(outcome.time_ns < scaled_ns(2), outcome.text.c_str(), outcome.time_ns);
    must(outcome.made || rank == 0 || *outcome.code == ErrorCode::kResource, outcome.text.c_str());
    notes[rank].step = outcome.made ? 1 : 2;
    Belongings after = Belongings::settled(before);
    after.names = before.names;
    const std::string more = after.more_than(before);
    must(more.empty(), more.c_str());
    for (int tries = 0;; ++tries) {
      try {
        Engine engine = Engine::create(Task::budget(2), topology, Task::tuning(), *member);
        Task(2, rank).round(engine, 1);
        engine.close();
        return;
      } catch (const Error& error) {
        // One of the two may have begun the new exchange while the other was still in the old one.
        if (error.code != ErrorCode::kAborted || tries == 3) throw;
      }
    }
  });
  EXPECT_THAT(status, testing::Each(0)) << where;
  EXPECT_EQ(notes[0].step, notes[1].step) << where << ": one rank has an engine and the other has not";
}

TEST(ResourceProcessTest, ARankWithoutDescriptorsFailsOnAllRanksAndMayTryAgain) {
  const auto held = static_cast<rlim_t>(::dup(0));  // the lowest free number
  ::close(static_cast<int>(held));
  for (rlim_t more = 0; more <= 14; ++more) {
    create_within(RLIMIT_NOFILE, held + more, fmt::format("{} descriptors", more));
    if (HasFailure()) return;
  }
}

TEST(ResourceProcessTest, ARankWithoutMemoryFailsOnAllRanksAndMayTryAgain) {
  if (!kNewCanFail) GTEST_SKIP() << "the sanitizer's shadow needs the address space";
  const rlim_t held = static_cast<rlim_t>(Belongings::now().address_space_mib + 1) << 20;
  for (const rlim_t more_kib : {0, 256, 512, 1024, 2048, 4096, 8192, 12288, 65536}) {
    create_within(RLIMIT_AS, held + (more_kib << 10), fmt::format("{} KiB", more_kib));
    if (HasFailure()) return;
  }
}

// ---- later ---------------------------------------------------------------------------------------------------------

TEST(ResourceTest, WithoutAThreadForTheQueueThePeersLearnWhyTheOpDoesNotCome) {
  if (!kCallsCanFail) GTEST_SKIP() << "the sanitizer stands before these calls itself";
  const LocalGroup group(2);
  LocalGroup::run_threads(2, [&](int rank) {
    const auto member = group.member(rank);
    Engine engine = Engine::create(Task::budget(2), Topology::discover(*member), Task::tuning(), *member);
    const std::vector<std::int64_t> ids = {0, 7};
    Routing routing;
    routing.experts = TensorView::dense(ids.data(), DType::kI64, {1, 2});
    std::optional<Error> error;
    if (rank == 1) fail_call("pthread_create", 1);
    try {
      engine.route(Task::shape(), routing).num_rows();  // asynchronous
    } catch (const Error& thrown) {
      error = thrown;
    }
    stop_failing();
    ASSERT_TRUE(error.has_value());
    EXPECT_EQ(error->code, rank == 1 ? ErrorCode::kResource : ErrorCode::kAborted) << error->what();
    EXPECT_THAT(error->what(), testing::HasSubstr("pthread_create"));
  });
}

TEST(ResourceTest, AZeroCopyBufferThatCannotBeHadSpoilsNothing) {
  if (!kCallsCanFail) GTEST_SKIP() << "the sanitizer stands before these calls itself";
  const LocalGroup group(2);
  LocalGroup::run_threads(2, [&](int rank) {
    const auto member = group.member(rank);
    Engine engine = Engine::create(Task::budget(2), Topology::discover(*member), Task::tuning(), *member);
    if (rank == 1) {
      fail_call("mmap", 1);
      try {
        engine.combine_buffer(Task::shape());
        ADD_FAILURE() << "a buffer without memory";
      } catch (const Error& error) {
        EXPECT_EQ(error.code, ErrorCode::kResource) << error.what();
      }
      stop_failing();
    }
    EXPECT_TRUE(engine.combine_buffer(Task::shape()).given());
    Task(2, rank).round(engine, 1);
    engine.close();
  });
}

}  // namespace
}  // namespace anyep::test
