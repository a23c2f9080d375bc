// The checkers are checked: an answer that is wrong in one byte, or a byte written out of bounds, must be seen.
#include <gtest/gtest.h>

#include "conformance/conformance.h"
#include "support/guarded.h"
#include "support/properties.h"

namespace anyep::test {
namespace {

Scenario small_scenario() {
  Scenario scenario = ranks(2);
  const int handle = scenario.then(RouteStep{.choices = random_choices(601, {4, 2, {3, 4}})});
  const int received =
      scenario.then(DispatchStep{.handle = handle, .hidden = 8, .fill = Fill::kFinite, .num_scales = 1, .extra = {4}});
  scenario.then(CombineStep{.handle = handle, .hidden = 8, .num_biases = 1, .rows_of = received});
  const int dispatch = scenario.then(
      LowLatencyDispatchStep{.choices = random_choices(602, {4, 2, {3, 4}}), .hidden = 128, .wire = Wire::kFP8});
  scenario.then(LowLatencyCombineStep{.dispatch = dispatch});
  return scenario;
}

/// The answer with the top bit of one byte turned.
Outputs spoilt(const Outputs& outputs, int rank, const std::string& name, std::size_t byte) {
  Outputs other = outputs;
  Bytes bytes = outputs[static_cast<std::size_t>(rank)].fields().at(name);
  bytes.at(byte) ^= std::byte{0x80};
  other[static_cast<std::size_t>(rank)].put(std::stoi(name.substr(0, 4)), name.substr(5), std::move(bytes));
  return other;
}

TEST(Checker, EverySpoiltFieldIsADifference) {
  const Scenario scenario = small_scenario();
  const Outputs outputs = oracle_outputs(scenario);
  EXPECT_EQ(difference(outputs, outputs), "");
  for (const auto& [name, bytes] : outputs[1].fields()) {
    if (bytes.empty()) continue;
    const Outputs other = spoilt(outputs, 1, name, bytes.size() - 1);
    EXPECT_NE(difference(outputs, other).find(name), std::string::npos);
    EXPECT_NE(digest_of(outputs), digest_of(other));
  }
}

TEST(Checker, PropertiesSeeASpoiltAnswer) {
  const Scenario scenario = small_scenario();
  const Outputs outputs = oracle_outputs(scenario);
  EXPECT_EQ(broken_property(scenario, outputs), "");
  for (const std::string name : {"0000 source", "0000 place", "0000 rows_until", "0000 pairs", "0001 x", "0001 scales",
                                 "0001 extra0", "0001 experts", "0001 weights", "0002 x", "0003 x", "0003 scales",
                                 "0003 counts", "0003 source", "0003 range", "0004 x"}) {
    const std::size_t last = outputs[1].fields().at(name).size() - 1;
    EXPECT_NE(broken_property(scenario, spoilt(outputs, 1, name, last)), "") << name;
  }
}

TEST(Checker, MissingAndSurplusFieldsAreDifferences) {
  const Scenario scenario = small_scenario();
  const Outputs outputs = oracle_outputs(scenario);
  Outputs more = outputs;
  more[0].put_text(1, "damage", "bytes behind the tensor were written");
  EXPECT_NE(difference(outputs, more), "");
  EXPECT_NE(difference(more, outputs), "");
}

TEST(Checker, ResultsSurviveTheWayBetweenProcesses) {
  const Outputs outputs = oracle_outputs(small_scenario());
  Outputs back;
  for (const RankOutputs& rank : outputs) back.push_back(RankOutputs::parsed(rank.serialised()));
  EXPECT_EQ(difference(outputs, back), "");
  Bytes cut = outputs[0].serialised();
  cut.pop_back();
  EXPECT_THROW(RankOutputs::parsed(cut), std::runtime_error);
}

TEST(Checker, GuardsSeeOneByteOutOfBounds) {
  for (const std::ptrdiff_t at : {-1, -64, 10, 11, 73}) {
    Guarded tensor(10, 2);
    EXPECT_EQ(tensor.damage(), "");
    tensor.data()[at] = std::byte{0};
    EXPECT_NE(tensor.damage(), "");
  }
  Guarded input(10);
  input.seal();
  input.data()[9] = std::byte{1};
  EXPECT_EQ(input.damage(), "an input was written");
}

}  // namespace
}  // namespace anyep::test
