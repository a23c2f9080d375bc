// Bad inputs of routing: rows 14 to 24 and 39 of the bad-input table, for both modes.
#include <anyep/engine.h>
#include <anyep/plan.h>
#include <gmock/gmock.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "fault/fixtures.h"

namespace anyep::test {
namespace {

using ::testing::HasSubstr;

constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
constexpr std::int64_t kLeast = std::numeric_limits<std::int64_t>::min();

// A view that claims more memory than there is must be refused by its shape, never read.
TensorView view(const void* data, DType dtype, const Extents& shape) {
  return TensorView::dense(data, dtype, shape);
}

void expect_route_refused(const char* what, const Shape& shape, const Routing& routing) {
  on_ranks(1, [&](Engine& engine, int) {
    expect_argument(error_of([&] { engine.route(shape, routing, {}, waiting()); }), "route", what);
    expect_usable(engine);
  });
}

void expect_low_latency_refused(const char* what, const Shape& shape, const Routing& routing) {
  on_ranks(1, [&](Engine& engine, int) {
    const Tokens mine(3, small_shape());
    Slabs slabs(small_shape(), 1, 0);
    const Error error = error_of([&] { engine.low_latency_dispatch(shape, mine.x_view(), routing, slabs.view()); });
    expect_argument(error, "low_latency_dispatch", what);
    expect_usable(engine);
  });
}

TEST(BadRouteTest, IdsOfAnotherTypeAreRefusedAndTheAllowedListed) {
  const Tokens mine(3, small_shape());
  for (const DType dtype : {DType::kF32, DType::kI8, DType::kI16, DType::kBool, DType::kU8, DType::kF64}) {
    Routing routing;
    routing.experts = view(mine.ids.data(), dtype, {3, 2});
    expect_route_refused(name_of(dtype), mine.shape, routing);
    expect_low_latency_refused(name_of(dtype), mine.shape, routing);
  }
  on_ranks(1, [&](Engine& engine, int) {
    Routing routing;
    routing.experts = view(mine.ids.data(), DType::kI16, {3, 2});
    const Error error = error_of([&] { engine.route(mine.shape, routing); });
    EXPECT_THAT(error.what(), HasSubstr("int16"));
    EXPECT_THAT(error.allowed, HasSubstr("int32"));
    EXPECT_THAT(error.allowed, HasSubstr("int64"));
  });
}

TEST(BadRouteTest, IdsOfAnotherNumberOfDimensionsAreRefused) {
  const Tokens mine(4, small_shape());
  for (const Extents& shape : {Extents{8}, Extents{2, 2, 2}, Extents{1, 2, 2, 2}}) {
    Routing routing;
    routing.experts = view(mine.ids.data(), DType::kI64, shape);
    expect_route_refused("dimensions", mine.shape, routing);
    expect_low_latency_refused("dimensions", mine.shape, routing);
  }
}

TEST(BadRouteTest, IdsWithGapsOrNegativeStridesAreRefused) {
  const Tokens mine(8, small_shape());
  for (const Extents& strides : {Extents{4, 1}, Extents{1, 3}, Extents{2, -1}, Extents{-2, 1}, Extents{0, 1}}) {
    Routing routing;
    routing.experts = {const_cast<std::int64_t*>(mine.ids.data()) + 8, DType::kI64, {3, 2}, strides};
    expect_route_refused("strides", mine.shape, routing);
    expect_low_latency_refused("strides", mine.shape, routing);
  }
}

TEST(BadRouteTest, ANullPointerWithTokensIsRefused) {
  Routing routing;
  routing.experts = view(nullptr, DType::kI64, {3, 2});
  expect_route_refused("null", small_shape(), routing);
  expect_low_latency_refused("null", small_shape(), routing);
}

TEST(BadRouteTest, NegativeAndHugeExtentsAreRefused) {
  const Tokens mine(3, small_shape());
  for (const std::int64_t bad : {std::int64_t{-1}, kLeast, kMost, std::int64_t{1} << 40}) {
    Routing routing;
    routing.experts = view(mine.ids.data(), DType::kI64, {3, 2});
    routing.experts.shape[0] = bad;
    expect_route_refused("extent", mine.shape, routing);
  }
}

TEST(BadRouteTest, NumbersOfExpertsOutsideTheBudgetAreRefused) {
  const Tokens mine(3, small_shape());
  for (const int bad : {0, -1, 65, std::numeric_limits<int>::max(), std::numeric_limits<int>::min()}) {
    Shape shape = small_shape();
    shape.num_experts = bad;
    expect_route_refused("num_experts", shape, mine.routing());
    expect_low_latency_refused("num_experts", shape, mine.routing());
  }
}

TEST(BadRouteTest, ExpertsNeedNotDivideByRanks) {
  on_ranks(2, [](Engine& engine, int rank) {
    Shape shape = small_shape();
    shape.num_experts = 5;
    const Tokens mine(5, shape, rank);
    const Handle handle = engine.route(shape, mine.routing());
    EXPECT_EQ(handle.pairs_per_expert().size(), rank == 0 ? 3U : 2U);
  });
}

TEST(BadRouteTest, TopKOutsideOneToThirtyTwoOrAboveTheExpertsIsRefused) {
  for (const int bad : {0, -1, 33, 64}) {
    Shape shape = small_shape();
    shape.num_experts = 64;
    shape.top_k = bad;
    const std::vector<std::int64_t> ids(3 * 64);
    Routing routing;
    routing.experts = view(ids.data(), DType::kI64, {3, std::max(bad, 0)});
    expect_route_refused("top_k", shape, routing);
    expect_low_latency_refused("top_k", shape, routing);
  }
  Shape shape = small_shape();
  shape.top_k = shape.num_experts + 1;
  const std::vector<std::int64_t> ids(static_cast<std::size_t>(3 * shape.top_k));
  Routing routing;
  routing.experts = view(ids.data(), DType::kI64, {3, shape.top_k});
  expect_route_refused("top_k above num_experts", shape, routing);
}

TEST(BadRouteTest, AShapeThatContradictsTheIdsIsRefused) {
  const Tokens mine(3, small_shape());
  Shape shape = small_shape();
  shape.top_k = 3;
  expect_route_refused("top_k of the shape", shape, mine.routing());
  expect_low_latency_refused("top_k of the shape", shape, mine.routing());
}

TEST(BadRouteTest, SideTablesOfWrongShapeOrTypeAreRefused) {
  const Tokens mine(3, small_shape());
  const std::vector<std::uint8_t> ranks(64, 1);
  const std::vector<std::int32_t> pairs(64, 1);
  const std::pair<const char*, std::function<void(Routing&)>> cases[] = {
      {"ranks of another group",
       [&](Routing& r) {
         r.ranks = view(ranks.data(), DType::kBool, {3, 2});
       }},
      {"ranks of other tokens",
       [&](Routing& r) {
         r.ranks = view(ranks.data(), DType::kBool, {4, 1});
       }},
      {"ranks of int32",
       [&](Routing& r) {
         r.ranks = view(pairs.data(), DType::kI32, {3, 1});
       }},
      {"pairs of other experts", [&](Routing& r) { r.pairs_per_expert = view(pairs.data(), DType::kI32, {5}); }},
      {"pairs of int64", [&](Routing& r) { r.pairs_per_expert = view(mine.ids.data(), DType::kI64, {6}); }},
      {"nothing given", [](Routing& r) { r.experts = {}; }}};
  for (const auto& [what, change] : cases) {
    Routing routing;
    routing.experts = mine.experts();
    change(routing);
    expect_route_refused(what, mine.shape, routing);
  }
}

// ---- ids out of range
// --------------------------------------------------------------------------------------------------

struct Id {
  const char* what;
  std::int64_t value;
};
constexpr Id kBadIds[] = {{"num_experts", 6},    {"2^32 + 3", (std::int64_t{1} << 32) + 3},
                          {"INT64_MAX", kMost},  {"-2", -2},
                          {"INT64_MIN", kLeast}, {"-2^32 + 1", -(std::int64_t{1} << 32) + 1}};

TEST(BadIdTest, AreDroppedAndCountedInHighThroughput) {
  for (const auto& [what, value] : kBadIds) {
    on_ranks(2, [&, value = value, what = what](Engine& engine, int rank) {
      Tokens mine(4, small_shape(), rank);
      mine.ids[2] = value;
      mine.ids[3] = 1;
      const Handle handle = engine.route(mine.shape, mine.routing());
      std::int64_t pairs = 0;
      for (const std::int64_t count : handle.pairs_per_expert()) pairs += count;
      // Ids {0 1} {bad 1} {2 3} {3 4} from both ranks; rank 0 hosts 0 to 2.
      EXPECT_EQ(pairs, rank == 0 ? 2 * 4 : 2 * 3) << what;
      EXPECT_EQ(handle.num_rows(), rank == 0 ? 2 * 3 : 2 * 2) << what;
      EXPECT_EQ(engine.ids_out_of_range(), 1U) << what;
      Received received(handle.num_rows(), mine.shape);
      Rows rows = mine.rows();
      engine.dispatch(rows, handle, received.rows(), {}, waiting());
      for (const std::int64_t id : received.experts) EXPECT_TRUE(id >= -1 && id < 3) << what << " arrived as " << id;
      expect_usable(engine);
    });
  }
}

TEST(BadIdTest, AreDroppedAndCountedInLowLatency) {
  for (const auto& [what, value] : kBadIds) {
    on_ranks(2, [&, value = value, what = what](Engine& engine, int rank) {
      Tokens mine(4, small_shape(), rank);
      mine.ids[2] = value;
      mine.ids[3] = 1;
      Slabs slabs(mine.shape, 2, rank);
      engine.low_latency_dispatch(mine.shape, mine.x_view(), mine.routing(), slabs.view()).receive().wait();
      std::int64_t pairs = 0;
      for (const std::int32_t count : slabs.counts) pairs += count;
      EXPECT_EQ(pairs, rank == 0 ? 2 * 4 : 2 * 3) << what;
      EXPECT_GE(engine.ids_out_of_range(), 1U) << what;
      expect_usable(engine);
    });
  }
}

TEST(BadIdTest, NarrowIdsAreComparedInTheirOwnWidth) {
  on_ranks(1, [](Engine& engine, int) {
    const Shape shape = small_shape();
    const std::vector<std::int32_t> ids = {
        0, 1, 6, std::numeric_limits<std::int32_t>::max(), std::numeric_limits<std::int32_t>::min(), -2};
    Routing routing;
    routing.experts = view(ids.data(), DType::kI32, {3, 2});
    const Handle handle = engine.route(shape, routing);
    EXPECT_EQ(handle.num_rows(), 1);
    EXPECT_EQ(engine.ids_out_of_range(), 4U);
  });
}

TEST(BadIdTest, AreAnErrorInCheckedModeThatNamesTokenChoiceAndValue) {
  for (const auto& [what, value] : kBadIds) {
    World world{.num_ranks = 1};
    world.tuning.checked = true;
    on_ranks(world, [&, value = value, what = what](Engine& engine, int) {
      Tokens mine(4, small_shape());
      mine.ids[5] = value;  // token 2, choice 1
      const Error error = error_of([&] { engine.route(mine.shape, mine.routing(), {}, waiting()); });
      expect_argument(error, "route", what);
      EXPECT_THAT(error.got, HasSubstr(std::to_string(value)));
      EXPECT_THAT(error.what(), HasSubstr("2"));
      Slabs slabs(mine.shape, 1, 0);
      expect_argument(
          error_of([&] {
            engine.low_latency_dispatch(mine.shape, mine.x_view(), mine.routing(), slabs.view()).receive().wait();
          }),
          "low_latency_dispatch", what);
      expect_usable(engine);
    });
  }
}

TEST(BadIdTest, MinusOneMeansUnusedAndIsNotCounted) {
  World world{.num_ranks = 1};
  world.tuning.checked = true;
  on_ranks(world, [](Engine& engine, int) {
    Tokens mine(3, small_shape());
    mine.ids[0] = -1;
    mine.ids[2] = mine.ids[3] = -1;
    const Handle handle = engine.route(mine.shape, mine.routing());
    EXPECT_EQ(handle.num_rows(), 2);
    EXPECT_EQ(engine.ids_out_of_range(), 0U);
  });
}

TEST(BadIdTest, NoChoicesAtAllGiveEmptyOutputs) {
  for (const bool everywhere : {true, false}) {
    on_ranks(2, [&](Engine& engine, int rank) {
      Tokens mine(3, small_shape(), rank);
      if (everywhere || rank == 1) std::ranges::fill(mine.ids, -1);
      const Handle handle = engine.route(mine.shape, mine.routing());
      // Rank 0's ids {0 1} {1 2} {2 3}: all three go to rank 0, the last to rank 1 too.
      EXPECT_EQ(handle.num_rows(), everywhere ? 0 : rank == 0 ? 3 : 1);
      Received received(handle.num_rows(), mine.shape);
      engine.dispatch(mine.rows(), handle, received.rows(), {}, waiting());
      std::vector<std::uint16_t> answer(mine.x.size(), 0xffff);
      CombineInput in;
      in.x = received.rows().x;
      Rows out;
      out.x = TensorView::dense(answer.data(), DType::kBF16, {3, mine.shape.hidden});
      engine.combine(in, handle, out, {}, waiting());
      if (everywhere || rank == 1) {
        EXPECT_TRUE(std::ranges::all_of(answer, [](std::uint16_t bits) { return bits == 0; }))
            << "a token that went nowhere sums to zero";
      }
      expect_usable(engine);
    });
  }
}

TEST(DuplicateTest, AnExpertTwiceInARowCountsTwiceButSendsTheRowOnce) {
  World world{.num_ranks = 1};
  world.tuning.checked = true;  // legal there too
  on_ranks(world, [](Engine& engine, int) {
    Tokens mine(2, small_shape());
    mine.ids = {3, 3, 4, 3};
    const Handle handle = engine.route(mine.shape, mine.routing());
    EXPECT_EQ(handle.num_rows(), 2);
    EXPECT_EQ(handle.pairs_per_expert()[3], 3);
    EXPECT_EQ(handle.pairs_per_expert()[4], 1);
    Slabs slabs(mine.shape, 1, 0);
    engine.low_latency_dispatch(mine.shape, mine.x_view(), mine.routing(), slabs.view()).receive().wait();
    EXPECT_EQ(slabs.counts[3], 2) << "low latency sends each (token, expert) once";
    EXPECT_EQ(slabs.counts[4], 1);
  });
}

TEST(DuplicateTest, EveryTokenThirtyTwoTimesToOneExpertStaysWithinItsSlab) {
  World world{.num_ranks = 2};
  Shape shape = small_shape();
  shape.num_experts = 64;
  shape.top_k = 32;
  world.budget.low_latency_bytes = 4 * low_latency_bytes_for(shape, 2);
  on_ranks(world, [&](Engine& engine, int rank) {
    Tokens mine(8, shape, rank);
    std::ranges::fill(mine.ids, 40);
    Slabs slabs(shape, 2, rank);
    engine.low_latency_dispatch(shape, mine.x_view(), mine.routing(), slabs.view()).receive().wait();
    for (std::size_t expert = 0; expert < slabs.counts.size(); ++expert) {
      EXPECT_EQ(slabs.counts[expert], rank == 1 && expert == 8 ? 16 : 0);
    }
    const Handle handle = engine.route(shape, mine.routing());
    EXPECT_EQ(handle.num_rows(), rank == 1 ? 16 : 0);
  });
}

TEST(GivenCountsTest, CountsThatContradictTheIdsAreAnErrorInCheckedMode) {
  World world{.num_ranks = 1};
  world.tuning.checked = true;
  on_ranks(world, [](Engine& engine, int) {
    const Tokens mine(3, small_shape());
    std::vector<std::int32_t> pairs(6, 1);
    pairs[0] = 100;
    Routing routing = mine.routing();
    routing.pairs_per_expert = TensorView::dense(pairs.data(), DType::kI32, {6});
    expect_argument(error_of([&] { engine.route(mine.shape, routing, {}, waiting()); }), "route", "pairs");
    expect_usable(engine);
  });
}

TEST(GivenCountsTest, CountsThatContradictTheIdsHarmNoMemoryOtherwise) {
  for (const std::int32_t bad : {-1, 100, std::numeric_limits<std::int32_t>::max()}) {
    on_ranks(2, [bad](Engine& engine, int rank) {
      const Tokens mine(3, small_shape(), rank);
      std::vector<std::int32_t> pairs(6, bad);
      Routing routing = mine.routing();
      routing.pairs_per_expert = TensorView::dense(pairs.data(), DType::kI32, {6});
      try {
        const Handle handle = engine.route(mine.shape, routing);
        Received received(handle.num_rows(), mine.shape);
        engine.dispatch(mine.rows(), handle, received.rows(), {}, waiting());
      } catch (const Error& error) {
        EXPECT_TRUE(error.code == ErrorCode::kCorrupt || error.code == ErrorCode::kArgument) << error.what();
      }
    });
  }
}

}  // namespace
}  // namespace anyep::test
