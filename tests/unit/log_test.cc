#include <anyep/config.h>
#include <gmock/gmock.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/log.h"

namespace anyep {
namespace {

using ::testing::ElementsAre;
using ::testing::Pair;

class LogTest : public ::testing::Test {
 protected:
  void SetUp() override { ::unsetenv("ANYEP_LOG"); }
  void TearDown() override {
    set_log_callback({});
    ::unsetenv("ANYEP_LOG");
  }
  void collect() {
    set_log_callback([this](int level, std::string_view line) { lines_.emplace_back(level, line); });
  }
  std::vector<std::pair<int, std::string>> lines_;
};

TEST_F(LogTest, IsSilentWithoutACallback) {
  EXPECT_FALSE(core::log_enabled(core::LogLevel::kError));
  core::log_error("nobody hears this");
  collect();
  EXPECT_TRUE(lines_.empty());
}

TEST_F(LogTest, WarningsAndErrorsReachTheCallbackByDefault) {
  collect();
  core::log_debug("d");
  core::log_info("i");
  core::log_warning("w");
  core::log_error("e");
  EXPECT_THAT(lines_, ElementsAre(Pair(2, "w"), Pair(3, "e")));
}

TEST_F(LogTest, TheVariableSetsTheLeastLevel) {
  ::setenv("ANYEP_LOG", "debug", 1);
  collect();
  core::log_debug("d");
  EXPECT_THAT(lines_, ElementsAre(Pair(0, "d")));
  ::setenv("ANYEP_LOG", "error", 1);
  collect();
  core::log_warning("w");
  EXPECT_EQ(lines_.size(), 1U);
}

TEST_F(LogTest, OffSilencesACallback) {
  ::setenv("ANYEP_LOG", "off", 1);
  collect();
  core::log_error("e");
  EXPECT_TRUE(lines_.empty());
}

TEST_F(LogTest, GarbageInTheVariableCountsAsTheDefault) {
  ::setenv("ANYEP_LOG", "loud", 1);
  collect();
  core::log_info("i");
  core::log_warning("w");
  EXPECT_THAT(lines_, ElementsAre(Pair(2, "w")));
}

TEST_F(LogTest, AnEmptyCallbackSilencesAgain) {
  collect();
  set_log_callback({});
  core::log_error("e");
  EXPECT_TRUE(lines_.empty());
  EXPECT_FALSE(core::log_enabled(core::LogLevel::kError));
}

TEST_F(LogTest, ACallbackThatThrowsHarmsNobody) {
  set_log_callback([](int, std::string_view) { throw std::runtime_error("full disk"); });
  EXPECT_NO_THROW(core::log_error("e"));
}

TEST_F(LogTest, ACallbackMayLogAndReplaceItself) {
  int calls = 0;
  set_log_callback([&](int, std::string_view) {
    if (++calls == 1) core::log_error("from inside");
    set_log_callback({});
  });
  core::log_error("from outside");
  EXPECT_EQ(calls, 2);
  core::log_error("afterwards");
  EXPECT_EQ(calls, 2);
}

TEST_F(LogTest, ThreadsMayLogWhileTheCallbackChanges) {
  std::atomic<int> heard{0};
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 3; ++thread) {
    threads.emplace_back([] {
      for (int line = 0; line < 2000; ++line) core::log_error("line");
    });
  }
  for (int change = 0; change < 200; ++change) {
    set_log_callback([&heard](int, std::string_view) { ++heard; });
    set_log_callback({});
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_LE(heard.load(), 6000);
}

}  // namespace
}  // namespace anyep
