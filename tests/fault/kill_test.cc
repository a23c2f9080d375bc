// F1 to F3: ranks that are killed, at every named point and at random times.
#include <anyep/engine.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/fault_point.h"
#include "fault/notes.h"
#include "fault/task.h"

namespace anyep::test {
namespace {

using std::chrono::milliseconds;

/// Everything a rank passes in a round, in order of the text.
const std::vector<std::string>& points_of_ops() {
  static const std::vector<std::string> points = [] {
    std::vector<std::string> all = {"between", "close"};
    for (const char* op : {"route", "dispatch", "combine", "low_latency_dispatch", "low_latency_combine", "barrier"}) {
      for (const char* phase : {"before_send", "mid_send", "after_flag", "in_recv"}) {
        all.push_back(fmt::format("{}.{}", op, phase));
      }
    }
    return all;
  }();
  return points;
}
const std::vector<std::string> kPointsOfCreate = {"create.connect", "create.exchange", "create.map", "create.barrier"};

struct Plan {
  int num_ranks = 2;
  std::vector<int> victims;
  std::string point = {};                ///< empty = at a random time
  std::vector<milliseconds> after = {};  ///< of each victim, from the end of the first round
  bool create_too = false;               ///< the point lies in create
  int salt = 1;                          ///< of the round with the fault: odd ones use hooks and window rows

  bool is_victim(int rank) const { return std::ranges::count(victims, rank) > 0; }
};

void arm(const Plan& plan, int rank, Note& note) {
  if (!plan.point.empty()) {
    core::set_fault(fmt::format("{}:{}:*:kill", plan.point, rank));
    return;
  }
  const auto which = static_cast<std::size_t>(std::ranges::find(plan.victims, rank) - plan.victims.begin());
  std::thread([delay = plan.after[which], &note] {
    std::this_thread::sleep_for(delay);
    note.fault_ns = now_ns();
    ::kill(::getpid(), SIGKILL);
  }).detach();
}

/// Until something goes wrong.
void work(const LocalGroup& group, int rank, const Plan& plan, Note& note) {
  const auto member = group.member(rank);
  const bool armed_early = plan.create_too && plan.is_victim(rank);
  if (armed_early) arm(plan, rank, note);
  Engine engine = Engine::create(Task::budget(plan.num_ranks), Topology::discover(*member), Task::tuning(), *member);
  Task task(plan.num_ranks, rank);
  task.round(engine, 0);
  if (plan.is_victim(rank) && !armed_early) arm(plan, rank, note);
  const bool at_close = plan.point == "close";
  for (int salt = plan.salt; !at_close; salt += plan.point.empty() ? 1 : 2) task.round(engine, salt);
  engine.close();
}

/// Those whom the errors name are left out, until there is an engine of the rest.
void rebuild(const LocalGroup& group, int rank, std::vector<int> gone) {
  const auto give_up = now_ns() + scaled_ns(10);
  for (;;) {
    std::vector<int> members;
    for (int other = 0; other < group.num_ranks(); ++other) {
      if (std::ranges::count(gone, other) == 0) members.push_back(other);
    }
    try {
      const auto member = group.member_without(rank, gone);
      const auto ranks = static_cast<int>(members.size());
      Engine engine = Engine::create(Task::budget(ranks), Topology::discover(*member), Task::tuning(), *member);
      Task task(ranks, member->rank());
      task.round(engine, 100);
      engine.close();
      return;
    } catch (const Error& error) {
      if (now_ns() > give_up || error.peers.empty()) throw;
      for (const int peer : error.peers) gone.push_back(members[static_cast<std::size_t>(peer)]);
    }
  }
}

void live(const LocalGroup& group, int rank, const Plan& plan, const Notes& notes) {
  end_after(30);
  Note& note = notes[rank];
  if (plan.is_victim(rank) && !plan.point.empty()) note_points(notes);
  std::vector<int> gone;
  try {
    work(group, rank, plan, note);
  } catch (const Error& error) {
    note.put(error);
    gone = error.peers;
  }
  must(note.error_ns != 0, "a survivor saw no error");
  rebuild(group, rank, gone);
  note.rebuilt_ns = now_ns();
  while (plan.is_victim(rank)) ::pause();  // its turn comes, even if others have gone on without the first victim
}

struct Figures {
  Times detection, recovery;
};

void expect_survived(const Plan& plan, Figures& figures) {
  const Notes notes;
  const LocalGroup group(plan.num_ranks);
  const std::vector<int> status =
      LocalGroup::run_processes(plan.num_ranks, [&](int rank) { live(group, rank, plan, notes); });
  std::int64_t killed = 0;
  for (const int victim : plan.victims) {
    const int ended = status[static_cast<std::size_t>(victim)];
    EXPECT_TRUE(WIFSIGNALED(ended) && WTERMSIG(ended) == SIGKILL) << "the victim's status is " << ended;
    killed = std::max<std::int64_t>(killed, notes[victim].fault_ns);
  }
  for (int rank = 0; rank < plan.num_ranks; ++rank) {
    if (plan.is_victim(rank)) continue;
    const Note& note = notes[rank];
    EXPECT_EQ(status[static_cast<std::size_t>(rank)], 0) << "survivor " << rank << ": " << note.describe();
    if (note.error_ns == 0) continue;
    EXPECT_EQ(note.code, static_cast<int>(ErrorCode::kPeerDead)) << note.describe();
    EXPECT_NE(note.peers, 0u) << note.describe();
    for (int peer = 0; peer < plan.num_ranks; ++peer) {
      EXPECT_TRUE(!note.names(peer) || plan.is_victim(peer)) << "blames rank " << peer << ": " << note.describe();
    }
    EXPECT_STRNE(note.op, "") << note.describe();
    EXPECT_STRNE(note.phase, "") << note.describe();
    EXPECT_NE(std::string(note.text).find(note.op), std::string::npos) << note.describe();
    if (plan.victims.size() == 1) {
      EXPECT_TRUE(note.names(plan.victims[0])) << note.describe();
      EXPECT_NE(std::string(note.text).find(fmt::format("rank {}", plan.victims[0])), std::string::npos)
          << note.describe();
      EXPECT_LT(note.error_ns - killed, scaled_ns(1)) << note.describe();
      figures.detection.add(std::max<std::int64_t>(0, note.error_ns - killed));
    }
    figures.recovery.add(note.rebuilt_ns - note.error_ns);
  }
}

void print(const char* what, const Figures& figures) {
  fmt::print("{}: kill to error {}; error to a right round in a new engine {}\n", what, figures.detection.describe(),
             figures.recovery.describe());
}

void kill_at_every_point(int num_ranks, int victim) {
  Figures figures;
  for (const bool create_too : {false, true}) {
    for (const std::string& point : create_too ? kPointsOfCreate : points_of_ops()) {
      for (const int salt : {1, 2}) {
        if (salt == 2 && !point.starts_with("low_latency") && !point.starts_with("combine")) continue;
        SCOPED_TRACE(fmt::format("{} of {} ranks, salt {}", point, num_ranks, salt));
        expect_survived(
            {.num_ranks = num_ranks, .victims = {victim}, .point = point, .create_too = create_too, .salt = salt},
            figures);
        if (testing::Test::HasFailure()) return;
      }
    }
  }
  print(fmt::format("{} ranks, rank {} killed at every named point", num_ranks, victim).c_str(), figures);
}

class KillProcessTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!core::kFaultPoints) GTEST_SKIP() << "this build has no fault points";
  }
};

