// Bad inputs of create and of adopted handles: rows 1 to 12, 37 and 43 of the bad-input table (docs/errors.md has the
// codes).
#include <anyep/engine.h>
#include <gmock/gmock.h>

#include <cmath>
#include <limits>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "fault/fixtures.h"

namespace anyep::test {
namespace {

using namespace std::chrono_literals;
using ::testing::HasSubstr;

// What each rank's create() throws; kInternal where it went well.
std::vector<Error> errors_of_create(int num_ranks, const std::function<World(int rank)>& choose) {
  std::vector<Error> errors(static_cast<std::size_t>(num_ranks), Error(ErrorCode::kInternal, "create went well"));
  const LocalGroup group(num_ranks);
  LocalGroup::run_threads(num_ranks, [&](int rank) {
    const std::unique_ptr<Bootstrap> member = group.member(rank);
    const World world = choose(rank);
    try {
      Engine::create(world.budget, Topology::discover(*member), world.tuning, *member).close();
    } catch (const Error& error) {
      errors[static_cast<std::size_t>(rank)] = error;
    }
  });
  return errors;
}

Error error_of_create(const World& world) {
  return errors_of_create(1, [&](int) { return world; })[0];
}

World with_budget(std::int64_t rows_bytes, std::int64_t low_latency_bytes, int max_experts = 64) {
  World world;
  world.budget = {rows_bytes, low_latency_bytes, max_experts, false};
  return world;
}

TEST(BadCreateTest, ABudgetOfNothingOrNegativeOrBeyond64BitsIsRefused) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  constexpr std::int64_t kLeast = std::numeric_limits<std::int64_t>::min();
  expect_argument(error_of_create(with_budget(0, 0)), "create", "nothing");
  for (const std::int64_t bad : {std::int64_t{-1}, kLeast, kMost}) {
    expect_argument(error_of_create(with_budget(bad, 4096)), "create", "rows_bytes");
    expect_argument(error_of_create(with_budget(4096, bad)), "create", "low_latency_bytes");
  }
  for (const int bad : {0, -1, std::numeric_limits<int>::max()}) {
    expect_argument(error_of_create(with_budget(1 << 20, 0, bad)), "create", "max_experts");
  }
}

TEST(BadCreateTest, ABudgetBeyondTheMachinesMemoryIsRefusedWithNeedAndHaveOnAllRanks) {
  constexpr std::int64_t kPetabyte = std::int64_t{1} << 50;
  for (const Error& error : errors_of_create(2, [](int) { return with_budget(kPetabyte, 0); })) {
    EXPECT_EQ(error.code, ErrorCode::kResource) << error.what();
    EXPECT_GE(error.need, static_cast<std::uint64_t>(kPetabyte));
    EXPECT_GT(error.have, 0U);
    EXPECT_LT(error.have, error.need);
  }
}

TEST(BadCreateTest, OneRanksFailureIsThrownOnEveryRankWithItsCause) {
  const auto errors = errors_of_create(3, [](int rank) {
    World world{.num_ranks = 3};
    if (rank == 1) world.budget.rows_bytes = -5;
    return world;
  });
  expect_argument(errors[1], "create", "the rank itself");
  for (const int rank : {0, 2}) {
    const Error& error = errors[static_cast<std::size_t>(rank)];
    EXPECT_NE(error.code, ErrorCode::kInternal) << "rank " << rank << " went on alone";
    EXPECT_THAT(error.what(), HasSubstr("-5"));
    EXPECT_THAT(error.what(), HasSubstr("rank 1"));
  }
}

TEST(BadCreateTest, BudgetsThatDifferAreAMismatchOnAllRanks) {
  const std::function<void(Budget&)> differences[] = {
      [](Budget& budget) { budget.rows_bytes *= 2; }, [](Budget& budget) { budget.low_latency_bytes += 1 << 20; },
      [](Budget& budget) { budget.max_experts = 128; }, [](Budget& budget) { budget.masks = true; }};
  for (const auto& differ : differences) {
    const auto errors = errors_of_create(3, [&](int rank) {
      World world{.num_ranks = 3};
      if (rank == 2) differ(world.budget);
      return world;
    });
    for (const Error& error : errors) {
      EXPECT_EQ(error.code, ErrorCode::kMismatch) << error.what();
      EXPECT_THAT(error.what(), HasSubstr("rank 2"));
    }
  }
}

TEST(BadCreateTest, LimitsOfZeroNegativeOrWithoutEndAreRefused) {
  for (const std::chrono::nanoseconds bad : {0ns, std::chrono::nanoseconds(-1s), std::chrono::nanoseconds::max()}) {
    for (std::chrono::nanoseconds Tuning::*limit :
         {&Tuning::timeout, &Tuning::startup_timeout, &Tuning::close_timeout}) {
      World world;
      world.tuning.*limit = bad;
      expect_argument(error_of_create(world), "create", "limit");
    }
  }
  for (const double bad : {0.0, -2.0, std::nan(""), std::numeric_limits<double>::infinity()}) {
    World world;
    world.tuning.time_scale = bad;
    expect_argument(error_of_create(world), "create", "time_scale");
  }
}

TEST(BadCreateTest, ATopologyOfAnotherGroupIsRefused) {
  const LocalGroup group(1);
  const std::unique_ptr<Bootstrap> member = group.member(0);
  const World world;
  const Error error = error_of([&] { Engine::create(world.budget, Topology::one_host(2, 1), world.tuning, *member); });
  expect_argument(error, "create", "topology");
}

TEST(BadCreateTest, RanksThatCannotShareMemoryAreNamed) {
  const LocalGroup group(2);
  LocalGroup::run_threads(2, [&](int rank) {
    const std::unique_ptr<Bootstrap> member = group.member(rank);
    Topology topology = Topology::discover(*member);
    topology.ranks[1].host += 1;
    topology.ranks[1].node = 1;
    const World world{.num_ranks = 2};
    const Error error = error_of([&] { Engine::create(world.budget, topology, world.tuning, *member); });
    EXPECT_EQ(error.code, ErrorCode::kUnsupported) << error.what();
    EXPECT_THAT(error.what(), HasSubstr("1"));
  });
}

TEST(BadCreateTest, ABootstrapThatMisreportsItsRankIsRefused) {
  const auto copy = [](std::span<const std::byte> mine, std::span<std::byte> all) {
    for (std::size_t at = 0; at < all.size(); ++at) all[at] = mine[at % mine.size()];
  };
  const auto code_of_discover = [&](int rank, int num_ranks) {
    return error_of([&] {
             CallbackBootstrap bootstrap(rank, num_ranks, copy);
             Topology::discover(bootstrap);
           })
        .code;
  };
  EXPECT_EQ(code_of_discover(4, 4), ErrorCode::kArgument);
  EXPECT_EQ(code_of_discover(-1, 4), ErrorCode::kArgument);
  EXPECT_EQ(code_of_discover(0, 0), ErrorCode::kArgument);
  EXPECT_EQ(code_of_discover(0, 1'000'000), ErrorCode::kArgument);
  EXPECT_EQ(code_of_discover(1, 2), ErrorCode::kMismatch) << "both places claim rank 1";
}

// A handle of 2 ranks seen from rank 0: 3 tokens here, 2 at rank 1; rows 0 and 1 from rank 0, row 2 from rank 1.
struct Arrays {
  std::vector<std::int32_t> rows_until = {2, 3};
  std::vector<std::int32_t> place = {0, -1, 1, 0, -1, 1};
  std::vector<std::int32_t> source = {0, 1, 1};
  std::vector<std::int32_t> tokens = {3, 2};

