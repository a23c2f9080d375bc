#include "fault/fixtures.h"

#include <anyep/bootstrap.h>
#include <anyep/plan.h>
#include <anyep/topology.h>

#include <algorithm>
#include <memory>
#include <string>

#include "core/routing.h"

namespace anyep::test {

Tuning test_tuning() {
  Tuning tuning = Tuning::from_environment();
  tuning.timeout = std::chrono::seconds(20);
  tuning.startup_timeout = std::chrono::seconds(20);
  return tuning;
}

Budget test_budget(int num_ranks) {
  Budget budget;
  budget.rows_bytes = std::int64_t{16} << 20;
  budget.low_latency_bytes = 4 * low_latency_bytes_for(small_shape(), num_ranks);
  budget.max_experts = 64;
  return budget;
}

std::uint16_t payload(int rank, std::int64_t token, std::int64_t element) {
  return static_cast<std::uint16_t>((rank + 1) * 4096 + token * 64 + element);
}

Tokens::Tokens(std::int64_t tokens, const Shape& of, int rank, std::int64_t first) : shape(of), num_tokens(tokens) {
  for (std::int64_t token = 0; token < num_tokens; ++token) {
    for (int choice = 0; choice < shape.top_k; ++choice) {
      ids.push_back((first + token + choice) % shape.num_experts);
      weights.push_back(static_cast<float>(choice + 1));
    }
    for (std::int64_t element = 0; element < shape.hidden; ++element) x.push_back(payload(rank, token, element));
  }
}

TensorView Tokens::experts() const {
  return TensorView::dense(ids.data(), DType::kI64, {num_tokens, shape.top_k});
}
TensorView Tokens::weights_view() const {
  return TensorView::dense(weights.data(), DType::kF32, {num_tokens, shape.top_k});
}
TensorView Tokens::x_view() const {
  return TensorView::dense(x.data(), DType::kBF16, {num_tokens, shape.hidden});
}

Routing Tokens::routing() const {
  Routing routing;
  routing.experts = experts();
  routing.weights = weights_view();
  return routing;
}

Rows Tokens::rows() const {
  Rows rows;
  rows.x = x_view();
  rows.experts = experts();
  rows.weights = weights_view();
  return rows;
}

Received::Received(std::int64_t rows, const Shape& of)
    : shape(of),
      num_rows(rows),
      x(static_cast<std::size_t>(rows * of.hidden), 0xffff),
      experts(static_cast<std::size_t>(rows * of.top_k), -7),
      weights(static_cast<std::size_t>(rows * of.top_k), -7) {}

Rows Received::rows() {
  Rows rows;
  rows.x = TensorView::dense(x.data(), DType::kBF16, {num_rows, shape.hidden});
  rows.experts = TensorView::dense(experts.data(), DType::kI64, {num_rows, shape.top_k});
  rows.weights = TensorView::dense(weights.data(), DType::kF32, {num_rows, shape.top_k});
  return rows;
}

Slabs::Slabs(const Shape& of, int ranks, int rank)
    : shape(of),
      num_ranks(ranks),
      local_experts(core::expert_block(of.num_experts, ranks, rank).count),
      slots(ranks * of.max_tokens),
      x(static_cast<std::size_t>(local_experts * slots * of.hidden)),
      counts(static_cast<std::size_t>(local_experts)),
      source(static_cast<std::size_t>(local_experts * slots)),
      range(static_cast<std::size_t>(local_experts * ranks)) {}

ExpertSlabs Slabs::view() {
  ExpertSlabs slabs;
  slabs.x = TensorView::dense(x.data(), DType::kBF16, {local_experts, slots, shape.hidden});
  slabs.counts = TensorView::dense(counts.data(), DType::kI32, {local_experts});
  slabs.source = TensorView::dense(source.data(), DType::kI32, {local_experts, slots});
  slabs.range = TensorView::dense(range.data(), DType::kI64, {local_experts, num_ranks});
  return slabs;
}

void on_ranks(const World& world, const std::function<void(Engine& engine, int rank)>& body) {
  const LocalGroup group(world.num_ranks);
  LocalGroup::run_threads(world.num_ranks, [&](int rank) {
    const std::unique_ptr<Bootstrap> member = group.member(rank);
    Engine engine = Engine::create(world.budget, Topology::discover(*member), world.tuning, *member);
    body(engine, rank);
    try {
      engine.check();
      engine.close();
    } catch (const Error& error) {
      if (error.op == "close" && error.code == ErrorCode::kTimeout) throw;
      return;  // it failed, or a peer's did, as the body wanted
    }
  });
}

void expect_usable(Engine& engine) {
  const Shape shape = small_shape();
  constexpr std::int64_t kTokens = 5;
  const Tokens mine(kTokens, shape, engine.rank());
  const Handle handle = engine.route(shape, mine.routing());

  // Every rank brings the same choices, so what arrives is the same list of tokens from each.
  std::vector<std::int64_t> expected;
  for (std::int64_t token = 0; token < kTokens; ++token) {
    for (int choice = 0; choice < shape.top_k; ++choice) {
      const auto expert = static_cast<int>(mine.ids[static_cast<std::size_t>(token * shape.top_k + choice)]);
      if (core::rank_of_expert(shape.num_experts, engine.num_ranks(), expert) != engine.rank()) continue;
      expected.push_back(token);
      break;
    }
  }
  const auto per_source = static_cast<std::int64_t>(expected.size());
  ASSERT_EQ(handle.num_rows(), per_source * engine.num_ranks());
  Received received(handle.num_rows(), shape);
  engine.dispatch(mine.rows(), handle, received.rows(), {}, waiting());
  for (std::int64_t row = 0; row < handle.num_rows(); ++row) {
    const auto source = static_cast<int>(row / per_source);
    const std::int64_t token = expected[static_cast<std::size_t>(row % per_source)];
    for (const std::int64_t element : {std::int64_t{0}, shape.hidden - 1}) {
      ASSERT_EQ(received.x[static_cast<std::size_t>(row * shape.hidden + element)], payload(source, token, element))
          << "row " << row;
    }
  }
}

void expect_argument(const Error& error, const char* op, const char* context) {
  EXPECT_EQ(error.code, ErrorCode::kArgument) << context << ": " << error.what();
  EXPECT_EQ(error.op, op) << context;
  EXPECT_FALSE(error.argument.empty()) << context << ": " << error.what();
  EXPECT_FALSE(error.allowed.empty()) << context << ": " << error.what();
  EXPECT_NE(std::string(error.what()).find(error.got), std::string::npos) << context;
}

Error error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return error;
  }
  ADD_FAILURE() << "no anyep::Error was thrown";
  return {ErrorCode::kInternal, ""};
}

}  // namespace anyep::test
