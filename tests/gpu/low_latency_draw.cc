#include "low_latency_draw.h"

#include <anyep/plan.h>

#include <algorithm>

namespace anyep::test {
namespace {

class Draw {
 public:
  explicit Draw(std::mt19937_64& random) : random_(random) {}
  int below(int limit) { return static_cast<int>(random_() % static_cast<unsigned>(limit)); }
  bool chance(int percent) { return below(100) < percent; }
  int one_of(std::initializer_list<int> values) { return *(values.begin() + below(static_cast<int>(values.size()))); }

 private:
  std::mt19937_64& random_;
};

std::int64_t columns_of(const PairCall& call) {
  if (call.wire == Wire::kBF16) return 0;
  return call.wire == Wire::kFP8 ? core::num_fp8_scales(call.hidden) : core::num_packed_scales(call.hidden);
}

/// Fewer tokens until the pair fits, or has one: experts and hidden stay as drawn.
void fit(PairDraw& pair, const DrawLimits& limits) {
  PairCall& call = pair.call;
  const auto too_large = [&] {
    return std::int64_t{call.num_experts + call.num_ranks} * call.max_tokens * call.hidden > limits.most_elements ||
           low_latency_bytes_for(pair.shape(), call.num_ranks) > limits.most_wire_bytes;
  };
  while (call.max_tokens > 1 && too_large()) call.max_tokens = (call.max_tokens + 1) / 2;
}

}  // namespace

Shape PairDraw::shape() const {
  Shape shape;
  shape.num_experts = call.num_experts;
  shape.top_k = call.top_k;
  shape.hidden = call.hidden;
  shape.max_tokens = call.max_tokens;
  return shape;
}

PairDraw draw_pair(std::mt19937_64& random, const DrawLimits& limits) {
  Draw draw(random);
  PairDraw pair;
  PairCall& call = pair.call;
  call.num_ranks = limits.num_ranks;
  call.num_experts = draw.one_of({limits.num_ranks, 1, 3, 8, 17, 32, 64, 130, 256});
  call.top_k = 1 + draw.below(std::min(call.num_experts, draw.chance(15) ? PairCall::kMostTopK : 8));
  constexpr Wire kWires[] = {Wire::kBF16, Wire::kFP8, Wire::kUE8M0};
  call.wire = kWires[draw.below(3)];
  call.hidden = draw.one_of({16, 128, 128, 512, 512, 640, 1024, 1536, 2048, 2064, 2880, 4096, 7168});
  if (call.wire == Wire::kBF16 && draw.chance(10)) call.hidden = 8 * (1 + draw.below(40));
  call.round_scale = call.wire == Wire::kUE8M0 || draw.chance(30);
  call.wide_ids = draw.chance(50);
  call.max_tokens = 1 + draw.below(std::min(limits.most_tokens, draw.one_of({4, 16, 16, 64, 64, 128, 256})));
  fit(pair, limits);
  const int kind = draw.below(4), same = draw.below(call.max_tokens + 1);
  for (int rank = 0; rank < call.num_ranks; ++rank) {
    call.tokens[rank] = kind == 0 ? call.max_tokens : kind == 1 ? same : draw.below(call.max_tokens + 1);
    if (draw.chance(10)) call.tokens[rank] = 0;
  }
  call.percent_unused = draw.one_of({0, 0, 5, 30, 100});
  call.percent_repeated = draw.one_of({0, 0, 20});
  call.percent_late = 3;
  call.salt = static_cast<std::uint32_t>(random());
  pair.dispatch_hook = draw.chance(30);
  pair.combine_hook = draw.chance(30);
  pair.dispatch_sms = draw.one_of({0, 0, 0, 0, 1, 3, 16});
  pair.combine_sms = draw.one_of({0, 0, 0, 0, 1, 3, 16});
  return pair;
}

PairPlaces::PairPlaces(const PairCall& call, std::byte* base) : base_(base) {
  const std::int64_t tokens = call.tokens[call.rank], experts = call.experts_of(call.rank).count;
  const std::int64_t rows = experts * call.rows_per_expert(), hidden = call.hidden;
  memory_.x = reinterpret_cast<std::uint16_t*>(take(tokens * hidden * 2));
  memory_.ids = take(tokens * call.top_k * 8);
  memory_.weights = reinterpret_cast<float*>(take(tokens * call.top_k * 4));
  memory_.slab = take(rows * hidden * (call.wire == Wire::kBF16 ? 2 : 1));
  memory_.scales = reinterpret_cast<std::uint32_t*>(take(rows * columns_of(call) * 4));
  memory_.counts = reinterpret_cast<std::int32_t*>(take(experts * 4));
  memory_.source = reinterpret_cast<std::int32_t*>(take(rows * 4));
  memory_.range = reinterpret_cast<std::int64_t*>(take(experts * call.num_ranks * 8));
  memory_.answers = reinterpret_cast<std::uint16_t*>(take(rows * hidden * 2));
  memory_.out = reinterpret_cast<std::uint16_t*>(take(tokens * hidden * 2));
}

std::byte* PairPlaces::take(std::int64_t bytes) {
  constexpr std::size_t kAlignment = 256;
  std::byte* const at = base_ + used_;
  used_ += (static_cast<std::size_t>(bytes) + kAlignment) / kAlignment * kAlignment;
  return at;
}

TensorView x_view(const PairCall& call, const PairMemory& memory) {
  return TensorView::dense(memory.x, DType::kBF16, {call.tokens[call.rank], call.hidden});
}

TensorView out_view(const PairCall& call, const PairMemory& memory) {
  return TensorView::dense(memory.out, DType::kBF16, {call.tokens[call.rank], call.hidden});
}

Routing routing_view(const PairCall& call, const PairMemory& memory) {
  Routing routing;
  const DType type = call.wide_ids ? DType::kI64 : DType::kI32;
  routing.experts = TensorView::dense(memory.ids, type, {call.tokens[call.rank], call.top_k});
  routing.weights = TensorView::dense(memory.weights, DType::kF32, {call.tokens[call.rank], call.top_k});
  return routing;
}

ExpertSlabs slabs_view(const PairCall& call, const PairMemory& memory) {
  const std::int64_t experts = call.experts_of(call.rank).count, rows = call.rows_per_expert();
  ExpertSlabs slabs;
  slabs.x = TensorView::dense(memory.slab, call.wire == Wire::kBF16 ? DType::kBF16 : DType::kF8E4M3,
                              {experts, rows, call.hidden});
  if (const std::int64_t columns = columns_of(call); columns > 0) {
    slabs.scales =
        TensorView::dense(memory.scales, call.wire == Wire::kFP8 ? DType::kF32 : DType::kI32, {experts, rows, columns});
    slabs.scales.strides = {columns * rows, 1, rows};
  }
  slabs.counts = TensorView::dense(memory.counts, DType::kI32, {experts});
  slabs.source = TensorView::dense(memory.source, DType::kI32, {experts, rows});
  slabs.range = TensorView::dense(memory.range, DType::kI64, {experts, call.num_ranks});
  return slabs;
}

ExpertSlabs answers_view(const PairCall& call, const PairMemory& memory) {
  ExpertSlabs answers = slabs_view(call, memory);
  answers.scales = {};
  answers.counts = {};
  answers.x = TensorView::dense(memory.answers, DType::kBF16,
                                {call.experts_of(call.rank).count, call.rows_per_expert(), call.hidden});
  return answers;
}

}  // namespace anyep::test
