// Why a rank leaves is passed on by its peers, who may be gone themselves before everybody has heard; the blame stays.
#include <anyep/engine.h>
#include <gmock/gmock.h>

#include "fault/task.h"

namespace anyep::test {
namespace {

Error work_until_error(Engine& engine, Task& task) {
  for (int salt = 1;; ++salt) {
    try {
      task.round(engine, salt);
    } catch (const Error& error) {
      return error;
    }
  }
}

// The leaver hears that the others leave because of it, and its passing that on must not turn the blame around.
TEST(RelayTest, TheRankThatLeftIsNamedWhoeverIsHeardOfFirst) {
  constexpr int kRanks = 5;
  for (int repeat = 0; repeat < 100 && !HasFailure(); ++repeat) {
    const int leaver = repeat % kRanks;
    const LocalGroup group(kRanks);
    LocalGroup::run_threads(kRanks, [&](int rank) {
      const auto member = group.member(rank);
      Engine engine = Engine::create(Task::budget(kRanks), Topology::discover(*member), Task::tuning(), *member);
      Task task(kRanks, rank);
      task.round(engine, 0);
      if (rank == leaver) {
        EXPECT_THROW(engine.close(), Error) << "the others leave with an error";
        return;
      }
      const Error error = work_until_error(engine, task);
      EXPECT_EQ(error.code, ErrorCode::kAborted) << error.what();
      EXPECT_THAT(error.peers, ::testing::ElementsAre(leaver)) << "rank " << rank << ": " << error.what();
    });
  }
}

}  // namespace
}  // namespace anyep::test
