// Bad inputs of high-throughput dispatch and combine: rows 25 to 35, 37, 38 and 42 to 45 of the bad-input table.
#include <anyep/engine.h>
#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "fault/fixtures.h"
#include "support/guarded.h"

namespace anyep::test {
namespace {

using ::testing::HasSubstr;

constexpr std::int64_t kTokens = 3;

// One rank with a routed handle, its inputs and room for the answer: what a good dispatch needs.
struct Call {
  explicit Call(Engine& on)
      : engine(on),
        mine(kTokens, small_shape(), on.rank()),
        handle(on.route(mine.shape, mine.routing())),
        received(handle.num_rows(), mine.shape),
        in(mine.rows()),
        out(received.rows()) {}
  Error dispatch_error() {
    return error_of([&] { engine.dispatch(in, handle, out, {}, waiting()); });
  }

  Engine& engine;
  Tokens mine;
  Handle handle;
  Received received;
  Rows in, out;
  std::vector<double> scratch = std::vector<double>(4096);  ///< memory for views of other types
  TensorView scratch_view(DType dtype, const Extents& shape) { return TensorView::dense(scratch.data(), dtype, shape); }
};

using Change = std::pair<const char*, std::function<void(Call&)>>;

void expect_dispatches_refused(const std::vector<Change>& changes) {
  for (const auto& [what, change] : changes) {
    on_ranks(1, [&, what = what, &change = change](Engine& engine, int) {
      Call call(engine);
      change(call);
      expect_argument(call.dispatch_error(), "dispatch", what);
      expect_usable(engine);
    });
  }
}

TEST(BadDispatchTest, NumbersOfTokensThatDifferAreRefusedNamingBoth) {
  expect_dispatches_refused({{"x of 4",
                              [](Call& c) {
                                c.in.x = c.scratch_view(DType::kBF16, {4, 64});
                              }},
                             {"x of 2", [](Call& c) { c.in.x.shape[0] = 2; }},
                             {"experts of 4",
                              [](Call& c) {
                                c.in.experts = c.scratch_view(DType::kI64, {4, 2});
                              }},
                             {"weights of 2", [](Call& c) { c.in.weights.shape[0] = 2; }},
                             {"weights of 3 choices",
                              [](Call& c) {
                                c.in.weights = c.scratch_view(DType::kF32, {3, 3});
                              }},
                             {"extra of 4", [](Call& c) {
                                c.in.extra = {c.scratch_view(DType::kU8, {4, 16})};
                                c.out.extra = {c.scratch_view(DType::kU8, {3, 16})};
                              }}});
  on_ranks(1, [](Engine& engine, int) {
    Call call(engine);
    call.in.x = call.scratch_view(DType::kBF16, {4, 64});
    const Error error = call.dispatch_error();
    EXPECT_THAT(error.what(), HasSubstr("4"));
    EXPECT_THAT(error.what(), HasSubstr("3"));
  });
}

TEST(BadDispatchTest, HiddenOfZeroOrRowsThatAreNoMultipleOf16BytesAreRefusedWithTheRule) {
  for (const std::int64_t hidden : {0, 1, 4, 12, 63}) {
    on_ranks(1, [&](Engine& engine, int) {
      Call call(engine);
      call.in.x = call.scratch_view(DType::kBF16, {kTokens, hidden});
      call.out.x = TensorView::dense(call.received.x.data(), DType::kBF16, {kTokens, hidden});
      const Error error = call.dispatch_error();
      expect_argument(error, "dispatch", "hidden");
      if (hidden > 0) {
        EXPECT_THAT(error.what(), HasSubstr("16"));
      }
      expect_usable(engine);
    });
  }
}

TEST(BadDispatchTest, ElementTypesThatAreNotRowsAreRefused) {
  for (const DType dtype : {DType::kF64, DType::kI32, DType::kI64, DType::kI16}) {
    on_ranks(1, [&](Engine& engine, int) {
      Call call(engine);
      call.in.x = call.scratch_view(dtype, {kTokens, 64});
      call.out.x = call.scratch_view(dtype, {kTokens, 64});
      call.out.x.data = call.scratch.data() + 2048;
      const Error error = call.dispatch_error();
      expect_argument(error, "dispatch", name_of(dtype));
      EXPECT_THAT(error.what(), HasSubstr(name_of(dtype)));
      expect_usable(engine);
    });
  }
}

void to_fp8(Call& call) {
  call.in.x = call.scratch_view(DType::kF8E4M3, {kTokens, 64});
  call.out.x = TensorView::dense(call.received.x.data(), DType::kF8E4M3, {kTokens, 64});
  call.in.scales = TensorView::dense(call.scratch.data() + 1024, DType::kF32, {kTokens, 1});
  call.out.scales = TensorView::dense(call.scratch.data() + 2048, DType::kF32, {kTokens, 1});
}

TEST(BadDispatchTest, Fp8WithGoodScalesIsTaken) {
  on_ranks(1, [](Engine& engine, int) {
    Call call(engine);
    to_fp8(call);
    EXPECT_NO_THROW(engine.dispatch(call.in, call.handle, call.out, {}, waiting()));
  });
}

TEST(BadDispatchTest, Fp8WithoutScalesOrWithWrongOnesIsRefused) {
  const std::vector<Change> changes = {
      {"no scales", [](Call& c) { c.in.scales = {}; }},
      {"no room for scales", [](Call& c) { c.out.scales = {}; }},
      {"scales of 2 tokens", [](Call& c) { c.in.scales.shape[0] = 2; }},
      {"flat scales", [](Call& c) { c.in.scales = c.scratch_view(DType::kF32, {kTokens}); }},
      {"scales of float64", [](Call& c) { c.in.scales.dtype = DType::kF64; }},
      {"scales of float16", [](Call& c) { c.in.scales.dtype = DType::kF16; }},
      {"room for other columns",
       [](Call& c) {
         c.out.scales = c.scratch_view(DType::kF32, {kTokens, 2});
       }},
      {"room of another type", [](Call& c) { c.out.scales.dtype = DType::kI32; }},
      {"room with gaps", [](Call& c) {
         c.in.scales = c.scratch_view(DType::kF32, {kTokens, 2});
         c.out.scales = {c.scratch.data() + 2048, DType::kF32, {kTokens, 2}, {4, 2}};
       }}};
  for (const auto& [what, change] : changes) {
    on_ranks(1, [&, what = what, &change = change](Engine& engine, int) {
      Call call(engine);
      to_fp8(call);
      change(call);
      expect_argument(call.dispatch_error(), "dispatch", what);
      expect_usable(engine);
    });
  }
}

TEST(BadDispatchTest, OtherBadViewsAreRefused) {
  expect_dispatches_refused(
      {{"x not given", [](Call& c) { c.in.x = {}; }},
       {"x null", [](Call& c) { c.in.x.data = nullptr; }},
       {"x flat", [](Call& c) { c.in.x = c.scratch_view(DType::kBF16, {kTokens * 64}); }},
       {"x with a gap inside rows", [](Call& c) { c.in.x.strides[1] = 2; }},
       {"out of another hidden",
        [](Call& c) {
          c.out.x = c.scratch_view(DType::kBF16, {kTokens, 128});
        }},
       {"out of another type", [](Call& c) { c.out.x.dtype = DType::kF16; }},
       {"out null", [](Call& c) { c.out.x.data = nullptr; }},
       {"out overlaps x", [](Call& c) { c.out.x = c.in.x; }},
       {"out overlaps x in part", [](Call& c) { c.out.x.data = static_cast<std::byte*>(c.in.x.data) + 128; }},
       {"weights of float16", [](Call& c) { c.in.weights.dtype = DType::kF16; }},
       {"weights null", [](Call& c) { c.in.weights.data = nullptr; }},
       {"no room for weights", [](Call& c) { c.out.weights = {}; }},
       {"no room for experts", [](Call& c) { c.out.experts = {}; }},
       {"experts of int16", [](Call& c) { c.in.experts.dtype = DType::kI16; }},
       {"room for experts of float32", [](Call& c) { c.out.experts.dtype = DType::kF32; }},
       {"weights without experts", [](Call& c) { c.in.experts = c.out.experts = {}; }},
       {"an extra without room",
        [](Call& c) {
          c.in.extra = {c.scratch_view(DType::kU8, {kTokens, 16})};
        }},
       {"room for an extra without one",
        [](Call& c) {
          c.out.extra = {c.scratch_view(DType::kU8, {kTokens, 16})};
        }},
       {"too many extras", [](Call& c) {
          c.in.extra.assign(100, c.scratch_view(DType::kU8, {kTokens, 16}));
          c.out.extra = c.in.extra;
        }}});
}

TEST(BadDispatchTest, BadOptionsAreRefused) {
  on_ranks(1, [](Engine& engine, int) {
    Call call(engine);
    using namespace std::chrono_literals;
    for (const std::chrono::nanoseconds bad : {0ns, -1ns, std::chrono::nanoseconds::min()}) {
      Options options = waiting();
      options.timeout = bad;
      expect_argument(error_of([&] { engine.dispatch(call.in, call.handle, call.out, {}, options); }), "dispatch",
                      "options.timeout");
    }
    Options options = waiting();
    options.timeout = std::chrono::nanoseconds::max();
    EXPECT_NO_THROW(engine.dispatch(call.in, call.handle, call.out, {}, options)) << "a limit that is scaled saturates";
    options.num_sms = -1;
    expect_argument(error_of([&] { engine.dispatch(call.in, call.handle, call.out, {}, options); }), "dispatch",
                    "options.num_sms");
    expect_usable(engine);
  });
}

TEST(ZeroTokensTest, AreOrdinaryOnOneRankOrOnAllAndNeedNoMemory) {
  for (const bool everywhere : {true, false}) {
    on_ranks(2, [&](Engine& engine, int rank) {
      const bool none = everywhere || rank == 0;
      const Tokens mine(none ? 0 : kTokens, small_shape(), rank);
      Routing routing = mine.routing();
      Rows in = mine.rows();
      if (none) {
        routing.experts.data = routing.weights.data = nullptr;
        in.x.data = in.experts.data = in.weights.data = nullptr;
      }
      const Handle handle = engine.route(mine.shape, routing);
      EXPECT_EQ(handle.num_tokens(), none ? 0 : kTokens);
      Received received(handle.num_rows(), mine.shape);
      Rows out = received.rows();
      if (handle.num_rows() == 0) out.x.data = out.experts.data = out.weights.data = nullptr;
      engine.dispatch(in, handle, out, {}, waiting());
      CombineInput back;
      back.x = out.x;
      std::vector<std::uint16_t> answer(mine.x.size());
      Rows result;
      result.x = TensorView::dense(none ? nullptr : answer.data(), DType::kBF16, {mine.num_tokens, 64});
      engine.combine(back, handle, result, {}, waiting());
      expect_usable(engine);
    });
  }
}

TEST(OddInputTest, RowsThatAreNotAlignedTo16BytesArrive) {
  on_ranks(2, [](Engine& engine, int rank) {
    Call call(engine);
    std::vector<std::uint16_t> shifted(call.mine.x.size() + 1);
    std::ranges::copy(call.mine.x, shifted.begin() + 1);
    call.in.x.data = shifted.data() + 1;
    std::vector<std::uint16_t> room(call.received.x.size() + 1);
    call.out.x.data = room.data() + 1;
    engine.dispatch(call.in, call.handle, call.out, {}, waiting());
    Call straight(engine);
    engine.dispatch(straight.in, straight.handle, straight.out, {}, waiting());
    EXPECT_TRUE(std::equal(straight.received.x.begin(), straight.received.x.end(), room.begin() + 1)) << rank;
  });
}

TEST(OddInputTest, NanInfinityAndDenormalsPassBitForBit) {
  on_ranks(1, [](Engine& engine, int) {
    Call call(engine);
    const std::uint16_t odd[] = {0x7fc1, 0xffff, 0x7f80, 0xff80, 0x0001, 0x8001, 0x8000, 0x7f81};
    for (std::size_t at = 0; at < call.mine.x.size(); ++at) call.mine.x[at] = odd[at % std::size(odd)];
    const std::uint32_t odd_weights[] = {0x7fc00001, 0xff800000, 0x80000000, 0x00000001, 0xbf800000, 0xffffffff};
    std::memcpy(call.mine.weights.data(), odd_weights, sizeof(odd_weights));
    engine.dispatch(call.in, call.handle, call.out, {}, waiting());
    EXPECT_EQ(call.received.x, call.mine.x);
    EXPECT_EQ(std::memcmp(call.received.weights.data(), odd_weights, sizeof(odd_weights)), 0);
  });
}

TEST(OddInputTest, EveryTokenOfEveryRankMayGoToOneExpert) {
  on_ranks(3, [](Engine& engine, int rank) {
    Tokens mine(kTokens, small_shape(), rank);
    for (std::size_t at = 0; at < mine.ids.size(); ++at) mine.ids[at] = at % 2 == 0 ? 5 : -1;
    const Handle handle = engine.route(mine.shape, mine.routing());
    ASSERT_EQ(handle.num_rows(), rank == 2 ? 3 * kTokens : 0);
    Received received(handle.num_rows(), mine.shape);
    engine.dispatch(mine.rows(), handle, received.rows(), {}, waiting());
    for (std::int64_t row = 0; row < handle.num_rows(); ++row) {
      EXPECT_EQ(received.x[static_cast<std::size_t>(row * 64)],
                payload(static_cast<int>(row / kTokens), row % kTokens, 0));
    }
    expect_usable(engine);
  });
}

TEST(TooFewRowsTest, DropTheSurplusWriteNothingPastTheEndAndSayHowManyWereNeeded) {
  for (const std::int64_t room : {0, 1, 4}) {
    on_ranks(2, [&](Engine& engine, int rank) {
      const Tokens mine(kTokens, small_shape(), rank);
      const Handle handle = engine.route(mine.shape, mine.routing());
      const std::int64_t need = handle.num_rows();
      // Ids {0 1} {1 2} {2 3} from both ranks: 6 rows at rank 0, 2 at rank 1, which has room unless it is none.
      Guarded x(static_cast<std::size_t>(room) * 128);
      Received side(room, mine.shape);
      Rows out = side.rows();
      out.x = TensorView::dense(x.data(), DType::kBF16, {room, 64});
      std::optional<Error> error;
      try {
        engine.dispatch(mine.rows(), handle, out).wait();
      } catch (const Error& thrown) {
        error = thrown;
      }
      EXPECT_EQ(error.has_value(), need > room) << "rank " << rank << ", room " << room;
      if (error) {
        EXPECT_EQ(error->code, ErrorCode::kCapacity) << error->what();
        EXPECT_EQ(error->need, static_cast<std::uint64_t>(need));
        EXPECT_EQ(error->have, static_cast<std::uint64_t>(room));
      }
      EXPECT_EQ(x.damage(), "");
      expect_usable(engine);
    });
  }
}

TEST(HandleUseTest, AnotherNumberOfTokensThanTheHandlesIsRefused) {
  on_ranks(1, [](Engine& engine, int) {
    Call call(engine);
    const Tokens more(kTokens + 1, small_shape());
    call.in = more.rows();
    expect_argument(call.dispatch_error(), "dispatch", "one token more");
    expect_usable(engine);
  });
}

TEST(HandleUseTest, AHandleOfAnotherEngineServesAlsoWhenThatOneIsClosed) {
  std::vector<Handle> handles(2);
  on_ranks(2, [&](Engine& engine, int rank) {
    const Tokens mine(kTokens, small_shape(), rank);
    handles[static_cast<std::size_t>(rank)] = engine.route(mine.shape, mine.routing());
    EXPECT_GE(handles[static_cast<std::size_t>(rank)].num_rows(), 1);
  });
  on_ranks(2, [&](Engine& engine, int rank) {
    const Tokens mine(kTokens, small_shape(), rank);
    const Handle& handle = handles[static_cast<std::size_t>(rank)];
    Received received(handle.num_rows(), mine.shape);
    engine.dispatch(mine.rows(), handle, received.rows(), {}, waiting());
    EXPECT_EQ(received.x[0], payload(0, rank == 0 ? 0 : 2, 0));
  });
}

TEST(HandleUseTest, AnEmptyHandleIsAStateError) {
  on_ranks(1, [](Engine& engine, int) {
    Call call(engine);
    EXPECT_EQ(error_of([&] { engine.dispatch(call.in, Handle(), call.out, {}, waiting()); }).code, ErrorCode::kState);
    CombineInput in;
    in.x = call.out.x;
    Rows out;
    out.x = call.in.x;
    EXPECT_EQ(error_of([&] { engine.combine(in, Handle(), out, {}, waiting()); }).code, ErrorCode::kState);
    expect_usable(engine);
  });
}

TEST(HandleUseTest, AStrayButWellFormedHandleNeverTouchesOtherMemory) {
  // Rank 0 claims rows that rank 1 does not expect, and the other way round.
  on_ranks(2, [](Engine& engine, int rank) {
    const Tokens mine(2, small_shape(), rank);
    const std::vector<std::int32_t> rows_until = {rank == 0 ? 1 : 2, 3};
    const std::vector<std::int32_t> place =
        rank == 0 ? std::vector<std::int32_t>{0, 0, -1, 1} : std::vector<std::int32_t>{-1, -1, 1, 2};
    const std::vector<std::int32_t> source = {0, 1, 1};
    const std::vector<std::int32_t> tokens = {2, 2};
    HandleArrays arrays;
    arrays.rows_until = TensorView::dense(rows_until.data(), DType::kI32, {2});
    arrays.place = TensorView::dense(place.data(), DType::kI32, {2, 2});
    arrays.source = TensorView::dense(source.data(), DType::kI32, {3});
    arrays.tokens = TensorView::dense(tokens.data(), DType::kI32, {2});
    Guarded x(3 * 128);
    try {
      const Handle handle = Handle::adopt(2, rank, arrays);
      Rows in;
      in.x = mine.x_view();
      Rows out;
      out.x = TensorView::dense(x.data(), DType::kBF16, {3, 64});
      engine.dispatch(in, handle, out, {}, waiting());
    } catch (const Error& error) {
      EXPECT_NE(error.code, ErrorCode::kInternal) << error.what();
    }
    EXPECT_EQ(x.damage(), "");
  });
}

// ---- combine
// -----------------------------------------------------------------------------------------------------------

struct BadCombineTest : ::testing::Test {
  struct Inputs {
    CombineInput in;
    Rows out;
    std::vector<std::uint16_t> answer = std::vector<std::uint16_t>(4096);
    std::vector<double> scratch = std::vector<double>(4096);
    TensorView view(DType dtype, const Extents& shape) { return TensorView::dense(scratch.data(), dtype, shape); }
  };
  static void expect_refused(const char* what, const std::function<void(Inputs&)>& change) {
    on_ranks(1, [&](Engine& engine, int) {
      Call call(engine);
      engine.dispatch(call.in, call.handle, call.out, {}, waiting());
      Inputs inputs;
      inputs.in.x = call.out.x;
      inputs.in.weights = call.out.weights;
      std::vector<float> weights(64);
      inputs.out.x = TensorView::dense(inputs.answer.data(), DType::kBF16, {kTokens, 64});
      inputs.out.weights = TensorView::dense(weights.data(), DType::kF32, {kTokens, 2});
      EXPECT_NO_THROW(engine.combine(inputs.in, call.handle, inputs.out, {}, waiting())) << "the good call";
      change(inputs);
      expect_argument(error_of([&] { engine.combine(inputs.in, call.handle, inputs.out, {}, waiting()); }), "combine",
                      what);
      expect_usable(engine);
    });
  }
};

// Rows beyond the handle's are legal: a dispatch into more rows than needed leaves them.
TEST_F(BadCombineTest, FewerRowsThanTheHandlesAreRefused) {
  expect_refused("a row less", [](Inputs& i) { i.in.x.shape[0] = kTokens - 1; });
  expect_refused("weights of a row less", [](Inputs& i) { i.in.weights.shape[0] = kTokens - 1; });
}

TEST_F(BadCombineTest, BadInputsAreRefused) {
  expect_refused("x not given", [](Inputs& i) { i.in.x = {}; });
  expect_refused("x null", [](Inputs& i) { i.in.x.data = nullptr; });
  expect_refused("x of float8", [](Inputs& i) { i.in.x.dtype = i.out.x.dtype = DType::kF8E4M3; });
  expect_refused("x of float64", [](Inputs& i) { i.in.x = i.view(DType::kF64, {kTokens, 64}); });
  expect_refused("x of 12 elements", [](Inputs& i) {
    i.in.x = i.view(DType::kBF16, {kTokens, 12});
    i.out.x = TensorView::dense(i.answer.data(), DType::kBF16, {kTokens, 12});
  });
  expect_refused("weights of float16", [](Inputs& i) { i.in.weights.dtype = i.out.weights.dtype = DType::kF16; });
  expect_refused("bias of another type", [](Inputs& i) { i.in.bias[0] = i.view(DType::kF32, {kTokens, 64}); });
  expect_refused("bias of a token less", [](Inputs& i) { i.in.bias[1] = i.view(DType::kBF16, {kTokens - 1, 64}); });
}

TEST_F(BadCombineTest, BadOutputsAreRefused) {
  expect_refused("out not given", [](Inputs& i) { i.out.x = {}; });
  expect_refused("out null", [](Inputs& i) { i.out.x.data = nullptr; });
  expect_refused("out of a token less", [](Inputs& i) { i.out.x.shape[0] = kTokens - 1; });
  expect_refused("out of a token more", [](Inputs& i) { i.out.x = i.view(DType::kBF16, {kTokens + 1, 64}); });
  expect_refused("out of another hidden", [](Inputs& i) { i.out.x = i.view(DType::kBF16, {kTokens, 128}); });
  expect_refused("out of another type", [](Inputs& i) { i.out.x = i.view(DType::kF32, {kTokens, 64}); });
  expect_refused("out overlaps x", [](Inputs& i) { i.out.x = i.in.x; });
  expect_refused("out overlaps x in part",
                 [](Inputs& i) { i.out.x.data = static_cast<std::byte*>(i.in.x.data) + 128; });
  expect_refused("no room for weights", [](Inputs& i) { i.out.weights = {}; });
  expect_refused("room for other weights", [](Inputs& i) { i.out.weights.shape[1] = 1; });
}

}  // namespace
}  // namespace anyep::test
