#include "core/fault_point.h"

#include <gmock/gmock.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "thrown.h"

namespace anyep {
namespace {

using core::fault_point;
using core::set_fault;
using test::thrown;
using ::testing::HasSubstr;

#if defined(ANYEP_FAULTS) && ANYEP_FAULTS

class FaultPointTest : public ::testing::Test {
 protected:
  void TearDown() override { set_fault(""); }

  // The wait status of a child that arms `faults` and reaches dispatch.mid_send as rank 1 in op 7, then exits with 0.
  static int status_of_child(const std::string& faults) {
    const pid_t child = ::fork();
    if (child == 0) {
      try {
        set_fault(faults);
        fault_point("dispatch.mid_send", 1, 7);
      } catch (...) {
        ::_exit(9);
      }
      ::_exit(0);
    }
    int status = 0;
    EXPECT_EQ(::waitpid(child, &status, WUNTRACED), child);
    if (WIFSTOPPED(status)) {
      ::kill(child, SIGKILL);
      ::waitpid(child, nullptr, 0);
    }
    return status;
  }
};

TEST_F(FaultPointTest, KillEndsTheProcessBySigkill) {
  const int status = status_of_child("dispatch.mid_send:1:7:kill");
  EXPECT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(WTERMSIG(status), SIGKILL);
}

TEST_F(FaultPointTest, StopFreezesTheProcess) {
  const int status = status_of_child("dispatch.mid_send:1:7:stop");
  ASSERT_TRUE(WIFSTOPPED(status));
  EXPECT_EQ(WSTOPSIG(status), SIGSTOP);
}

TEST_F(FaultPointTest, ExitLeavesWithThree) {
  const int status = status_of_child("dispatch.mid_send:1:7:exit");
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 3);
}

TEST_F(FaultPointTest, AnotherPhaseRankOrSequencePasses) {
  for (const char* faults : {"dispatch.in_recv:1:7:kill", "dispatch.mid_send:2:7:kill", "dispatch.mid_send:1:8:kill",
                             "dispatch.mid_sen:1:7:kill", "dispatch.mid_send2:1:7:kill", ""}) {
    EXPECT_EQ(status_of_child(faults), 0) << faults;
  }
}

TEST_F(FaultPointTest, TheStarMatchesAnyRankAndSequence) {
  for (const char* faults :
       {"dispatch.mid_send:*:7:exit", "dispatch.mid_send:1:*:exit", "dispatch.mid_send:*:*:exit"}) {
    EXPECT_EQ(WEXITSTATUS(status_of_child(faults)), 3) << faults;
  }
}

TEST_F(FaultPointTest, ThrowsOnceAndOnlyOnce) {
  set_fault("combine.in_recv:*:*:throw");
  EXPECT_THROW(fault_point("combine.in_recv", 0, 1), std::runtime_error);
  EXPECT_NO_THROW(fault_point("combine.in_recv", 0, 2));
}

TEST_F(FaultPointTest, DelaysEveryTime) {
  set_fault("between:0:*:delay=20");
  const auto start = std::chrono::steady_clock::now();
  fault_point("between", 0, 1);
  fault_point("between", 0, 2);
  fault_point("between", 1, 2);
  EXPECT_GE(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(40));
}

TEST_F(FaultPointTest, SeveralFaultsAreIndependent) {
  set_fault("a:*:1:throw,b:*:2:throw");
  EXPECT_NO_THROW(fault_point("a", 0, 2));
  EXPECT_THROW(fault_point("b", 0, 2), std::runtime_error);
  EXPECT_THROW(fault_point("a", 0, 1), std::runtime_error);
}

TEST_F(FaultPointTest, TextThatDoesNotParseIsRefused) {
  for (const std::string text :
       {"kill", "a:1:2", "a:1:2:kill:", "a:1:2:explode", "a:-1:2:kill", "a:1:x:kill", ":1:2:kill", "a:1:2:delay",
        "a:1:2:delay=", "a:1:2:delay=-5", "a:1:2:delay=5s", "a:1:2:delay=99999999999", "A:1:2:kill", "a::2:kill",
        "a:1:2:kill,", ",a:1:2:kill", "a:1:99999999999999999999:kill"}) {
    const Error error = thrown([&] { set_fault(text); });
    EXPECT_EQ(error.code, ErrorCode::kArgument) << text;
    EXPECT_EQ(error.argument, "ANYEP_FAULT");
    EXPECT_THAT(error.what(), HasSubstr("delay=<milliseconds>"));
  }
}

#else

TEST(FaultPointTest, BuildsWithoutFaultPointsSaySo) {
  EXPECT_FALSE(core::kFaultPoints);
  const Error error = thrown([] { set_fault("dispatch.mid_send:0:1:kill"); });
  EXPECT_EQ(error.code, ErrorCode::kUnsupported);
  EXPECT_THAT(error.what(), HasSubstr("ANYEP_FAULTS=ON"));
  fault_point("dispatch.mid_send", 0, 1);
}

#endif

}  // namespace
}  // namespace anyep
