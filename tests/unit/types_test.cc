#include <anyep/config.h>
#include <anyep/types.h>
#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <set>
#include <string>

namespace anyep {
namespace {

TensorView view_of(const Extents& shape, const Extents& strides) {
  return {nullptr, DType::kF32, shape, strides};
}

TEST(TypesTest, ElementSizesAndNamesAreThoseOfArrayLibraries) {
  const struct {
    DType dtype;
    std::size_t bytes;
    const char* name;
  } expected[] = {{DType::kBool, 1, "bool"},
                  {DType::kU8, 1, "uint8"},
                  {DType::kI8, 1, "int8"},
                  {DType::kI16, 2, "int16"},
                  {DType::kI32, 4, "int32"},
                  {DType::kI64, 8, "int64"},
                  {DType::kF8E4M3, 1, "float8_e4m3fn"},
                  {DType::kBF16, 2, "bfloat16"},
                  {DType::kF16, 2, "float16"},
                  {DType::kF32, 4, "float32"},
                  {DType::kF64, 8, "float64"}};
  for (const auto& [dtype, bytes, name] : expected) {
    EXPECT_EQ(size_of(dtype), bytes) << name;
    EXPECT_STREQ(name_of(dtype), name);
  }
  EXPECT_EQ(size_of(static_cast<DType>(99)), 0U);
}

TEST(TypesTest, EveryOperationHasItsOwnName) {
  std::set<std::string> names;
  for (int op = 0; op <= static_cast<int>(Op::kBarrier); ++op) names.insert(name_of(static_cast<Op>(op)));
  EXPECT_EQ(names, (std::set<std::string>{"route", "dispatch", "combine", "low_latency_dispatch", "low_latency_combine",
                                          "barrier"}));
}

TEST(TypesTest, DenseViewsAreDense) {
  EXPECT_TRUE(TensorView::dense(nullptr, DType::kBF16, {3, 4, 5}).is_dense());
  EXPECT_TRUE(TensorView::dense(nullptr, DType::kBF16, {7}).is_dense());
}

TEST(TypesTest, GapsSwappedAndNegativeStridesAreNotDense) {
  EXPECT_FALSE(view_of({3, 4}, {5, 1}).is_dense());
  EXPECT_FALSE(view_of({3, 4}, {1, 3}).is_dense());
  EXPECT_FALSE(view_of({3, 4}, {4, -1}).is_dense());
  EXPECT_FALSE(view_of({3, 4}, {0, 1}).is_dense());
}

TEST(TypesTest, StridesOfExtentOneDoNotMatter) {
  EXPECT_TRUE(view_of({1, 4}, {99, 1}).is_dense());
  EXPECT_TRUE(view_of({3, 1}, {1, 99}).is_dense());
  EXPECT_FALSE(view_of({3, 1}, {2, 1}).is_dense());
}

TEST(TypesTest, NoElementsMeanNoGap) {
  EXPECT_TRUE(view_of({0, 4}, {99, 7}).is_dense());
}

TEST(TypesTest, AViewThatIsNotGivenIsDenseAndEmpty) {
  const TensorView none;
  EXPECT_FALSE(none.given());
  EXPECT_TRUE(none.is_dense());
  EXPECT_EQ(none.num_elements(), 0);
}

TEST(TypesTest, HostileExtentsAreHandledWithoutOverflow) {
  constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max();
  EXPECT_FALSE(view_of({kHuge, kHuge}, {1, 1}).is_dense());
  EXPECT_FALSE(view_of({-1, 4}, {4, 1}).is_dense());
}

TEST(TypesTest, VersionIsANumberAndARevision) {
  const std::string text = version();
  EXPECT_NE(text.find('+'), std::string::npos) << text;
  EXPECT_EQ(text.rfind("0.", 0), 0U) << text;
}

}  // namespace
}  // namespace anyep
