#include <anyep/plan.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "unit/thrown.h"

namespace anyep {
namespace {

using testing::HasSubstr;

Shape deepseek(std::int64_t tokens) {
  Shape shape;
  shape.num_experts = 256;
  shape.top_k = 8;
  shape.hidden = 7168;
  shape.max_tokens = tokens;
  return shape;
}

Budget roomy(const Shape& shape, int ranks) {
  Budget budget;
  budget.rows_bytes = std::int64_t{1} << 30;
  budget.low_latency_bytes = low_latency_bytes_for(shape, ranks);
  return budget;
}

TEST(Plan, EveryOpPrintsItsChoicesWithReasonsAndItsMemory) {
  const Shape shape = deepseek(128);
  for (const Op op :
       {Op::kRoute, Op::kDispatch, Op::kCombine, Op::kLowLatencyDispatch, Op::kLowLatencyCombine, Op::kBarrier}) {
    const Plan plan = make_plan(op, shape, roomy(shape, 4), Topology::one_host(4));
    EXPECT_THAT(plan.to_text(), HasSubstr(name_of(op)));
    for (const Choice& choice : plan.choices) EXPECT_FALSE(choice.why.empty()) << choice.what;
    EXPECT_TRUE(std::any_of(plan.choices.begin(), plan.choices.end(),
                            [](const Choice& one) { return one.value == "rejected"; }));
    for (const PlanRegion& region : plan.memory) EXPECT_LE(region.backed, region.bytes + 4095);
  }
}

TEST(Plan, TheBudgetForAShapeHoldsEveryFormOfIt) {
  for (const int ranks : {1, 2, 3, 8}) {
    const Shape shape = deepseek(128);
    const Budget budget = roomy(shape, ranks);
    for (const Wire wire : {Wire::kBF16, Wire::kFP8, Wire::kUE8M0}) {
      LowLatencyOptions options;
      options.wire = wire;
      EXPECT_NO_THROW(make_plan(Op::kLowLatencyDispatch, shape, budget, Topology::one_host(ranks), {}, options));
    }
    for (const bool hook : {false, true}) {
      LowLatencyOptions options;
      options.hook = hook;
      const Plan plan = make_plan(Op::kLowLatencyCombine, shape, budget, Topology::one_host(ranks), {}, options);
      EXPECT_EQ(plan.sums_at_expert_rank, !hook);
    }
  }
}

TEST(Plan, ALowLatencyShapeBeyondTheBudgetSaysNeedAndHave) {
  const Shape shape = deepseek(128);
  Budget budget = roomy(shape, 2);
  budget.low_latency_bytes = 1 << 20;
  const Error error = test::thrown([&] { make_plan(Op::kLowLatencyDispatch, shape, budget, Topology::one_host(2)); });
  EXPECT_EQ(error.code, ErrorCode::kCapacity);
  EXPECT_GT(error.need, error.have);
}

TEST(Plan, PredictsTheFloorFromTheCopyRate) {
  const Shape shape = deepseek(4096);
  const Plan plan = make_plan(Op::kDispatch, shape, roomy(deepseek(128), 2), Topology::one_host(2), {}, {}, 10.0);
  // 1.993 rows of 14336 bytes per token at 10 GB/s.
  EXPECT_NEAR(plan.predicted_us, 4096 * 1.9926 * 14336 / 10e3, 20);
}

TEST(Plan, RefusesAShapeByNamingTheField) {
  Shape shape = deepseek(16);
  shape.top_k = 33;
  const Error error =
      test::thrown([&] { make_plan(Op::kDispatch, shape, roomy(deepseek(16), 2), Topology::one_host(2)); });
  EXPECT_EQ(error.code, ErrorCode::kArgument);
  EXPECT_EQ(error.argument, "shape.top_k");
}

}  // namespace
}  // namespace anyep
