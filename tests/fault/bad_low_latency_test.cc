// Bad inputs of low latency: rows 26, 28, 29, 46 to 52 of the bad-input table.
#include <anyep/engine.h>
#include <anyep/plan.h>
#include <gmock/gmock.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "fault/fixtures.h"
#include "support/guarded.h"

namespace anyep::test {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;

constexpr std::int64_t kTokens = 3;

LowLatencyOptions with_hook() {
  LowLatencyOptions options;
  options.hook = true;
  return options;
}

// One rank's dispatch inputs and slabs.
struct Call {
  explicit Call(Engine& on, const Shape& of = small_shape())
      : engine(on),
        shape(of),
        mine(kTokens, shape, on.rank()),
        slabs(shape, on.num_ranks(), on.rank()),
        x(mine.x_view()),
        routing(mine.routing()),
        out(slabs.view()),
        answer(mine.x.size()),
        result(TensorView::dense(answer.data(), DType::kBF16, {kTokens, shape.hidden})) {}

  Pending dispatch() { return engine.low_latency_dispatch(shape, x, routing, out, {}, options); }
  Pending combine() { return engine.low_latency_combine(shape, out, routing, result, {}, options); }
  void both() {
    dispatch().receive().wait();
    combine().receive().wait();
  }

  Engine& engine;
  Shape shape;
  Tokens mine;
  Slabs slabs;
  TensorView x;
  Routing routing;
  ExpertSlabs out;
  std::vector<std::uint16_t> answer;
  TensorView result;
  LowLatencyOptions options;
  std::vector<double> scratch = std::vector<double>(16384);
  TensorView view(DType dtype, const Extents& of) { return TensorView::dense(scratch.data(), dtype, of); }
};

using Change = std::pair<const char*, std::function<void(Call&)>>;

void expect_dispatches_refused(const std::vector<Change>& changes) {
  for (const auto& [what, change] : changes) {
    on_ranks(1, [&, what = what, &change = change](Engine& engine, int) {
      Call call(engine);
      change(call);
      expect_argument(error_of([&] { call.dispatch().receive().wait(); }), "low_latency_dispatch", what);
      Call good(engine);
      EXPECT_NO_THROW(good.both()) << "after " << what;
    });
  }
}

TEST(BadLowLatencyTest, BadDispatchViewsAreRefused) {
  expect_dispatches_refused({{"x of float32",
                              [](Call& c) {
                                c.x = c.view(DType::kF32, {kTokens, 64});
                              }},
                             {"x not given", [](Call& c) { c.x = {}; }},
                             {"x null", [](Call& c) { c.x.data = nullptr; }},
                             {"x of another hidden",
                              [](Call& c) {
                                c.x = c.view(DType::kBF16, {kTokens, 128});
                              }},
                             {"x of a token more",
                              [](Call& c) {
                                c.x = c.view(DType::kBF16, {kTokens + 1, 64});
                              }},
                             {"no experts", [](Call& c) { c.routing.experts = {}; }},
                             {"no slab", [](Call& c) { c.out.x = {}; }},
                             {"a slab of fewer experts", [](Call& c) { c.out.x.shape[0] = 5; }},
                             {"a slab of fewer rows", [](Call& c) { c.out.x.shape[1] = 7; }},
                             {"a slab of float16", [](Call& c) { c.out.x.dtype = DType::kF16; }},
                             {"a null slab", [](Call& c) { c.out.x.data = nullptr; }},
                             {"no counts", [](Call& c) { c.out.counts = {}; }},
                             {"counts of int64", [](Call& c) { c.out.counts = c.view(DType::kI64, {6}); }},
                             {"counts of fewer experts", [](Call& c) { c.out.counts.shape[0] = 5; }},
                             {"source of other rows",
                              [](Call& c) {
                                c.out.source = c.view(DType::kI32, {6, 4});
                              }},
                             {"range of int32",
                              [](Call& c) {
                                c.out.range = c.view(DType::kI32, {6, 1});
                              }},
                             {"range of another group",
                              [](Call& c) {
                                c.out.range = c.view(DType::kI64, {6, 2});
                              }},
                             {"rows of fewer tokens", [](Call& c) {
                                c.out.rows = c.view(DType::kI32, {1, c.shape.max_tokens - 1, c.shape.top_k});
                              }}});
}

TEST(BadLowLatencyTest, BadShapesAreRefused) {
  expect_dispatches_refused({{"hidden 0", [](Call& c) { c.shape.hidden = 0; }},
                             {"hidden -8", [](Call& c) { c.shape.hidden = -8; }},
                             {"hidden 12",
                              [](Call& c) {
                                c.shape.hidden = 12;
                                c.x = c.view(DType::kBF16, {kTokens, 12});
                              }},
                             {"max_tokens 0", [](Call& c) { c.shape.max_tokens = 0; }},
                             {"max_tokens -1", [](Call& c) { c.shape.max_tokens = -1; }}});
}

TEST(BadLowLatencyTest, Fp8WithoutScalesOrWithOthersIsRefused) {
  const auto to_fp8 = [](Call& c) {
    c.options.wire = Wire::kFP8;
    c.shape.hidden = 256;
    c.x = c.view(DType::kBF16, {kTokens, 256});
    c.out.x = TensorView::dense(c.scratch.data() + 1024, DType::kF8E4M3, {6, 8, 256});
    c.out.scales = {c.scratch.data() + 8192, DType::kF32, {6, 8, 2}, {16, 1, 8}};
  };
  World world;
  Shape wide = small_shape();
  wide.hidden = 256;
  world.budget.low_latency_bytes = 4 * low_latency_bytes_for(wide, 1);
  const std::vector<Change> changes = {{"no scales", [](Call& c) { c.out.scales = {}; }},
                                       {"scales row-major",
                                        [](Call& c) {
                                          c.out.scales.strides = {16, 2, 1};
                                        }},
                                       {"scales of fewer columns", [](Call& c) { c.out.scales.shape[2] = 1; }},
                                       {"scales of int32", [](Call& c) { c.out.scales.dtype = DType::kI32; }},
                                       {"a slab of bfloat16", [](Call& c) { c.out.x.dtype = DType::kBF16; }},
                                       {"LogFMT out", [](Call& c) { c.options.wire = Wire::kLogFMT; }}};
  for (const auto& [what, change] : changes) {
    on_ranks(world, [&, what = what, &change = change](Engine& engine, int) {
      Call call(engine);
      to_fp8(call);
      EXPECT_NO_THROW(call.dispatch().receive().wait()) << "the good call";
      change(call);
      expect_argument(error_of([&] { call.dispatch().receive().wait(); }), "low_latency_dispatch", what);
    });
  }
}

TEST(BadLowLatencyTest, BadCombineViewsAreRefused) {
  const std::vector<Change> changes = {{"x of float16", [](Call& c) { c.out.x.dtype = DType::kF16; }},
                                       {"x of fewer rows", [](Call& c) { c.out.x.shape[1] = 7; }},
                                       {"x null", [](Call& c) { c.out.x.data = nullptr; }},
                                       {"no source", [](Call& c) { c.out.source = {}; }},
                                       {"no range", [](Call& c) { c.out.range = {}; }},
                                       {"rows of int64",
                                        [](Call& c) {
                                          c.out.rows = c.view(DType::kI64, {1, c.shape.max_tokens, c.shape.top_k});
                                        }},
                                       {"no experts", [](Call& c) { c.routing.experts = {}; }},
                                       {"no weights", [](Call& c) { c.routing.weights = {}; }},
                                       {"weights of float16", [](Call& c) { c.routing.weights.dtype = DType::kF16; }},
                                       {"out of float32",
                                        [](Call& c) {
                                          c.result = c.view(DType::kF32, {kTokens, 64});
                                        }},
                                       {"out of a token less", [](Call& c) { c.result.shape[0] = kTokens - 1; }},
                                       {"out of another hidden",
                                        [](Call& c) {
                                          c.result = c.view(DType::kBF16, {kTokens, 128});
                                        }},
                                       {"out null", [](Call& c) { c.result.data = nullptr; }},
                                       {"FP8 back", [](Call& c) { c.options.wire = Wire::kFP8; }}};
  for (const auto& [what, change] : changes) {
    on_ranks(1, [&, what = what, &change = change](Engine& engine, int) {
      Call call(engine);
      call.both();
      change(call);
      expect_argument(error_of([&] { call.combine().receive().wait(); }), "low_latency_combine", what);
      Call good(engine);
      EXPECT_NO_THROW(good.both()) << "after " << what;
    });
  }
}

TEST(BadLowLatencyTest, ForgedRangesAndCountsHarmNoMemory) {
  for (const std::int64_t bad : {std::int64_t{-1}, std::int64_t{1} << 62, (std::int64_t{7} << 32) | 100,
                                 std::int64_t{0x7fffffff}, std::int64_t{5} << 32}) {
    on_ranks(2, [bad](Engine& engine, int) {
      Call call(engine);
      Guarded answer(static_cast<std::size_t>(kTokens) * 128);
      call.result.data = answer.data();
      try {
        call.dispatch().receive().wait();  // a peer may have failed in its combine before this one has ended
        std::ranges::fill(call.slabs.range, bad);
        std::ranges::fill(call.slabs.source, 1 << 30);
        call.combine().receive().wait();
      } catch (const Error& error) {
        EXPECT_TRUE(error.code == ErrorCode::kArgument || error.code == ErrorCode::kCorrupt ||
                    error.code == ErrorCode::kAborted || error.code == ErrorCode::kMismatch)
            << error.what();
      }
      EXPECT_EQ(answer.damage(), "");
    });
  }
}

TEST(BadLowLatencyTest, StatisticsOfWrongTypeOrSizeAreRefused) {
  expect_dispatches_refused(
      {{"received of int64", [](Call& c) { c.options.received = c.view(DType::kI64, {6}); }},
       {"received of 5", [](Call& c) { c.options.received = c.view(DType::kI32, {5}); }},
       {"received null", [](Call& c) { c.options.received = TensorView::dense(nullptr, DType::kI32, {6}); }},
       {"waited of int32", [](Call& c) { c.options.waited = c.view(DType::kI32, {1}); }},
       {"waited of 2", [](Call& c) { c.options.waited = c.view(DType::kI64, {2}); }}});
}

TEST(CapacityTest, AShapeBeyondTheBudgetSaysNeedAndHave) {
  on_ranks(2, [](Engine& engine, int) {
    Shape large = small_shape();
    large.max_tokens = 4096;
    large.hidden = 1024;
    Call call(engine, large);
    const Error error = error_of([&] { call.dispatch().receive().wait(); });
    EXPECT_EQ(error.code, ErrorCode::kCapacity) << error.what();
    EXPECT_GT(error.need, error.have);
    EXPECT_GT(error.have, 0U);
    expect_usable(engine);
  });
}

TEST(CapacityTest, MoreTokensThanTheMaximumIsACapacityErrorHereAndAnAbortThere) {
  on_ranks(3, [](Engine& engine, int rank) {
    Shape shape = small_shape();
    shape.max_tokens = kTokens;
    const std::int64_t tokens = rank == 1 ? kTokens + 5 : kTokens;
    Tokens mine(tokens, shape, rank);
    Slabs slabs(shape, 3, rank);
    const Error error = error_of(
        [&] { engine.low_latency_dispatch(shape, mine.x_view(), mine.routing(), slabs.view()).receive().wait(); });
    if (rank == 1) {
      EXPECT_EQ(error.code, ErrorCode::kCapacity) << error.what();
      EXPECT_EQ(error.need, static_cast<std::uint64_t>(tokens));
      EXPECT_EQ(error.have, static_cast<std::uint64_t>(kTokens));
    } else {
      EXPECT_EQ(error.code, ErrorCode::kAborted) << error.what();
      EXPECT_THAT(error.peers, Contains(1));
      EXPECT_THAT(error.what(), HasSubstr("8")) << "the reason travels";
    }
  });
}

TEST(MismatchTest, ShapesThatDifferAreAMismatchOnAllRanks) {
  const std::pair<const char*, std::function<void(Shape&)>> differences[] = {
      {"hidden", [](Shape& shape) { shape.hidden = 32; }},
      {"max_tokens", [](Shape& shape) { shape.max_tokens = 7; }},
      {"experts", [](Shape& shape) { shape.num_experts = 4; }},
      {"top-k", [](Shape& shape) { shape.top_k = 1; }}};
  for (const auto& [what, differ] : differences) {
    on_ranks(3, [&, what = what, &differ = differ](Engine& engine, int rank) {
      Shape shape = small_shape();
      if (rank == 2) differ(shape);
      Call call(engine, shape);
      const Error error = error_of([&] { call.dispatch().receive().wait(); });
      EXPECT_EQ(error.code, ErrorCode::kMismatch) << what << ": " << error.what();
      EXPECT_FALSE(error.peers.empty()) << what;
      EXPECT_EQ(error_of([&] { engine.check(); }).code, ErrorCode::kMismatch) << "the engine has failed";
    });
  }
}

TEST(MismatchTest, ChoicesThatChangedBeforeCombineAreFoundInCheckedMode) {
  World world{.num_ranks = 2};
  world.tuning.checked = true;
  on_ranks(world, [](Engine& engine, int) {
    Call call(engine);
    const Error error = error_of([&] {
      call.dispatch().receive().wait();  // a peer may have failed in its combine before this one has ended
      for (std::int64_t& id : call.mine.ids) id = (id + 3) % 6;
      call.combine().receive().wait();
    });
    EXPECT_EQ(error.code, ErrorCode::kMismatch) << error.what();
  });
}

TEST(MismatchTest, ChoicesThatChangedBeforeCombineHarmNoMemoryOtherwise) {
  on_ranks(2, [](Engine& engine, int) {
    Call call(engine);
    Guarded answer(static_cast<std::size_t>(kTokens) * 128);
    call.result.data = answer.data();
    try {
      call.dispatch().receive().wait();
      for (std::int64_t& id : call.mine.ids) id = (id + 3) % 6;
      call.combine().receive().wait();
    } catch (const Error& error) {
      EXPECT_NE(error.code, ErrorCode::kInternal) << error.what();
    }
    EXPECT_EQ(answer.damage(), "");
  });
}

TEST(ZeroCopyTest, WithoutABufferIsAStateErrorAndWithAnotherShapeAnArgument) {
  on_ranks(1, [](Engine& engine, int) {
    Call call(engine);
    call.dispatch().receive().wait();
    call.options.zero_copy = true;
    EXPECT_EQ(error_of([&] { call.combine().receive().wait(); }).code, ErrorCode::kState);
    EXPECT_TRUE(engine.combine_buffer(call.shape).given());
    call.out.x.shape[1] = 7;
    expect_argument(error_of([&] { call.combine().receive().wait(); }), "low_latency_combine", "x of another shape");
    call.out = call.slabs.view();
    EXPECT_NO_THROW(call.combine().receive().wait());
  });
}

// ---- hooks
// -------------------------------------------------------------------------------------------------------------

TEST(HookTest, AThirdOperationWhileTwoAreNotReceivedIsAStateErrorThatNamesThem) {
  on_ranks(2, [](Engine& engine, int) {
    Call first(engine), second(engine), third(engine);
    first.options = second.options = third.options = with_hook();
    Pending one = first.dispatch();
    Pending two = second.dispatch();
    const Error error = error_of([&] { third.dispatch(); });
    EXPECT_EQ(error.code, ErrorCode::kState) << error.what();
    EXPECT_THAT(error.what(), HasSubstr("low_latency_dispatch"));
    one.receive().wait();
    Pending three = third.dispatch();
    two.receive().wait();
    three.receive().wait();
    expect_usable(engine);
  });
}

TEST(HookTest, ReceivingTwiceIsAStateError) {
  on_ranks(1, [](Engine& engine, int) {
    Call call(engine);
    call.options = with_hook();
    Pending pending = call.dispatch();
    pending.receive().wait();
    EXPECT_EQ(error_of([&] { pending.receive(); }).code, ErrorCode::kState);
    expect_usable(engine);
  });
}

TEST(HookTest, ReceivingOutOfOrderIsAStateErrorAndHarmsNothing) {
  on_ranks(2, [](Engine& engine, int) {
    Call first(engine), second(engine);
    first.options = second.options = with_hook();
    Pending one = first.dispatch();
    Pending two = second.dispatch();
    EXPECT_EQ(error_of([&] { two.receive(); }).code, ErrorCode::kState);
    one.receive().wait();
    two.receive().wait();
    EXPECT_EQ(first.slabs.x, second.slabs.x);
    expect_usable(engine);
  });
}

TEST(HookTest, APendingThatIsDroppedStillCounts) {
  on_ranks(1, [](Engine& engine, int) {
    Call first(engine), second(engine), third(engine);
    first.options = second.options = third.options = with_hook();
    first.dispatch();
    second.dispatch();
    EXPECT_EQ(error_of([&] { third.dispatch(); }).code, ErrorCode::kState);
  });
}

TEST(HookTest, ReceivingAfterCloseIsAStateError) {
  on_ranks(1, [](Engine& engine, int) {
    Call call(engine);
    call.options = with_hook();
    Pending pending = call.dispatch();
    try {
      engine.close();
    } catch (const Error& error) {
      EXPECT_EQ(error.code, ErrorCode::kTimeout) << "close() may name the op that was not received";
    }
    EXPECT_EQ(error_of([&] { pending.receive(); }).code, ErrorCode::kState);
  });
}

// ---- masks
// -------------------------------------------------------------------------------------------------------------

TEST(BadMaskTest, RanksOutOfRangeAndOneselfAreRefused) {
  World world{.num_ranks = 2};
  world.budget.masks = true;
  on_ranks(world, [](Engine& engine, int rank) {
    for (const int bad : {-1, 2, 1000, rank}) {
      EXPECT_EQ(error_of([&] { engine.mask(bad); }).code, ErrorCode::kArgument) << bad;
      EXPECT_EQ(error_of([&] { engine.unmask(bad); }).code, ErrorCode::kArgument) << bad;
    }
    std::vector<std::int64_t> wrong(2);
    EXPECT_EQ(error_of([&] { engine.masks(TensorView::dense(wrong.data(), DType::kI64, {2})); }).code,
              ErrorCode::kArgument);
    EXPECT_EQ(error_of([&] { engine.masks(TensorView::dense(wrong.data(), DType::kI32, {3})); }).code,
              ErrorCode::kArgument);
    std::vector<std::int32_t> masks = {9, 9};
    engine.masks(TensorView::dense(masks.data(), DType::kI32, {2}));
    EXPECT_EQ(masks, (std::vector<std::int32_t>{0, 0}));
    engine.barrier();
  });
}

TEST(BadMaskTest, AGroupWithoutMasksSaysSo) {
  on_ranks(2, [](Engine& engine, int rank) {
    EXPECT_EQ(error_of([&] { engine.mask(1 - rank); }).code, ErrorCode::kState);
    EXPECT_EQ(error_of([&] { engine.unmask(1 - rank); }).code, ErrorCode::kState);
    expect_usable(engine);
  });
}

}  // namespace
}  // namespace anyep::test
