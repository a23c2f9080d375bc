// The life of an engine: rows 29, 55, 56 and 57 of the bad-input table.
#include <anyep/engine.h>
#include <gmock/gmock.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "fault/fixtures.h"

namespace anyep::test {
namespace {

using namespace std::chrono_literals;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Every public call of a closed or failed engine.
std::vector<std::pair<const char*, std::function<void(Engine&)>>> all_calls() {
  static const Shape shape = small_shape();
  static Tokens mine(3, shape);
  static Slabs slabs(shape, 1, 0);
  static std::vector<std::int32_t> words(16);
  return {{"route", [](Engine& e) { e.route(shape, mine.routing()); }},
          {"layout", [](Engine& e) { e.layout(shape, mine.routing()); }},
          {"make_rows", [](Engine& e) { e.make_rows(3, shape); }},
          {"barrier", [](Engine& e) { e.barrier(); }},
          {"low_latency_dispatch",
           [](Engine& e) { e.low_latency_dispatch(shape, mine.x_view(), mine.routing(), slabs.view()); }},
          {"low_latency_combine",
           [](Engine& e) { e.low_latency_combine(shape, slabs.view(), mine.routing(), mine.x_view()); }},
          {"combine_buffer", [](Engine& e) { e.combine_buffer(shape); }},
          {"masks", [](Engine& e) { e.masks(TensorView::dense(words.data(), DType::kI32, {1})); }},
          {"memory", [](Engine& e) { e.memory(Mode::kHighThroughput, 0, 16); }}};
}

TEST(EngineLifeTest, EveryCallAfterCloseIsAStateError) {
  on_ranks(1, [](Engine& engine, int) {
    engine.close();
    for (const auto& [what, call] : all_calls()) {
      EXPECT_EQ(error_of([&, &run = call] { run(engine); }).code, ErrorCode::kState) << what;
    }
  });
}

TEST(EngineLifeTest, ClosingTwiceOrFromAnotherThreadIsLegal) {
  on_ranks(2, [](Engine& engine, int) {
    expect_usable(engine);
    std::thread([&] { EXPECT_NO_THROW(engine.close()); }).join();
    EXPECT_NO_THROW(engine.close());
  });
}

TEST(EngineLifeTest, AnEngineMayBeMovedAndDestroyedWithoutClose) {
  const LocalGroup group(2);
  LocalGroup::run_threads(2, [&](int rank) {
    const std::unique_ptr<Bootstrap> member = group.member(rank);
    const World world{.num_ranks = 2};
    Engine first = Engine::create(world.budget, Topology::discover(*member), world.tuning, *member);
    Engine second = std::move(first);
    expect_usable(second);
    second.barrier();
  });
}

TEST(EngineLifeTest, AForkedChildGetsAStateErrorAndHarmsTheParentNot) {
  on_ranks(1, [](Engine& engine, int) {
    const pid_t child = ::fork();
    if (child == 0) {
      int wrong = 0;
      for (const auto& [what, call] : all_calls()) {
        try {
          call(engine);
          ++wrong;
        } catch (const Error& error) {
          wrong += error.code == ErrorCode::kState ? 0 : 1;
        }
      }
      ::_exit(wrong);
    }
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status));
    EXPECT_EQ(WEXITSTATUS(status), 0) << "calls that were no kState in the child";
    expect_usable(engine);
  });
}

TEST(EngineLifeTest, ASecondCallerGetsAStateErrorWhileTheFirstIsNotHarmed) {
  std::atomic<bool> refused{false};
  on_ranks(2, [&](Engine& engine, int rank) {
    if (rank == 1) {
      while (!refused) std::this_thread::sleep_for(1ms);
      engine.barrier();
    } else {
      // The probe below may be inside at the moment when this one comes: then it is the second caller, and tries again.
      std::thread waiting_in_barrier([&] {
        while (true) {
          try {
            return engine.barrier();
          } catch (const Error& error) {
            if (error.code != ErrorCode::kState) throw;
          }
        }
      });
      const auto give_up = std::chrono::steady_clock::now() + 10s;
      while (!refused && std::chrono::steady_clock::now() < give_up) {
        try {
          engine.check();
          const Tokens mine(3, small_shape());
          Shape bad = small_shape();
          bad.top_k = 0;  // refused as an argument while nobody is inside, hence without an effect on the group
          engine.layout(bad, mine.routing());
        } catch (const Error& error) {
          if (error.code == ErrorCode::kState) refused = true;
        }
        std::this_thread::sleep_for(1ms);
      }
      EXPECT_TRUE(refused) << "layout() during another thread's barrier";
      refused = true;
      waiting_in_barrier.join();
    }
    expect_usable(engine);
  });
}