  HandleArrays view() const {
    const auto length = [](const std::vector<std::int32_t>& array) { return static_cast<std::int64_t>(array.size()); };
    HandleArrays arrays;
    arrays.rows_until = TensorView::dense(rows_until.data(), DType::kI32, {length(rows_until)});
    arrays.place = TensorView::dense(place.data(), DType::kI32, {length(place) / 2, 2});
    arrays.source = TensorView::dense(source.data(), DType::kI32, {length(source)});
    arrays.tokens = TensorView::dense(tokens.data(), DType::kI32, {length(tokens)});
    return arrays;
  }
};

TEST(BadHandleTest, WellFormedArraysAreAdopted) {
  const Handle handle = Handle::adopt(2, 0, Arrays().view());
  EXPECT_EQ(handle.num_rows(), 3);
  EXPECT_EQ(handle.num_tokens(), 3);
  EXPECT_TRUE(handle.pairs_per_expert().empty());
}

TEST(BadHandleTest, ForgedValuesAreRefused) {
  const std::pair<const char*, std::function<void(Arrays&)>> forgeries[] = {
      {"rows_until falls",
       [](Arrays& a) {
         a.rows_until = {3, 2};
       }},
      {"rows_until negative",
       [](Arrays& a) {
         a.rows_until = {-1, 3};
       }},
      {"rows_until beyond source",
       [](Arrays& a) {
         a.rows_until = {2, 4};
       }},
      {"rows_until huge",
       [](Arrays& a) {
         a.rows_until = {2, std::numeric_limits<std::int32_t>::max()};
       }},
      {"place below -1", [](Arrays& a) { a.place[1] = -2; }},
      {"place beyond my rows", [](Arrays& a) { a.place[2] = 3; }},
      {"place of another source's row", [](Arrays& a) { a.place[2] = 2; }},
      {"place twice", [](Arrays& a) { a.place[2] = 0; }},
      {"source negative", [](Arrays& a) { a.source[0] = -1; }},
      {"source beyond its tokens", [](Arrays& a) { a.source[2] = 2; }},
      {"tokens negative", [](Arrays& a) { a.tokens[1] = -2; }},
      {"tokens are not mine", [](Arrays& a) { a.tokens[0] = 4; }}};
  for (const auto& [what, forge] : forgeries) {
    Arrays arrays;
    forge(arrays);
    const Error error = error_of([&] { Handle::adopt(2, 0, arrays.view()); });
    EXPECT_EQ(error.code, ErrorCode::kArgument) << what << ": " << error.what();
  }
}

TEST(BadHandleTest, WrongShapesAndTypesAreRefused) {
  const Arrays arrays;
  const std::pair<const char*, std::function<void(HandleArrays&)>> forgeries[] = {
      {"rows_until of another group", [](HandleArrays& a) { a.rows_until.shape[0] = 1; }},
      {"tokens of another group", [](HandleArrays& a) { a.tokens.shape[0] = 3; }},
      {"place of another group",
       [](HandleArrays& a) {
         a.place = TensorView::dense(a.place.data, DType::kI32, {2, 3});
       }},
      {"place flat", [](HandleArrays& a) { a.place = TensorView::dense(a.place.data, DType::kI32, {6}); }},
      {"place truncated",
       [](HandleArrays& a) {
         a.place = TensorView::dense(a.place.data, DType::kI32, {2, 2});
       }},
      {"source truncated", [](HandleArrays& a) { a.source.shape[0] = 2; }},
      {"source of int64", [](HandleArrays& a) { a.source.dtype = DType::kI64; }},
      {"tokens of float32", [](HandleArrays& a) { a.tokens.dtype = DType::kF32; }},
      {"rows_until not given", [](HandleArrays& a) { a.rows_until = {}; }},
      {"source null", [](HandleArrays& a) { a.source.data = nullptr; }},
      {"place with gaps", [](HandleArrays& a) { a.place.strides[0] = 4; }}};
  for (const auto& [what, forge] : forgeries) {
    HandleArrays views = arrays.view();
    forge(views);
    const Error error = error_of([&] { Handle::adopt(2, 0, views); });
    EXPECT_EQ(error.code, ErrorCode::kArgument) << what << ": " << error.what();
  }
  EXPECT_EQ(error_of([&] { Handle::adopt(2, 2, arrays.view()); }).code, ErrorCode::kArgument);
  EXPECT_EQ(error_of([&] { Handle::adopt(0, 0, arrays.view()); }).code, ErrorCode::kArgument);
}

TEST(BadHandleTest, AnEmptyOrMovedHandleIsAStateError) {
  EXPECT_EQ(error_of([] { Handle().num_rows(); }).code, ErrorCode::kState);
  Handle handle = Handle::adopt(2, 0, Arrays().view());
  const Handle moved = std::move(handle);
  EXPECT_EQ(error_of([&] { handle.num_rows(); }).code, ErrorCode::kState);
  EXPECT_EQ(moved.num_tokens(), 3);
}

TEST(BadHandleTest, AnAlignmentBelowOneIsRefused) {
  const Handle handle = Handle::adopt(2, 0, Arrays().view());
  for (const std::int64_t bad : {std::int64_t{0}, std::int64_t{-16}}) {
    EXPECT_EQ(error_of([&] { handle.aligned_pairs_per_expert(bad); }).code, ErrorCode::kArgument);
  }
}

TEST(BadHandleTest, AHandleOfAnotherGroupSizeOrRankIsRefusedByTheEngine) {
  on_ranks(1, [](Engine& engine, int) {
    const Shape shape = small_shape();
    const Tokens mine(3, shape);
    Received out(3, shape);
    const Handle handle = Handle::adopt(2, 0, Arrays().view());
    expect_argument(error_of([&] { engine.dispatch(mine.rows(), handle, out.rows(), {}, waiting()); }), "dispatch",
                    "group size");
    CombineInput in;
    in.x = out.rows().x;
    Rows result;
    result.x = mine.x_view();
    expect_argument(error_of([&] { engine.combine(in, handle, result, {}, waiting()); }), "combine", "group size");
    expect_usable(engine);
  });
}

}  // namespace
}  // namespace anyep::test
