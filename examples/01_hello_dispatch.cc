// One round of expert parallelism, four ranks as threads of this program.
//
// Eight experts live on four ranks, two each: rank r hosts experts 2r and 2r + 1. Every rank brings three tokens; a
// router (here: a formula) has chosen two experts for each. The tokens travel to the ranks of their experts, the
// experts work, and the answers come back, summed.
//
//   c++ -std=c++20 01_hello_dispatch.cc $(pkg-config --cflags --libs anyep) && ./a.out

#include <anyep/engine.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <vector>

namespace {

constexpr int kRanks = 4, kExperts = 8, kTopK = 2;
constexpr std::int64_t kTokens = 3, kHidden = 64;

anyep::TensorView floats(std::vector<float>& values, std::int64_t rows) {
  return anyep::TensorView::dense(values.data(), anyep::DType::kF32, {rows, kHidden});
}

void one_rank(const anyep::LocalGroup& group, int rank) {
  // Ranks meet once, learn who is who, and make an engine each. The budget says how much shared memory it may use.
  const auto bootstrap = group.member(rank);
  const auto topology = anyep::Topology::discover(*bootstrap);
  anyep::Budget budget;
  budget.rows_bytes = 16 << 20;
  anyep::Engine engine = anyep::Engine::create(budget, topology, anyep::Tuning(), *bootstrap);

  // What this rank brings: token t is filled with 10 * rank + t. Its experts are t and t + 4, which live on two ranks.
  std::vector<float> x(kTokens * kHidden);
  std::vector<std::int32_t> experts;
  for (std::int64_t i = 0; i < kTokens * kHidden; ++i) {
    x[static_cast<std::size_t>(i)] = static_cast<float>(10 * rank + i / kHidden);
  }
  for (int token = 0; token < kTokens; ++token) {
    experts.push_back(token);
    experts.push_back(token + 4);
  }

  // route() exchanges counts: afterwards every rank knows how many rows it will get and where each of its tokens goes.
  anyep::Shape shape;
  shape.num_experts = kExperts;
  shape.top_k = kTopK;
  anyep::Routing routing;
  routing.experts = anyep::TensorView::dense(experts.data(), anyep::DType::kI32, {kTokens, kTopK});
  const anyep::Handle handle = engine.route(shape, routing);

  // dispatch() sends each token once to every rank that hosts one of its experts.
  std::vector<float> received(static_cast<std::size_t>(handle.num_rows() * kHidden));
  anyep::Rows tokens, rows;
  tokens.x = floats(x, kTokens);
  rows.x = floats(received, handle.num_rows());
  engine.dispatch(tokens, handle, rows).wait();

  // The experts' work would stand here: matrix products over the rows of each local expert. Ours doubles.
  for (float& value : received) value *= 2;

  // combine() brings the rows back to where their tokens came from and adds them up, ranks in ascending order.
  std::vector<float> answer(x.size());
  anyep::CombineInput worked;
  worked.x = rows.x;
  anyep::Rows out;
  out.x = floats(answer, kTokens);
  engine.combine(worked, handle, out).wait();

  // Two ranks doubled each token, so four times the token is back.
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (answer[i] != 4 * x[i]) throw std::runtime_error("a token came back wrong");
  }
  std::printf("rank %d received %lld rows, and its last token came back as 4 * %g = %g\n", rank,
              static_cast<long long>(handle.num_rows()), x.back(), answer.back());
  engine.close();
}

}  // namespace

int main() {
  const anyep::LocalGroup group(kRanks);
  anyep::LocalGroup::run_threads(kRanks, [&](int rank) { one_rank(group, rank); });
}
