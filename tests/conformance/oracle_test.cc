// The oracle against answers worked out by hand.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>

#include "reference/high_throughput.h"
#include "reference/low_latency.h"
#include "reference/routing.h"

namespace anyep::test {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

template <class T>
TensorView matrix(const std::vector<T>& values, DType dtype, std::int64_t columns) {
  return TensorView::dense(values.data(), dtype, {static_cast<std::int64_t>(values.size()) / columns, columns});
}

template <class T>
std::vector<T> values_of(const std::vector<std::byte>& bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

/// 2 ranks x 2 experts, top-2; rank 0 hosts e0, e1. Rank 0: t0 -> e0 e2, t1 -> e0 e1, t2 -> - e3. Rank 1 brings t0 ->
/// e2 e2.
class TwoRanks : public testing::Test {
 protected:
  const std::vector<std::int64_t> ids_0 = {0, 2, 0, 1, -1, 3}, ids_1 = {2, 2};
  const std::vector<float> weights_0 = {0.5f, 0.25f, 0.125f, 2, 4, 8}, weights_1 = {1, 2};
  const std::vector<Routing> routing = {{matrix(ids_0, DType::kI64, 2), {}, {}, matrix(weights_0, DType::kF32, 2)},
                                        {matrix(ids_1, DType::kI64, 2), {}, {}, matrix(weights_1, DType::kF32, 2)}};
  const std::vector<reference::Route> routes = reference::route(4, routing);
};

TEST_F(TwoRanks, RouteSendsATokenOncePerHostingRank) {
  EXPECT_THAT(routes[0].source, ElementsAre(0, 1));
  EXPECT_THAT(routes[1].source, ElementsAre(0, 2, 0));
  EXPECT_THAT(routes[0].rows_until, ElementsAre(2, 2));
  EXPECT_THAT(routes[1].rows_until, ElementsAre(2, 3));
  EXPECT_THAT(routes[0].place, ElementsAre(0, 0, 1, -1, -1, 1));
  EXPECT_THAT(routes[1].place, ElementsAre(-1, 2));
  EXPECT_THAT(routes[0].tokens, ElementsAre(3, 1));
}

TEST_F(TwoRanks, CountsCountEveryPair) {
  EXPECT_THAT(routes[0].pairs_per_expert, ElementsAre(2, 1));
  EXPECT_THAT(routes[1].pairs_per_expert, ElementsAre(3, 1));  // e2: t0 of rank 0, twice t0 of rank 1
  const Layout layout = reference::layout(2, 4, routing[0]);
  EXPECT_THAT(layout.tokens_per_rank, ElementsAre(2, 2));
  EXPECT_THAT(layout.pairs_per_expert, ElementsAre(2, 1, 1, 1));
  EXPECT_THAT(layout.token_in_rank, ElementsAre(1, 1, 1, 0, 0, 1));
}

TEST_F(TwoRanks, DispatchMakesIdsLocalAndClearsWeightsOfOthers) {
  const std::vector<std::uint8_t> x_0 = {10, 11, 20, 21, 30, 31}, x_1 = {40, 41};
  std::vector<Rows> in(2);
  in[0] = {matrix(x_0, DType::kU8, 2), {}, routing[0].experts, routing[0].weights, {}};
  in[1] = {matrix(x_1, DType::kU8, 2), {}, routing[1].experts, routing[1].weights, {}};
  const auto received = reference::dispatch(routes, in);
  EXPECT_THAT(values_of<std::uint8_t>(received[0].x), ElementsAre(10, 11, 20, 21));
  EXPECT_THAT(values_of<std::uint8_t>(received[1].x), ElementsAre(10, 11, 30, 31, 40, 41));
  EXPECT_THAT(received[0].experts, ElementsAre(0, -1, 0, 1));
  EXPECT_THAT(received[1].experts, ElementsAre(-1, 0, -1, 1, 0, 0));
  EXPECT_THAT(received[0].weights, ElementsAre(0.5f, 0, 0.125f, 2));
  EXPECT_THAT(received[1].weights, ElementsAre(0, 0.25f, 0, 8, 1, 2));

  const std::vector<std::int64_t> room = {4, 2};
  const auto other = reference::dispatch(routes, in, room);
  EXPECT_EQ(other[0].num_rows, 2);
  EXPECT_THAT(other[0].experts, ElementsAre(0, -1, 0, 1, -1, -1, -1, -1));
  EXPECT_THAT(values_of<std::uint8_t>(other[1].x), ElementsAre(10, 11, 30, 31));
}

TEST_F(TwoRanks, CombineAddsBiasesThenRanks) {
  const std::vector<float> x_0 = {1, 2}, x_1 = {0x1p-24f, 64, 128};  // one column
  const std::vector<float> bias = {8, 16, 32};
  std::vector<CombineInput> in(2);
  in[0].x = matrix(x_0, DType::kF32, 1);
  in[1].x = matrix(x_1, DType::kF32, 1);
  in[0].bias[1] = matrix(bias, DType::kF32, 1);
  const auto combined = reference::combine(routes, in);
  EXPECT_THAT(values_of<float>(combined[0].x), ElementsAre(9, 18, 96));  // 2^-24 is lost: float32, in this order
  EXPECT_THAT(values_of<float>(combined[1].x), ElementsAre(128));
}

TEST_F(TwoRanks, LowLatencyPacksOneRowPerTokenAndExpert) {
  const std::vector<std::uint16_t> x_0 = {10, 20, 30}, x_1 = {40};
  const std::vector<TensorView> x = {matrix(x_0, DType::kBF16, 1), matrix(x_1, DType::kBF16, 1)};
  Shape shape;
  shape.num_experts = 4;
  shape.top_k = 2;
  shape.hidden = 1;
  shape.max_tokens = 3;
  const auto slabs = reference::low_latency_dispatch(shape, x, routing);
  EXPECT_THAT(slabs[0].counts, ElementsAre(2, 1));
  EXPECT_THAT(slabs[1].counts, ElementsAre(2, 1));
  const auto rows = values_of<std::uint16_t>(slabs[1].x);
  EXPECT_THAT(std::vector(rows.begin(), rows.begin() + 2), ElementsAre(10, 40));
  EXPECT_EQ(rows[6], 30);
  const std::int64_t one = 1;
  EXPECT_THAT(slabs[1].range, ElementsAre(one, (one << 32) | 1, one, one << 32));
  EXPECT_THAT(slabs[0].range, ElementsAre(2, std::int64_t{2} << 32, 1, one << 32));
}

/// 2 ranks x 1 expert; rank 0's only token chooses e0, e1, e0; all rows are 1 in BF16.
class ThreeChoices : public testing::Test {
 protected:
  std::uint16_t sum(const std::vector<float>& weights, const reference::SumRule& rule) const {
    const std::vector<std::int32_t> ids = {0, 1, 0}, none;
    const std::vector<float> no_weights;
    const std::vector<std::uint16_t> slab = {0x3f80, 0x3f80};
    const std::vector<std::int32_t> source = {0, 0};
    const std::vector<std::int64_t> range = {1, std::int64_t{1} << 32};
    Shape shape;
    shape.num_experts = 2;
    shape.top_k = 3;
    shape.hidden = 1;
    shape.max_tokens = 1;
    ExpertSlabs slabs;
    slabs.x = TensorView::dense(slab.data(), DType::kBF16, {1, 2, 1});
    slabs.source = TensorView::dense(source.data(), DType::kI32, {1, 2});
    slabs.range = TensorView::dense(range.data(), DType::kI64, {1, 2});
    const std::vector<ExpertSlabs> in = {slabs, slabs};
    const std::vector<Routing> routing = {{matrix(ids, DType::kI32, 3), {}, {}, matrix(weights, DType::kF32, 3)},
                                          {matrix(none, DType::kI32, 3), {}, {}, matrix(no_weights, DType::kF32, 3)}};
    return values_of<std::uint16_t>(reference::low_latency_combine(shape, in, routing, rule)[0]).at(0);
  }
};

// e0 gets 1 and 2^-8, which BF16 cannot hold together: tie to even gives 1. Then 2^-8 of e1: tie again, 1.
// Exactly: 1 + 2^-7, which BF16 holds.
TEST_F(ThreeChoices, DefaultSumRoundsPerRankExactSumOnce) {
  EXPECT_EQ(sum({1, 0x1p-8f, 0x1p-8f}, {}), 0x3f80);
  EXPECT_EQ(sum({1, 0x1p-8f, 0x1p-8f}, {.exact = true}), 0x3f81);
}

// Every weight of an expert chosen twice applies: 1 + 4 from e0, 2 from e1.
TEST_F(ThreeChoices, EveryWeightOfADuplicateApplies) {
  EXPECT_EQ(sum({1, 2, 4}, {}), 0x40e0);
}

TEST(Oracle, BlocksOfExpertsDifferByAtMostOne) {
  EXPECT_EQ(reference::experts_of(0, 3, 8).count, 3);
  EXPECT_EQ(reference::experts_of(2, 3, 8).first, 6);
  EXPECT_EQ(reference::experts_of(2, 3, 8).count, 2);
  EXPECT_EQ(reference::experts_of(3, 4, 2).first, 2);
  EXPECT_EQ(reference::experts_of(3, 4, 2).count, 0);
}

TEST(Oracle, IdsAreComparedInSixtyFourBits) {
  const std::vector<std::int64_t> ids = {(std::int64_t{1} << 32) + 1, -(std::int64_t{1} << 32), 4, -2, 1};
  const std::vector<Routing> routing = {{matrix(ids, DType::kI64, 5), {}, {}, {}}};
  const auto routes = reference::route(4, routing);
  EXPECT_THAT(routes[0].pairs_per_expert, ElementsAre(0, 1, 0, 0));
  EXPECT_EQ(routes[0].ids_out_of_range, 4u);
}

TEST(Oracle, NoTokensGiveEmptyAnswers) {
  const std::vector<std::int64_t> none;
  const std::vector<Routing> routing = {{matrix(none, DType::kI64, 2), {}, {}, {}}};
  const auto routes = reference::route(4, routing);
  EXPECT_THAT(routes[0].source, IsEmpty());
  EXPECT_THAT(routes[0].rows_until, ElementsAre(0));
}

}  // namespace
}  // namespace anyep::test
