// Memory that kernels cannot reach is an error at the call, and the context stays usable.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "support/gpu_rank.h"
#include "support/mirror.h"

namespace anyep::test {
namespace {

TEST(GpuArguments, HostMemoryIsRefusedAndTheContextLives) {
  if (num_gpus() == 0) GTEST_SKIP() << "no GPU";
  const LocalGroup group(1);
  const auto bootstrap = group.member(0);
  GpuRank me(*bootstrap, std::chrono::seconds(10), num_gpus());
  std::vector<std::int64_t> ids(32);
  Routing routing;
  routing.experts = TensorView::dense(ids.data(), DType::kI64, {8, 4});
  try {
    (void)me.engine().route(Shape{4, 4}, routing, {me.stream()});
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code, ErrorCode::kArgument);
    EXPECT_EQ(error.argument, "routing.experts");
    EXPECT_THAT(error.what(), testing::HasSubstr("host memory at"));
  }
  EXPECT_EQ(me.exchange(), "");
  EXPECT_TRUE(me.computes());
  me.engine().close();
}

TEST(GpuArguments, MemoryOfAnotherGpuIsRefused) {
  if (num_gpus() < 2) GTEST_SKIP() << "needs two GPUs";
  const LocalGroup group(1);
  const auto bootstrap = group.member(0);
  GpuRank me(*bootstrap, std::chrono::seconds(10), num_gpus());
  void* elsewhere = nullptr;
  ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
  ASSERT_EQ(cudaMalloc(&elsewhere, 4096), cudaSuccess);
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  Routing routing;
  routing.experts = TensorView::dense(elsewhere, DType::kI64, {8, 4});
  try {
    (void)me.engine().route(Shape{4, 4}, routing, {me.stream()});
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code, ErrorCode::kArgument);
    EXPECT_THAT(error.what(), testing::HasSubstr("memory of GPU 1"));
  }
  EXPECT_EQ(me.exchange(), "");
  me.engine().close();
  EXPECT_EQ(cudaFree(elsewhere), cudaSuccess);
}

}  // namespace
}  // namespace anyep::test
