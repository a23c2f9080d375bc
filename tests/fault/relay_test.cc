// Why a rank leaves is passed on by its peers, who may be gone themselves before everybody has heard; the blame stays.
#include <anyep/engine.h>
#include <gmock/gmock.h>

#include "fault/task.h"

namespace anyep::test {
namespace {

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
      if (rank == leaver) {
        task.round(engine, 0);
        EXPECT_THROW(engine.close(), Error) << "the others leave with an error";
        return;
      }
      const Error error = task.rounds_until_error(engine);
      EXPECT_EQ(error.code, ErrorCode::kAborted) << error.what();
      EXPECT_THAT(error.peers, ::testing::ElementsAre(leaver)) << "rank " << rank << ": " << error.what();
    });
  }
}

}  // namespace
}  // namespace anyep::test
