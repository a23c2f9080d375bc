#include <anyep/config.h>
#include <gmock/gmock.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "core/env.h"
#include "core/fault_point.h"
#include "core/parse.h"
#include "core/tuning.h"
#include "thrown.h"

namespace anyep {
namespace {

using namespace std::chrono_literals;
using test::thrown;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

// Starts from an environment without any variable of ours, and puts back what was there.
class EnvTest : public ::testing::Test {
 protected:
  void SetUp() override {
    for (const std::string& name : our_names()) {
      saved_.emplace_back(name, std::getenv(name.c_str()));
      ::unsetenv(name.c_str());
    }
    ::unsetenv("ANYEP_TIMOUT_S");
  }
  void TearDown() override {
    set_log_callback({});
    for (const std::string& name : our_names()) ::unsetenv(name.c_str());
    for (const auto& [name, text] : saved_) ::setenv(name.c_str(), text.c_str(), 1);
  }
  static void set(const char* name, const std::string& text) { ::setenv(name, text.c_str(), 1); }
  void collect_log() {
    set_log_callback([this](int, std::string_view line) { lines_.emplace_back(line); });
  }

  std::vector<std::string> lines_;

 private:
  static std::vector<std::string> our_names() {
    std::vector<std::string> names;
    for (char** entry = environ; *entry != nullptr; ++entry) {
      const std::string line(*entry);
      if (line.rfind("ANYEP_", 0) == 0) names.push_back(line.substr(0, line.find('=')));
    }
    return names;
  }
  std::vector<std::pair<std::string, std::string>> saved_;
};

TEST_F(EnvTest, DefaultsHoldWhenNothingIsSet) {
  const Tuning tuning = Tuning::from_environment();
  EXPECT_EQ(tuning.timeout, 30s);
  EXPECT_EQ(tuning.startup_timeout, 600s);
  EXPECT_EQ(tuning.close_timeout, 5s);
  EXPECT_EQ(tuning.time_scale, 1.0);
  EXPECT_FALSE(tuning.checked);
  EXPECT_FALSE(tuning.exact_combine);
}

TEST_F(EnvTest, EveryTuningVariableArrives) {
  set("ANYEP_TIMEOUT_S", "0.5");
  set("ANYEP_STARTUP_TIMEOUT_S", "7");
  set("ANYEP_CLOSE_TIMEOUT_S", "0.000000001");
  set("ANYEP_TIME_SCALE", "2.5");
  set("ANYEP_CHECK", "1");
  set("ANYEP_COMBINE", "exact");
  const Tuning tuning = Tuning::from_environment();
  EXPECT_EQ(tuning.timeout, 500ms);
  EXPECT_EQ(tuning.startup_timeout, 7s);
  EXPECT_EQ(tuning.close_timeout, 1ns);
  EXPECT_EQ(tuning.time_scale, 2.5);
  EXPECT_TRUE(tuning.checked);
  EXPECT_TRUE(tuning.exact_combine);
}

TEST_F(EnvTest, GarbageInALimitNamesVariableAndText) {
  for (const std::string text : {"abc",
                                 "1e3",
                                 "5s",
                                 "",
                                 "1180591620717411303424",
                                 "-1",
                                 "+1",
                                 " 5",
                                 "5 ",
                                 "nan",
                                 "inf",
                                 "0",
                                 "0.0",
                                 ".5",
                                 "5.",
                                 "1.2.3",
                                 "0x10",
                                 "1,5",
                                 "9223372036.9",
                                 "0.0000000001",
                                 "٣"}) {
    for (const char* name : {"ANYEP_TIMEOUT_S", "ANYEP_STARTUP_TIMEOUT_S", "ANYEP_CLOSE_TIMEOUT_S"}) {
      set(name, text);
      const Error error = thrown([] { Tuning::from_environment(); });
      EXPECT_EQ(error.code, ErrorCode::kArgument) << name << "=" << text;
      EXPECT_EQ(error.argument, name);
      EXPECT_EQ(error.got, '"' + text + '"');
      EXPECT_THAT(error.what(), HasSubstr(name));
      EXPECT_THAT(error.what(), HasSubstr('"' + text + '"'));
      ::unsetenv(name);
    }
  }
}

TEST_F(EnvTest, GarbageIsRefusedInEveryKindOfVariable) {
  const std::pair<const char*, const char*> garbage[] = {{"ANYEP_TIME_SCALE", "0"},
                                                         {"ANYEP_TIME_SCALE", "nan"},
                                                         {"ANYEP_TIME_SCALE", "1e2"},
                                                         {"ANYEP_TIME_SCALE", "-1"},
                                                         {"ANYEP_CHECK", "yes"},
                                                         {"ANYEP_CHECK", "2"},
                                                         {"ANYEP_CHECK", ""},
                                                         {"ANYEP_COMBINE", "Exact"},
                                                         {"ANYEP_COMBINE", "ranks|exact"},
                                                         {"ANYEP_LOG", "loud"},
                                                         {"ANYEP_BACKEND", "cpu "},
                                                         {"ANYEP_TOPK_IDX_BITS", "16"},
                                                         {"ANYEP_PEER_ACCESS", "true"},
                                                         {"ANYEP_CPU_ISA", "v5"},
                                                         {"ANYEP_SOAK", "long"},
                                                         {"ANYEP_SEED", "0x1"},
                                                         {"ANYEP_SEED", "18446744073709551616"},
                                                         {"ANYEP_FAULT", ""}};
  for (const auto& [name, text] : garbage) {
    set(name, text);
    const Error error = thrown([] { Tuning::from_environment(); });
    EXPECT_EQ(error.code, ErrorCode::kArgument) << name << "=" << text;
    EXPECT_EQ(error.argument, name);
    EXPECT_THAT(error.what(), HasSubstr("default"));
    ::unsetenv(name);
  }
}

TEST_F(EnvTest, ChoicesListWhatIsAllowed) {
  set("ANYEP_LOG", "loud");
  EXPECT_EQ(thrown([] { core::check_environment(); }).allowed, "debug, info, warning, error, off");
}

TEST_F(EnvTest, HostileTextIsCutAndCleanedInMessages) {
  set("ANYEP_TIMEOUT_S", "\x1b[31m" + std::string(5000, 'x'));
  const Error error = thrown([] { Tuning::from_environment(); });
  EXPECT_LT(error.got.size(), 80U);
  EXPECT_THAT(error.what(), Not(HasSubstr("\x1b")));
}

TEST_F(EnvTest, AnIntegerVariableHolds64Bits) {
  set("ANYEP_SEED", "18446744073709551615");
  EXPECT_EQ(core::env_integer("ANYEP_SEED"), std::numeric_limits<std::uint64_t>::max());
  ::unsetenv("ANYEP_SEED");
  EXPECT_EQ(core::env_integer("ANYEP_SEED"), std::nullopt);
}

TEST_F(EnvTest, UnknownNamesOfOursGetOneWarning) {
  set("ANYEP_TIMOUT_S", "5");
  collect_log();
  Tuning::from_environment();
  ASSERT_EQ(lines_.size(), 1U);
  EXPECT_THAT(lines_[0], HasSubstr("ANYEP_TIMOUT_S"));
  Tuning::from_environment();
  EXPECT_EQ(lines_.size(), 1U) << "the same names are not warned about again";
  set("ANYEP_OTHER", "");
  Tuning::from_environment();
  ASSERT_EQ(lines_.size(), 2U);
  EXPECT_THAT(lines_[1], HasSubstr("ANYEP_OTHER, ANYEP_TIMOUT_S"));
}

TEST_F(EnvTest, AWarningThatNobodyHeardIsGivenLater) {
  set("ANYEP_NOBODY_LISTENS", "5");
  Tuning::from_environment();
  collect_log();
  Tuning::from_environment();
  EXPECT_EQ(lines_.size(), 1U);
}

TEST_F(EnvTest, NamesOfOtherLibrariesAreIgnoredInSilence) {
  collect_log();
  Tuning::from_environment();
  const std::size_t before = lines_.size();
  set("EP_BUFFER_DEBUG", "garbage");
  set("NVSHMEM_SYMMETRIC_SIZE", "garbage");
  EXPECT_NO_THROW(Tuning::from_environment());
  EXPECT_EQ(lines_.size(), before);
  ::unsetenv("EP_BUFFER_DEBUG");
  ::unsetenv("NVSHMEM_SYMMETRIC_SIZE");
}

TEST_F(EnvTest, EveryVariableIsDocumentedAndItsDefaultParses) {
  for (const core::EnvVariable& variable : core::env_variables()) {
    EXPECT_EQ(variable.name.substr(0, 6), "ANYEP_");
    EXPECT_FALSE(variable.meaning.empty()) << variable.name;
    EXPECT_FALSE(variable.fallback.empty()) << variable.name;
    EXPECT_EQ(variable.kind == core::EnvKind::kChoice, !variable.values.empty()) << variable.name;
    if (variable.kind == core::EnvKind::kSeconds || variable.kind == core::EnvKind::kFactor) {
      set(std::string(variable.name).c_str(), std::string(variable.fallback));
      EXPECT_NO_THROW(core::check_environment()) << variable.name;
    }
  }
}

#if defined(ANYEP_SOURCE_DIR)
TEST_F(EnvTest, TheDocumentListsEveryVariableWithItsDefault) {
  std::ifstream file(ANYEP_SOURCE_DIR "/docs/environment.md");
  const std::string document{std::istreambuf_iterator<char>(file), {}};
  for (const core::EnvVariable& variable : core::env_variables()) {
    const std::size_t row = document.find("| `" + std::string(variable.name) + "` |");
    ASSERT_NE(row, std::string::npos) << variable.name;
    EXPECT_NE(document.substr(row, document.find('\n', row) - row).find(variable.fallback), std::string::npos)
        << variable.name << " defaults to " << variable.fallback;
  }
}
#endif

TEST_F(EnvTest, FaultsInABuildWithoutThemAreWarnedAbout) {
  if (core::kFaultPoints) GTEST_SKIP() << "this build has fault points";
  set("ANYEP_FAULT", "dispatch.mid_send:0:1:kill");
  collect_log();
  Tuning::from_environment();
  EXPECT_THAT(lines_, ElementsAre(HasSubstr("no fault points")));
}

TEST(TuningTest, LimitsOutOfRangeAreRefusedByName) {
  const std::chrono::nanoseconds bad_limits[] = {0ns, -1ns, core::kMaxLimit + 1ns, std::chrono::nanoseconds::min(),
                                                 std::chrono::nanoseconds::max()};
  for (const std::chrono::nanoseconds bad : bad_limits) {
    Tuning tuning;
    tuning.timeout = bad;
    EXPECT_EQ(thrown([&] { core::check_tuning(tuning, "create"); }).argument, "tuning.timeout");
    tuning = {};
    tuning.startup_timeout = bad;
    EXPECT_EQ(thrown([&] { core::check_tuning(tuning, "create"); }).argument, "tuning.startup_timeout");
    tuning = {};
    tuning.close_timeout = bad;
    EXPECT_EQ(thrown([&] { core::check_tuning(tuning, "create"); }).argument, "tuning.close_timeout");
    EXPECT_EQ(thrown([&] { core::check_limit("dispatch", "options.timeout", bad); }).op, "dispatch");
  }
  EXPECT_NO_THROW(core::check_tuning({}, "create"));
}

TEST(TuningTest, ATimeScaleMustBeFiniteAndPositive) {
  for (const double bad : {0.0, -1.0, std::nan(""), std::numeric_limits<double>::infinity()}) {
    Tuning tuning;
    tuning.time_scale = bad;
    EXPECT_EQ(thrown([&] { core::check_tuning(tuning, "create"); }).argument, "tuning.time_scale") << bad;
  }
}

TEST(TuningTest, ScalingMultipliesAndSaturates) {
  Tuning tuning;
  EXPECT_EQ(core::scaled(30s, tuning), 30s);
  tuning.time_scale = 10;
  EXPECT_EQ(core::scaled(30s, tuning), 300s);
  EXPECT_EQ(core::scaled(core::kMaxLimit, tuning), core::kMaxLimit);
  tuning.time_scale = 1e300;
  EXPECT_EQ(core::scaled(1ns, tuning), core::kMaxLimit);
  tuning.time_scale = 1e-12;
  EXPECT_EQ(core::scaled(1ms, tuning), 1ns) << "never zero: no call is without a limit";
}

TEST(TuningTest, TheLongestLimitStillGivesADeadline) {
  const auto now = std::chrono::steady_clock::now();
  EXPECT_GT(now + core::kMaxLimit, now);
}

TEST(ParseTest, SecondsAreExactToTheNanosecond) {
  EXPECT_EQ(core::parse_seconds("0.1"), 100'000'000ns);
  EXPECT_EQ(core::parse_seconds("1.000000001"), 1'000'000'001ns);
  EXPECT_EQ(core::parse_seconds("9223372035"), 9223372035s);
  EXPECT_EQ(core::parse_seconds("9223372036"), std::nullopt);
}

TEST(ParseTest, QuotedTextIsShortAndPrintable) {
  EXPECT_EQ(core::quoted("5s"), "\"5s\"");
  EXPECT_EQ(core::quoted("a\nb"), "\"a?b\"");
  EXPECT_EQ(core::quoted(std::string(100, 'x')).size(), 64U + 5U);
}

}  // namespace
}  // namespace anyep
