// F9: one rank of three makes another call than the others.
#include <anyep/engine.h>
#include <fmt/format.h>
#include <gmock/gmock.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "fault/notes.h"
#include "fault/task.h"

namespace anyep::test {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int kRanks = 3, kOdd = 1;
constexpr std::int64_t kTokens = 4;

/// One rank's tensors for small calls of every kind.
struct Calls {
  explicit Calls(Engine& on, const Shape& of = Task::shape())
      : engine(on), shape(of), x(kTokens * 1024), rows(64 * 1024), slab(1 << 20), source(1 << 14), ids(kTokens * 4) {
    for (std::size_t at = 0; at < ids.size(); ++at) ids[at] = static_cast<std::int64_t>(at) % shape.num_experts;
    weights.assign(ids.size(), 1.0f);
    wait.wait = true;
  }
  Routing routing() {
    Routing routing;
    routing.experts = TensorView::dense(ids.data(), DType::kI64, {kTokens, shape.top_k});
    routing.weights = TensorView::dense(weights.data(), DType::kF32, {kTokens, shape.top_k});
    return routing;
  }
  void route() { handle.emplace(engine.route(shape, routing(), {}, wait)); }
  void dispatch(DType dtype = DType::kBF16) {
    Rows in, out;
    in.x = TensorView::dense(x.data(), dtype, {kTokens, shape.hidden});
    out.x = TensorView::dense(rows.data(), dtype, {handle->num_rows(), shape.hidden});
    engine.dispatch(in, *handle, out, {}, wait);
  }
  void combine(DType dtype = DType::kBF16) {
    CombineInput in;
    in.x = TensorView::dense(rows.data(), dtype, {handle->num_rows(), shape.hidden});
    Rows out;
    out.x = TensorView::dense(x.data(), dtype, {kTokens, shape.hidden});
    engine.combine(in, *handle, out, {}, wait);
  }
  void low_latency_dispatch(const LowLatencyOptions& options = {}) {
    LowLatencyOptions all = options;
    all.wait = !options.hook;
    engine
        .low_latency_dispatch(shape, TensorView::dense(x.data(), DType::kBF16, {kTokens, shape.hidden}), routing(),
                              slabs_of(all.wire), {}, all)
        .receive()
        .wait();
  }
  ExpertSlabs slabs_of(Wire wire) {
    const int rank = engine.rank(), base = shape.num_experts / kRanks;
    const std::int64_t local = base + (rank < shape.num_experts % kRanks ? 1 : 0);
    const std::int64_t slots = kRanks * shape.max_tokens;
    ExpertSlabs slabs;
    slabs.x = TensorView::dense(slab.data(), wire == Wire::kBF16 ? DType::kBF16 : DType::kF8E4M3,
                                {local, slots, shape.hidden});
    slabs.counts = TensorView::dense(counts, DType::kI32, {local});
    slabs.source = TensorView::dense(source.data(), DType::kI32, {local, slots});
    slabs.range = TensorView::dense(range, DType::kI64, {local, kRanks});
    if (wire == Wire::kFP8) {
      const std::int64_t columns = (shape.hidden + 127) / 128;
      slabs.scales = TensorView::dense(scales.data(), DType::kF32, {local, slots, columns});
      slabs.scales.strides = {columns * slots, 1, slots};
    }
    return slabs;
  }

