// Which GPUs the machine code of a build runs on.
#include "cuda/runtime/architectures.h"

#include <gtest/gtest.h>

#include "core/devices.h"

namespace anyep::cuda {
namespace {

TEST(CudaArchitectures, CodeRunsOnItsOwnMajorVersion) {
  constexpr const char* kAll = "80,86,89,90a,100,120";
  EXPECT_EQ(code_for(kAll, 9, 0), Code::kTuned);
  EXPECT_EQ(code_for(kAll, 8, 0), Code::kPortable);
  EXPECT_EQ(code_for(kAll, 8, 7), Code::kPortable);
  EXPECT_EQ(code_for(kAll, 10, 3), Code::kPortable);
  EXPECT_EQ(code_for(kAll, 12, 1), Code::kPortable);
  EXPECT_EQ(code_for(kAll, 7, 5), Code::kNone);
  EXPECT_EQ(code_for(kAll, 11, 0), Code::kNone);
  EXPECT_EQ(code_for("86", 8, 0), Code::kNone);
  EXPECT_EQ(code_for("100a", 10, 3), Code::kNone);
  EXPECT_EQ(code_for("90,90a", 9, 0), Code::kTuned);
  EXPECT_EQ(code_for("", 9, 0), Code::kNone);
}

TEST(CudaArchitectures, TheBuildKnowsItsOwn) {
  EXPECT_FALSE(architectures().empty());
  EXPECT_EQ(architectures().find(';'), std::string_view::npos);
}

TEST(CudaArchitectures, VersionsAreWrittenAsPeopleDo) {
  EXPECT_EQ(core::cuda_version_text(13010), "13.1");
  EXPECT_EQ(core::cuda_version_text(12080), "12.8");
}

}  // namespace
}  // namespace anyep::cuda