TEST_F(KillProcessTest, OneOfTwoAtEveryNamedPointIsNamedByTheOther) {
  kill_at_every_point(2, 1);
}

TEST_F(KillProcessTest, RankZeroIsNoSpecialRank) {
  kill_at_every_point(2, 0);
}

TEST_F(KillProcessTest, OneOfFourAtEveryNamedPointIsNamedByAllOthers) {
  kill_at_every_point(4, 2);
}

TEST(KillAtRandomProcessTest, WheneverItComesSurvivorsNameItAndGoOn) {
  std::mt19937_64 random(seed_of_test());
  for (const int num_ranks : {2, 4}) {
    Figures figures;
    for (int round = 0; round < 8 * times_soak(25); ++round) {
      const auto victim = static_cast<int>(random() % static_cast<unsigned>(num_ranks));
      const milliseconds after(random() % 51);
      SCOPED_TRACE(fmt::format("rank {} of {} after {} ms", victim, num_ranks, after.count()));
      expect_survived({.num_ranks = num_ranks, .victims = {victim}, .after = {after}}, figures);
      if (HasFailure()) return;
    }
    print(fmt::format("{} ranks, one killed at a random time", num_ranks).c_str(), figures);
  }
}

TEST(KillAtRandomProcessTest, TwoTogetherAreBothLeftOutInTheEnd) {
  std::mt19937_64 random(seed_of_test());
  Figures figures;
  for (int round = 0; round < 6 * times_soak(25); ++round) {
    const milliseconds first(random() % 31);
    const milliseconds second = first + milliseconds(round % 2 == 0 ? 0 : random() % 20);
    SCOPED_TRACE(fmt::format("after {} and {} ms", first.count(), second.count()));
    expect_survived({.num_ranks = 4, .victims = {1, 3}, .after = {first, second}}, figures);
    if (HasFailure()) return;
  }
  print("two of four killed", figures);
}

TEST(KillAtRandomProcessTest, AllButOneLeaveAnEngineOfOne) {
  std::mt19937_64 random(seed_of_test());
  Figures figures;
  for (int round = 0; round < 4 * times_soak(25); ++round) {
    const milliseconds at(random() % 31);
    SCOPED_TRACE(fmt::format("after {} ms", at.count()));
    expect_survived({.num_ranks = 4, .victims = {0, 1, 3}, .after = {at, at, at}}, figures);
    if (HasFailure()) return;
  }
  print("three of four killed", figures);
}

}  // namespace
}  // namespace anyep::test