  Engine& engine;
  Shape shape;
  Options wait;
  std::optional<Handle> handle;
  std::vector<float> x, rows, slab, weights;
  std::vector<float> scales = std::vector<float>(1 << 14);
  std::vector<std::int32_t> source;
  std::vector<std::int64_t> ids;
  std::int32_t counts[64] = {};
  std::int64_t range[256] = {};
};

struct Case {
  const char* what;
  std::function<void(Calls&)> others, odd;
  std::vector<const char*> texts;  ///< all of them stand in every rank's error
};

void expect_mismatch(const Case& one) {
  SCOPED_TRACE(one.what);
  std::vector<std::optional<Error>> errors(kRanks);
  std::vector<std::int64_t> times(kRanks);
  const LocalGroup group(kRanks);
  LocalGroup::run_threads(kRanks, [&](int rank) {
    const auto member = group.member(rank);
    Engine engine = Engine::create(Task::budget(kRanks), Topology::discover(*member), Task::tuning(), *member);
    Calls calls(engine);
    calls.route();
    calls.dispatch();
    const std::int64_t start = now_ns();
    try {
      rank == kOdd ? one.odd(calls) : one.others(calls);
    } catch (const Error& error) {
      errors[static_cast<std::size_t>(rank)] = error;
    }
    times[static_cast<std::size_t>(rank)] = now_ns() - start;
  });
  for (std::size_t rank = 0; rank < kRanks; ++rank) {
    ASSERT_TRUE(errors[rank]) << "rank " << rank << " is content";
    const Error& error = *errors[rank];
    EXPECT_EQ(error.code, ErrorCode::kMismatch) << "rank " << rank << ": " << error.what();
    EXPECT_LT(times[rank], scaled_ns(1)) << error.what();
    EXPECT_THAT(error.what(), HasSubstr(fmt::format("rank {}", kOdd)));
    for (const char* text : one.texts) EXPECT_THAT(error.what(), HasSubstr(text)) << "rank " << rank;
    if (rank != kOdd) {
      // Who heard of it before its own call knows the two sides.
      EXPECT_THAT(error.peers, testing::Contains(kOdd)) << "rank " << rank << ": " << error.what();
      if (error.phase != "between") {
        EXPECT_THAT(error.peers, ElementsAre(kOdd)) << "rank " << rank << ": " << error.what();
      }
    } else {
      EXPECT_THAT(error.peers, testing::Not(testing::Contains(kOdd))) << error.what();
      EXPECT_FALSE(error.peers.empty());
    }
  }
}

TEST(MismatchOfOneTest, EveryRankLearnsWithinASecondWhoDiffersAndInWhat) {
  const auto with_hidden = [](std::int64_t hidden) {
    return [hidden](Calls& calls) {
      calls.shape.hidden = hidden;
      calls.dispatch();
    };
  };
  const std::vector<Case> cases = {
      {"skips a dispatch",
       [](Calls& c) { c.dispatch(), c.combine(); },
       [](Calls& c) { c.combine(); },
       {"dispatch", "combine"}},
      {"dispatches twice",
       [](Calls& c) { c.combine(); },
       [](Calls& c) { c.dispatch(), c.combine(); },
       {"dispatch", "combine"}},
      {"is in a barrier", [](Calls& c) { c.combine(); }, [](Calls& c) { c.engine.barrier(); }, {"barrier", "combine"}},
      {"low latency against high throughput",
       [](Calls& c) { c.dispatch(); },
       [](Calls& c) { c.low_latency_dispatch(); },
       {"low_latency_dispatch", " dispatch"}},
      {"other hidden", with_hidden(64), with_hidden(32), {"hidden is"}},
      {"other type",
       [](Calls& c) { c.dispatch(DType::kBF16); },
       [](Calls& c) { c.dispatch(DType::kF16); },
       {"element type is"}},
      {"other type of combine",
       [](Calls& c) { c.combine(DType::kBF16); },
       [](Calls& c) { c.combine(DType::kF16); },
       {"element type is"}},
      {"other number of experts",
       [](Calls& c) { c.route(); },
       [](Calls& c) {
         c.shape.num_experts = 7;
         for (std::int64_t& id : c.ids) id %= 7;
         c.route();
       },
       {"num_experts is"}},
      {"other top-k",
       [](Calls& c) { c.route(); },
       [](Calls& c) {
         c.shape.top_k = 1;
         c.route();
       },
       {"top_k is"}},
      {"other maximum",
       [](Calls& c) { c.low_latency_dispatch(); },
       [](Calls& c) {
         c.shape.max_tokens = 32;
         c.low_latency_dispatch();
       },
       {"max_tokens is"}},
      {"other wire",
       [](Calls& c) { c.low_latency_dispatch(); },
       [](Calls& c) {
         LowLatencyOptions options;
         options.wire = Wire::kFP8;
         c.low_latency_dispatch(options);
       },
       {"options"}},
      {"hook or not",
       [](Calls& c) { c.low_latency_dispatch(); },
       [](Calls& c) {
         LowLatencyOptions options;
         options.hook = true;
         c.low_latency_dispatch(options);
       },
       {"options"}}};
  for (const Case& one : cases) {
    expect_mismatch(one);
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace anyep::test
