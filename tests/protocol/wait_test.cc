#include "protocol/wait.h"

#include <gtest/gtest.h>

#include "protocol/wait_rules.h"

namespace anyep::test {
namespace {

class Wait : public testing::TestWithParam<WaitRule> {};

TEST_P(Wait, Keeps) {
  EXPECT_EQ(GetParam().check(), "");
}

INSTANTIATE_TEST_SUITE_P(Rule, Wait, testing::ValuesIn(kWaitRules), [](const auto& each) { return each.param.name; });

}  // namespace
}  // namespace anyep::test
