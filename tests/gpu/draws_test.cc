// What is drawn for GPUs, on CPU ranks: every drawn call is one that an engine takes, and another backend's results pass the same
// checkers.
#include <anyep/bootstrap.h>
#include <anyep/engine.h>
#include <anyep/plan.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "exchange_draw.h"
#include "low_latency_draw.h"

namespace anyep::test {
namespace {

constexpr std::uint32_t kReplay = 3;

Engine cpu_engine(Bootstrap& bootstrap, const Budget& budget) {
  return Engine::create(budget, Topology::discover(bootstrap), Tuning::from_environment(), bootstrap);
}

/// One rank's pair in host memory.
void play(Engine& engine, const PairDraw& pair, Findings& findings) {
  PairCall call = pair.call;
  call.rank = engine.rank();
  std::vector<std::byte> bytes(PairPlaces(call, nullptr).bytes() + 64, std::byte{0xFF});
  void* base = bytes.data();
  std::size_t room = bytes.size();
  PairMemory m = PairPlaces(call, static_cast<std::byte*>(std::align(64, room - 64, base, room))).memory();
  m.findings = &findings;
  const Contents contents(call, kReplay);
  for (int token = 0; token < call.tokens[call.rank]; ++token) {
    for (int choice = 0; choice < call.top_k; ++choice) {
      const auto at = static_cast<std::size_t>(token * call.top_k + choice);
      const std::int64_t id = contents.id(call.rank, token, choice);
      if (call.wide_ids) {
        static_cast<std::int64_t*>(m.ids)[at] = id;
      } else {
        static_cast<std::int32_t*>(m.ids)[at] = static_cast<std::int32_t>(id);
      }
      m.weights[at] = contents.weight(call.rank, token, choice);
    }
    for (int c = 0; c < call.hidden; c += 4) {
      const Quad x = contents.x(call.rank, token, c);
      std::memcpy(m.x + std::int64_t{token} * call.hidden + c, x.at, sizeof x.at);
    }
  }
  LowLatencyOptions options;
  options.wire = call.wire;
  options.round_scale = call.round_scale;
  options.hook = pair.dispatch_hook;
  Routing routing = routing_view(call, m);
  routing.weights = {};
  engine.low_latency_dispatch(pair.shape(), x_view(call, m), routing, slabs_view(call, m), {}, options)
      .receive()
      .wait();
  std::vector<std::int32_t> origins(PairCall::kMostRows);
  for (int local = 0; local < call.experts_of(call.rank).count; ++local) {
    const int count = list_rows(Alone(), contents, local, origins.data(), [&](int from, int begin, int of_source) {
      check_range(call, m, local, from, begin, of_source);
    });
    for (int row = 0; row < count; ++row) {
      check_row(Alone(), contents, m, local, row, origins[static_cast<std::size_t>(row)]);
    }
  }
  options = {};
  options.hook = pair.combine_hook;
  engine.low_latency_combine(pair.shape(), answers_view(call, m), routing_view(call, m), out_view(call, m), {}, options)
      .receive()
      .wait();
  for (int token = 0; token < call.tokens[call.rank]; ++token) check_token(Alone(), contents, m, token);
}

class Draws : public testing::TestWithParam<int> {};

TEST_P(Draws, PairsAreCallsThatAnEngineTakes) {
  const int ranks = GetParam();
  constexpr int kPairs = 150;
  std::mt19937_64 random(static_cast<std::uint64_t>(ranks));
  DrawLimits limits;
  limits.num_ranks = ranks;
  std::vector<PairDraw> pairs;
  Budget budget;
  for (int i = 0; i < kPairs; ++i) {
    pairs.push_back(draw_pair(random, limits));
    EXPECT_LE(ranks * pairs.back().call.max_tokens, PairCall::kMostRows);
    budget.low_latency_bytes = std::max(budget.low_latency_bytes, low_latency_bytes_for(pairs.back().shape(), ranks));
  }
  EXPECT_LE(budget.low_latency_bytes, limits.most_wire_bytes);
  const LocalGroup group(ranks);
  LocalGroup::run_threads(ranks, [&](int rank) {
    Engine engine = cpu_engine(*group.member(rank), budget);
    Findings findings{};
    for (const PairDraw& pair : pairs) play(engine, pair, findings);
    EXPECT_EQ(findings.wrong, 0u) << "rank " << rank << ": " << text_of(findings);
    EXPECT_GT(findings.rows, 1000u);
    engine.close();
  });
}

/// One rank's exchange in host memory.
void exchange(Engine& engine, const ExchangeDraw& draw, Findings& findings) {
  const Exchange& e = draw.e;
  const ExchangeContents contents(e, kReplay);
  const int tokens = e.tokens[e.rank];
  std::vector<std::int64_t> ids;
  std::vector<std::uint16_t> x, out(static_cast<std::size_t>(tokens) * static_cast<std::size_t>(e.hidden), 0xFFFF);
  for (int token = 0; token < tokens; ++token) {
    for (int choice = 0; choice < e.top_k; ++choice) ids.push_back(contents.id(e.rank, token, choice));
    for (int c = 0; c < e.hidden; ++c) x.push_back(ExchangeContents::x(contents.seed_of(e.rank, token), c));
  }
  Options options;
  options.wait = true;
  Routing routing;
  routing.experts = TensorView::dense(ids.data(), DType::kI64, {tokens, e.top_k});
  const Handle handle = engine.route(Shape{e.num_experts, e.top_k}, routing, {}, options);
  const std::int64_t room = draw.worst_case ? draw.most_rows() : handle.num_rows();
  const OwnedRows received = engine.make_rows(room, Shape{e.num_experts, 0, e.hidden});
  Rows in, rows, sums;
  in.x = TensorView::dense(x.data(), DType::kBF16, {tokens, e.hidden});
  rows.x = received.view().x;
  sums.x = TensorView::dense(out.data(), DType::kBF16, {tokens, e.hidden});
  engine.dispatch(in, handle, rows, {}, options);
  ExchangeMemory m;
  m.rows = rows.x.as<std::uint16_t>();
  m.rows_until = handle.rows_until().as<std::int32_t>();
  m.source = handle.source().as<std::int32_t>();
  m.out = out.data();
  m.findings = &findings;
  std::vector<std::int32_t> list(Exchange::kMostTokens);
  for (int from = 0, row = 0; from < e.num_ranks; ++from) {
    const int count = list_tokens(Alone(), contents, from, list.data());
    for (int i = 0; i < count; ++i, ++row)
      check_row(Alone(), contents, m, from, row, list[static_cast<std::size_t>(i)]);
    find(findings, Field::kCounts, e.salt, from, 0, 0, static_cast<std::uint32_t>(m.rows_until[from]),
         static_cast<std::uint32_t>(row));
  }
  CombineInput back;
  back.x = rows.x;
  engine.combine(back, handle, sums, {}, options);
  for (int token = 0; token < tokens; ++token) check_sum(Alone(), contents, m, token);
}

TEST_P(Draws, ExchangesAreCallsThatAnEngineTakes) {
  const int ranks = GetParam();
  Budget budget;
  budget.rows_bytes = std::int64_t{96} << 20;
  const LocalGroup group(ranks);
  LocalGroup::run_threads(ranks, [&](int rank) {
    Engine engine = cpu_engine(*group.member(rank), budget);
    Findings findings{};
    for (std::uint64_t seed = 1; seed <= 60; ++seed) exchange(engine, draw_exchange(seed, ranks, rank), findings);
    EXPECT_EQ(findings.wrong, 0u) << "rank " << rank << ": " << text_of(findings);
    EXPECT_GT(findings.rows, 1000u);
    engine.close();
  });
}

INSTANTIATE_TEST_SUITE_P(Ranks, Draws, testing::Values(2, 4), testing::PrintToStringParamName());

}  // namespace
}  // namespace anyep::test