TEST(EngineLifeTest, AFailedEngineRepeatsItsFirstErrorAndCanBeReplaced) {
  std::atomic<bool> peer_is_done{false};
  const LocalGroup group(2);
  LocalGroup::run_threads(2, [&](int rank) {
    const std::unique_ptr<Bootstrap> member = group.member(rank);
    const World world{.num_ranks = 2};
    const Topology topology = Topology::discover(*member);
    {
      Engine engine = Engine::create(world.budget, topology, world.tuning, *member);
      expect_usable(engine);
      constexpr const char* kWhy = "the learning rate is not a number";
      if (rank == 0) {
        while (!peer_is_done) std::this_thread::sleep_for(1ms);  // else it may still be in the op before
        engine.abandon(kWhy);
      } else {
        peer_is_done = true;
        const Error error = error_of([&] { engine.barrier(); });
        EXPECT_EQ(error.code, ErrorCode::kAborted) << error.what();
        EXPECT_THAT(error.peers, ElementsAre(0));
        EXPECT_THAT(error.what(), HasSubstr(kWhy));
        EXPECT_EQ(error.op, "barrier");
      }
      for (int repeat = 0; repeat < 2; ++repeat) {
        for (const Error& error : {error_of([&] { engine.check(); }), error_of([&] { engine.barrier(); })}) {
          EXPECT_EQ(error.code, ErrorCode::kAborted) << error.what();
          EXPECT_THAT(error.what(), HasSubstr(kWhy)) << "the first error is repeated";
        }
      }
      try {
        engine.close();
      } catch (const Error&) {
      }
    }
    Engine next = Engine::create(world.budget, topology, world.tuning, *member);
    expect_usable(next);
    next.close();
  });
}

TEST(EngineLifeTest, AnotherOperationIsAMismatchOnAllRanksSoon) {
  const auto start = std::chrono::steady_clock::now();
  on_ranks(3, [](Engine& engine, int rank) {
    const Tokens mine(3, small_shape(), rank);
    const Error error = error_of([&] {
      if (rank == 1) {
        engine.barrier();
      } else {
        engine.route(small_shape(), mine.routing(), {}, waiting()).num_rows();
      }
    });
    EXPECT_EQ(error.code, ErrorCode::kMismatch) << "rank " << rank << ": " << error.what();
    // Whoever meets the difference first tells the others, so `peers` is one of the two sides.
    EXPECT_FALSE(error.peers.empty()) << error.what();
    EXPECT_THAT(error.what(), HasSubstr("route"));
    EXPECT_THAT(error.what(), HasSubstr("barrier"));
  });
  EXPECT_LT(std::chrono::steady_clock::now() - start, 10s);
}

TEST(EngineLifeTest, ShapesOfARouteThatDifferAreAMismatchOnAllRanks) {
  for (const bool experts : {true, false}) {
    on_ranks(3, [&](Engine& engine, int rank) {
      Shape shape = small_shape();
      if (rank == 1 && experts) shape.num_experts = 4;
      if (rank == 1 && !experts) shape.top_k = 1;
      const Tokens mine(3, shape, rank);
      const Error error = error_of([&] { engine.route(shape, mine.routing(), {}, waiting()).num_rows(); });
      EXPECT_EQ(error.code, ErrorCode::kMismatch) << "rank " << rank << ": " << error.what();
    });
  }
}

TEST(EngineLifeTest, RowsOfAnotherHiddenOrTypeAreAMismatchOnAllRanks) {
  for (const bool other_type : {true, false}) {
    on_ranks(2, [&](Engine& engine, int rank) {
      const Tokens mine(3, small_shape(), rank);
      const Handle handle = engine.route(mine.shape, mine.routing());
      Received received(handle.num_rows(), mine.shape);
      Rows in = mine.rows();
      Rows out = received.rows();
      if (rank == 1 && other_type) in.x.dtype = out.x.dtype = DType::kF16;
      if (rank == 1 && !other_type) {
        in.x = TensorView::dense(mine.x.data(), DType::kBF16, {3, 32});
        out.x = TensorView::dense(received.x.data(), DType::kBF16, {handle.num_rows(), 32});
      }
      const Error error = error_of([&] { engine.dispatch(in, handle, out, {}, waiting()); });
      EXPECT_EQ(error.code, ErrorCode::kMismatch) << "rank " << rank << ": " << error.what();
    });
  }
}

