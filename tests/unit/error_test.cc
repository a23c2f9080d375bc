#include <anyep/error.h>
#include <gmock/gmock.h>

#include <cerrno>
#include <fstream>
#include <iterator>
#include <set>
#include <string>

#include "core/check.h"
#include "thrown.h"

namespace anyep {
namespace {

using core::throw_argument;
using test::thrown;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::StartsWith;

TEST(ErrorTest, EveryCodeHasItsOwnName) {
  std::set<std::string> names;
  for (int code = 0; code <= static_cast<int>(ErrorCode::kInternal); ++code) {
    names.insert(name_of(static_cast<ErrorCode>(code)));
  }
  EXPECT_EQ(names.size(), 13U);
  EXPECT_EQ(names.count("unknown"), 0U);
  EXPECT_STREQ(name_of(ErrorCode::kPeerDead), "kPeerDead");
  EXPECT_STREQ(name_of(static_cast<ErrorCode>(200)), "unknown");
}

#if defined(ANYEP_SOURCE_DIR)
TEST(ErrorTest, TheDocumentListsEveryCode) {
  std::ifstream file(ANYEP_SOURCE_DIR "/docs/errors.md");
  const std::string document{std::istreambuf_iterator<char>(file), {}};
  for (int code = 0; code <= static_cast<int>(ErrorCode::kInternal); ++code) {
    const std::string name = name_of(static_cast<ErrorCode>(code));
    EXPECT_NE(document.find("| `" + name + "` |"), std::string::npos) << name;
  }
}
#endif

TEST(ErrorTest, IsARuntimeErrorThatKeepsItsFieldsWhenCopied) {
  Error error(ErrorCode::kTimeout, "too late");
  error.peers = {1, 3};
  error.phase = "in_recv";
  const Error copy = error;
  EXPECT_STREQ(static_cast<const std::runtime_error&>(copy).what(), "too late");
  EXPECT_EQ(copy.code, ErrorCode::kTimeout);
  EXPECT_EQ(copy.peers, (std::vector<int>{1, 3}));
  EXPECT_EQ(copy.phase, "in_recv");
  EXPECT_EQ(copy.rank, -1);
}

TEST(ErrorTest, ArgumentSaysValueAllowedAndRemedy) {
  const Error error = thrown([] { throw_argument("dispatch", "x.shape[1]", "7", "a multiple of 8", "Pad the rows"); });
  EXPECT_EQ(error.code, ErrorCode::kArgument);
  EXPECT_STREQ(error.what(), "dispatch: x.shape[1] = 7, allowed: a multiple of 8. Pad the rows");
  EXPECT_EQ(error.op, "dispatch");
  EXPECT_EQ(error.argument, "x.shape[1]");
  EXPECT_EQ(error.got, "7");
  EXPECT_EQ(error.allowed, "a multiple of 8");
}

TEST(ErrorTest, ArgumentWithoutRemedyEndsWithTheAllowed) {
  const Error error = thrown([] { throw_argument("route", "top_k", "33", "1..32"); });
  EXPECT_STREQ(error.what(), "route: top_k = 33, allowed: 1..32");
}

TEST(ErrorTest, CapacityCarriesNeedAndHave) {
  const Error error = thrown([] { core::throw_capacity("make_rows", "the window", 4096, 1024, "Raise rows_bytes"); });
  EXPECT_EQ(error.code, ErrorCode::kCapacity);
  EXPECT_EQ(error.need, 4096U);
  EXPECT_EQ(error.have, 1024U);
  EXPECT_STREQ(error.what(), "make_rows: the window needs 4096, there is room for 1024. Raise rows_bytes");
}

TEST(ErrorTest, ResourceNamesCallAndErrno) {
  const Error error = thrown([] { core::throw_resource("create", "mmap", ENOMEM, 8192, 4096); });
  EXPECT_EQ(error.code, ErrorCode::kResource);
  EXPECT_THAT(error.what(), StartsWith("create: mmap failed: "));
  EXPECT_THAT(error.what(), EndsWith("(errno 12), need 8192, have 4096"));
  EXPECT_EQ(error.need, 8192U);
  EXPECT_EQ(error.have, 4096U);
}

TEST(ErrorTest, ResourceLeavesOutWhatIsNotKnown) {
  const Error error = thrown([] { core::throw_resource("create", "memory for the budget", 0); });
  EXPECT_STREQ(error.what(), "create: memory for the budget failed");
}

TEST(ErrorTest, AnyCodeCanBeThrownWithItsOperation) {
  const Error error = thrown([] { core::throw_error(ErrorCode::kState, "combine", "the engine is closed"); });
  EXPECT_EQ(error.code, ErrorCode::kState);
  EXPECT_EQ(error.op, "combine");
  EXPECT_STREQ(error.what(), "combine: the engine is closed");
}

TEST(ErrorTest, CheckThrowsInternalWithItsSiteAndOnlyWhenFalse) {
  EXPECT_NO_THROW(ANYEP_CHECK(1 + 1 == 2, "arithmetic works"));
  const Error error = thrown([] { ANYEP_CHECK(1 + 1 == 3, "arithmetic works"); });
  EXPECT_EQ(error.code, ErrorCode::kInternal);
  EXPECT_THAT(error.what(), HasSubstr("arithmetic works (1 + 1 == 3)"));
  EXPECT_THAT(error.what(), HasSubstr("error_test.cc:"));
}

TEST(ErrorTest, CheckEvaluatesItsConditionOnce) {
  int evaluations = 0;
  ANYEP_CHECK(++evaluations == 1, "once");
  EXPECT_EQ(evaluations, 1);
}

}  // namespace
}  // namespace anyep
