// Small groups of ranks as threads, small tensors, and the proof that an engine still works after a refusal.
#pragma once

#include <anyep/engine.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace anyep::test {

/// 3 tokens or so, 64 elements: small enough to look at.
inline Shape small_shape() {
  return {.num_experts = 6, .top_k = 2, .hidden = 64, .max_tokens = 8};
}

/// From the environment, so that sanitizer builds keep their time scale; 20 s per op, so that a hang is short.
Tuning test_tuning();
Budget test_budget(int num_ranks);

/// What one rank brings: token t chooses the experts first + t, first + t + 1, ... modulo num_experts.
struct Tokens {
  Tokens(std::int64_t num_tokens, const Shape& shape, int rank = 0, std::int64_t first = 0);

  TensorView experts() const;
  TensorView weights_view() const;
  TensorView x_view() const;
  Routing routing() const;
  Rows rows() const;

  Shape shape;
  std::int64_t num_tokens;
  std::vector<std::int64_t> ids;
  std::vector<float> weights;
  std::vector<std::uint16_t> x;  ///< bits of bfloat16, a function of rank, token and element
};

/// Bits that `rank` sends as element `element` of token `token`.
std::uint16_t payload(int rank, std::int64_t token, std::int64_t element);

/// Room for the rows that one rank receives.
struct Received {
  Received(std::int64_t num_rows, const Shape& shape);
  Rows rows();

  Shape shape;
  std::int64_t num_rows;
  std::vector<std::uint16_t> x;
  std::vector<std::int64_t> experts;
  std::vector<float> weights;
};

/// The slabs of one rank for bfloat16.
struct Slabs {
  Slabs(const Shape& shape, int num_ranks, int rank);
  ExpertSlabs view();

  Shape shape;
  int num_ranks;
  std::int64_t local_experts, slots;
  std::vector<std::uint16_t> x;
  std::vector<std::int32_t> counts, source;
  std::vector<std::int64_t> range;
};

struct World {
  int num_ranks = 1;
  Tuning tuning = test_tuning();
  Budget budget = test_budget(num_ranks);
};

/// Runs `body` on every rank of a new group of threads, each with an engine. What a rank throws reaches the test.
void on_ranks(const World& world, const std::function<void(Engine& engine, int rank)>& body);
inline void on_ranks(int num_ranks, const std::function<void(Engine& engine, int rank)>& body) {
  on_ranks(World{.num_ranks = num_ranks}, body);
}

/// Waits for the op.
inline Options waiting() {
  Options options;
  options.wait = true;
  return options;
}

/// Routes and dispatches on every rank and checks every received row. Collective.
void expect_usable(Engine& engine);

/// An error whose fields for kArgument are filled.
void expect_argument(const Error& error, const char* op, const char* context);

/// Runs `body` and returns its Error; the test fails when it throws none.
Error error_of(const std::function<void()>& body);

}  // namespace anyep::test