TEST(EngineLifeTest, CloseNamesWhoDidNotComeAtItsLimit) {
  std::atomic<bool> closed{false};
  const LocalGroup group(2);
  LocalGroup::run_threads(2, [&](int rank) {
    const std::unique_ptr<Bootstrap> member = group.member(rank);
    World world{.num_ranks = 2};
    world.tuning.close_timeout = 300ms;
    Engine engine = Engine::create(world.budget, Topology::discover(*member), world.tuning, *member);
    expect_usable(engine);
    if (rank == 0) {
      const Error error = error_of([&] { engine.close(); });
      EXPECT_EQ(error.code, ErrorCode::kTimeout) << error.what();
      EXPECT_EQ(error.op, "close");
      EXPECT_THAT(error.peers, ElementsAre(1));
      EXPECT_NO_THROW(engine.close()) << "the local release is complete either way";
      closed = true;
    } else {
      while (!closed) std::this_thread::sleep_for(1ms);
    }
  });
}

TEST(EngineLifeTest, AskingForMoreRowsThanTheWindowHoldsSaysNeedAndHave) {
  on_ranks(1, [](Engine& engine, int) {
    const Error error = error_of([&] { engine.make_rows(std::int64_t{1} << 24, small_shape()); });
    EXPECT_EQ(error.code, ErrorCode::kCapacity) << error.what();
    EXPECT_GT(error.need, error.have);
    for (const std::int64_t bad : {std::int64_t{-1}, std::numeric_limits<std::int64_t>::max()}) {
      const ErrorCode code = error_of([&] { engine.make_rows(bad, small_shape()); }).code;
      EXPECT_TRUE(code == ErrorCode::kArgument || code == ErrorCode::kCapacity) << bad;
    }
    expect_usable(engine);
  });
}

TEST(EngineLifeTest, MemoryShowsTheWholeBudgetAndNotAByteMore) {
  World world{.num_ranks = 2};
  world.budget.rows_bytes = (3 << 20) + 17;  // neither pages nor rings divide these
  world.budget.low_latency_bytes = (1 << 20) + 33;
  on_ranks(world, [&](Engine& engine, int) {
    for (const Mode mode : {Mode::kHighThroughput, Mode::kLowLatency}) {
      const auto bytes = static_cast<std::size_t>(mode == Mode::kHighThroughput ? world.budget.rows_bytes
                                                                                : world.budget.low_latency_bytes);
      const TensorView all = engine.memory(mode, 0, bytes);
      EXPECT_EQ(all.num_elements(), static_cast<std::int64_t>(bytes));
      std::memset(all.data, 0xFF, bytes);
      EXPECT_EQ(engine.memory(mode, bytes - 1, 1).as<std::byte>(), all.as<std::byte>() + bytes - 1);
      EXPECT_EQ(error_of([&] { engine.memory(mode, 0, bytes + 1); }).code, ErrorCode::kCapacity);
      EXPECT_EQ(error_of([&] { engine.memory(mode, bytes, 1); }).code, ErrorCode::kCapacity);
    }
    engine.barrier();  // nothing is in flight while anybody writes
    expect_usable(engine);
  });
}

TEST(EngineLifeTest, AViewOfMemoryOutsideTheEnginesIsRefused) {
  on_ranks(1, [](Engine& engine, int) {
    for (const Mode mode : {Mode::kHighThroughput, Mode::kLowLatency}) {
      EXPECT_TRUE(engine.memory(mode, 0, 64).given());
      for (const std::size_t offset : {std::size_t{1} << 40, ~std::size_t{0}}) {
        const ErrorCode code = error_of([&] { engine.memory(mode, offset, 64); }).code;
        EXPECT_TRUE(code == ErrorCode::kArgument || code == ErrorCode::kCapacity);
      }
      const ErrorCode code = error_of([&] { engine.memory(mode, 64, ~std::size_t{0} - 32); }).code;
      EXPECT_TRUE(code == ErrorCode::kArgument || code == ErrorCode::kCapacity);
    }
  });
}

}  // namespace
}  // namespace anyep::test
