// Equal inputs give equal bits, however often, however late anybody is, with how many threads, in which world.
#include <set>

#include "conformance/conformance.h"
#include "conformance/random_scenario.h"

namespace anyep::test {
namespace {

class Determinism : public testing::TestWithParam<World> {};

Scenario mixed_scenario() {
  Scenario scenario = ranks(3);
  const int handle =
      scenario.then(RouteStep{.choices = random_choices(501, {10, 4, ragged(3, 24)}, {.duplicate = 10})});
  const int received = scenario.then(DispatchStep{.handle = handle,
                                                  .hidden = 520,
                                                  .fill = Fill::kFinite,
                                                  .out = {Memory::kWindow, Memory::kTensor, Memory::kWindow},
                                                  .finish = Finish::kEvent});
  const int dispatch = scenario.then(LowLatencyDispatchStep{
      .choices = random_choices(502, {10, 4, ragged(3, 12)}), .hidden = 512, .wire = Wire::kFP8, .hook = true});
  scenario.then(CombineStep{.handle = handle, .hidden = 520, .num_biases = 2, .rows_of = received});
  scenario.then(CombineStep{.handle = handle, .hidden = 1032, .weights = 4, .finish = Finish::kPoll});
  scenario.then(ReceiveStep{dispatch});
  scenario.then(LowLatencyCombineStep{.dispatch = dispatch});
  scenario.then(LowLatencyCombineStep{.dispatch = dispatch, .wire = Wire::kLogFMT, .finish = Finish::kEvent});
  return scenario;
}

// 50 repeats a world (100 together) with random delays and 1 to 4 threads, in big and in small windows, checked or not: one digest,
// the oracle's.
TEST_P(Determinism, DigestsRepeat) {
  Scenario scenario = mixed_scenario();
  const std::set<std::uint64_t> expected = {digest_of(oracle_outputs(scenario))};
  std::set<std::uint64_t> digests;
  const auto repeats = static_cast<std::uint64_t>(50 * soak_factor());
  for (std::uint64_t repeat = 0; repeat < repeats; ++repeat) {
    scenario.jitter = repeat;
    scenario.num_sms = static_cast<int>(repeat % 5);
    scenario.checked = repeat % 7 == 3;
    scenario.rows_bytes = repeat % 2 == 0 ? 64 << 20 : 2 << 20;
    const Outputs got = run(GetParam(), scenario);
    digests.insert(digest_of(got));
    if (!expected.contains(digest_of(got))) {
      ADD_FAILURE() << "repeat " << repeat << ": " << difference(oracle_outputs(scenario), got);
    }
  }
  EXPECT_EQ(digests, expected);
}

INSTANTIATE_TEST_SUITE_P(, Determinism, testing::ValuesIn(engine_worlds()), world_name);

}  // namespace
}  // namespace anyep::test
