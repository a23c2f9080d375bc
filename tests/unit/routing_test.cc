#include "core/routing.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <vector>

namespace anyep::core {
namespace {

using testing::ElementsAre;

TEST(Routing, BlocksTileTheExpertsAndDifferByAtMostOne) {
  for (const int experts : {1, 2, 7, 48, 256}) {
    for (const int ranks : {1, 2, 3, 5, 8, 9}) {
      int next = 0;
      for (int rank = 0; rank < ranks; ++rank) {
        const ExpertBlock block = expert_block(experts, ranks, rank);
        EXPECT_EQ(block.first, next);
        EXPECT_GE(block.count, experts / ranks);
        EXPECT_LE(block.count, experts / ranks + 1);
        for (int expert = block.first; expert < block.first + block.count; ++expert) {
          EXPECT_EQ(rank_of_expert(experts, ranks, expert), rank);
        }
        next += block.count;
      }
      EXPECT_EQ(next, experts);
    }
  }
}

TEST(Routing, IdsAreComparedInTheirFullWidth) {
  const std::vector<std::int64_t> ids = {
      3, (std::int64_t{1} << 32) + 3, -1, -2, 4, std::numeric_limits<std::int64_t>::max()};
  const ExpertIds checked(TensorView::dense(ids.data(), DType::kI64, {1, 6}), 4);
  std::vector<int> seen;
  for (int choice = 0; choice < 6; ++choice) seen.push_back(checked.at(0, choice));
  EXPECT_THAT(seen, ElementsAre(3, -1, -1, -1, -1, -1));
  EXPECT_EQ(checked.count_out_of_range(), 4u);
}

// 2 ranks x 2 experts; t0 -> e0 e2, t1 -> e0 e0 (a duplicate), t2 -> e3 and nothing.
TEST(Routing, CountsEveryPairAndEachTokenOncePerRank) {
  const std::vector<std::int32_t> ids = {0, 2, 0, 0, -1, 3};
  const Layout layout = count_layout(ExpertIds(TensorView::dense(ids.data(), DType::kI32, {3, 2}), 4), 4, 2);
  EXPECT_THAT(layout.tokens_per_rank, ElementsAre(2, 2));
  EXPECT_THAT(layout.pairs_per_expert, ElementsAre(3, 0, 1, 1));
  EXPECT_THAT(layout.token_in_rank, ElementsAre(1, 1, 1, 0, 0, 1));
}

TEST(Routing, PlacesAreRunningNumbersFromTheFirstRow) {
  const std::vector<std::uint8_t> in_rank = {1, 1, 0, 1, 1, 0};
  const std::vector<std::int64_t> first = {10, 5};
  EXPECT_THAT(places(in_rank, 2, first), ElementsAre(10, 5, -1, 6, 11, -1));
}

}  // namespace
}  // namespace anyep::core
