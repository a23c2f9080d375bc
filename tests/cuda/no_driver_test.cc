// On a machine without a driver, or without a GPU, everything of CUDA refuses with one clear sentence.
#include <anyep/bootstrap.h>
#include <anyep/error.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <filesystem>

#include "cuda/memory/pinned.h"
#include "cuda/memory/windows.h"
#include "cuda/runtime/check.h"
#include "cuda/runtime/device_guard.h"
#include "cuda/runtime/driver.h"
#include "cuda/runtime/event.h"
#include "tests/unit/bootstrap_world.h"
#include "tests/unit/thrown.h"

namespace anyep::cuda {
namespace {

using ::testing::HasSubstr;

class NoDriver : public ::testing::Test {
 protected:
  void SetUp() override {
    // Not by CUDA itself: other tests of this process fork ranks that use it.
    if (std::filesystem::exists("/dev/nvidiactl")) GTEST_SKIP() << "there is a driver";
  }
};

void expect_unsupported(const Error& error) {
  EXPECT_EQ(error.code, ErrorCode::kUnsupported);
  EXPECT_THAT(error.what(), HasSubstr("there is no NVIDIA driver"));
  EXPECT_THAT(error.what(), HasSubstr("ANYEP_BACKEND=cpu"));
}

TEST_F(NoDriver, EveryWayInSaysSo) {
  EXPECT_STREQ(why_unusable(), "there is no NVIDIA driver (libcuda.so.1)");
  expect_unsupported(test::thrown([] { driver(); }));
  expect_unsupported(test::thrown([] { const DeviceGuard guard(0); }));
  expect_unsupported(test::thrown([] { current_device(); }));
  expect_unsupported(test::thrown([] { const PinnedPages pages(4096); }));
  expect_unsupported(test::thrown([] { PhysicalMemory::create(0, 2 << 20); }));
  expect_unsupported(test::thrown([] { PhysicalMemory::import(0, 2 << 20); }));
  expect_unsupported(test::thrown([] { Mapping::reserve(2 << 20, 0); }));
  expect_unsupported(test::thrown([] { EventPool().record(nullptr); }));
  expect_unsupported(test::thrown([] { is_capturing(nullptr); }));
}

TEST_F(NoDriver, ErrorsOfCallsNameTheCall) {
  const Error error = test::thrown([] { check(cudaErrorInvalidValue, "cudaMemsetAsync", "dispatch"); });
  EXPECT_EQ(error.code, ErrorCode::kDevice);
  EXPECT_EQ(error.op, "dispatch");
  EXPECT_THAT(error.what(), HasSubstr("dispatch: cudaMemsetAsync failed"));
  EXPECT_THAT(error.what(), HasSubstr("cudaErrorInvalidValue (1)"));
  EXPECT_EQ(test::thrown([] { check(cudaErrorMemoryAllocation, "cudaMalloc"); }).code, ErrorCode::kResource);
  EXPECT_EQ(test::thrown([] { check(CUDA_ERROR_OUT_OF_MEMORY, "cuMemCreate"); }).code, ErrorCode::kResource);
  EXPECT_EQ(test::thrown([] { check(CUDA_ERROR_INVALID_VALUE, "cuMemMap"); }).code, ErrorCode::kDevice);
  check(cudaSuccess, "cudaMalloc");
  check(CUDA_SUCCESS, "cuMemMap");
}

TEST_F(NoDriver, PagesThatAreNotWholeAreTheCallersMistake) {
  void* const pages = ::mmap(nullptr, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(pages, MAP_FAILED);
  auto* const data = static_cast<std::byte*>(pages);
  EXPECT_EQ(test::thrown([&] { PinnedRange::of({data + 8, 4096}); }).code, ErrorCode::kArgument);
  EXPECT_EQ(test::thrown([&] { PinnedRange::of({data, 100}); }).code, ErrorCode::kArgument);
  EXPECT_EQ(test::thrown([&] { PinnedRange::of({}); }).code, ErrorCode::kArgument);
  expect_unsupported(test::thrown([&] { PinnedRange::of({data, 4096}); }));
  ::munmap(pages, 8192);
}

TEST_F(NoDriver, SharingWindowsFailsOnEveryRankAlike) {
  const LocalGroup group(2);
  LocalGroup::run_threads(2, [&](int rank) {
    const auto bootstrap = group.member(rank);
    const auto control = control::Control::connect(*bootstrap, "create", test::in(std::chrono::seconds(20)));
    Budget budget;
    budget.rows_bytes = 1 << 20;
    const Error error = test::thrown(
        [&] { Windows::share(WindowLayout::make(budget, 2), 0, rank, *control, test::in(std::chrono::seconds(20))); });
    EXPECT_EQ(error.code, ErrorCode::kUnsupported);
    EXPECT_THAT(error.what(), HasSubstr("there is no NVIDIA driver"));
  });
}

}  // namespace
}  // namespace anyep::cuda
