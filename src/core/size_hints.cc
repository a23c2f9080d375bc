// V1's size hints, to the byte: callers add, compare and allocate them. Formulas: specification 4.2, 4.3, 4.5.
#include <anyep/config.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <limits>
#include <span>
#include <string>
#include <string_view>

#include "core/check.h"

namespace anyep::v1 {
namespace {

// An integer that remembers whether 64 bits held everything it was computed from.
class Checked {
 public:
  Checked(std::int64_t value) : value_(value) {}  // implicit: the formulas below mix it with numbers

  friend Checked operator+(Checked a, Checked b) {
    Checked sum(0);
    sum.overflowed_ = __builtin_add_overflow(a.value_, b.value_, &sum.value_) || a.overflowed_ || b.overflowed_;
    return sum;
  }
  friend Checked operator*(Checked a, Checked b) {
    Checked product(0);
    product.overflowed_ = __builtin_mul_overflow(a.value_, b.value_, &product.value_) || a.overflowed_ || b.overflowed_;
    return product;
  }
  friend Checked larger(Checked a, Checked b) {
    Checked result(std::max(a.value_, b.value_));
    result.overflowed_ = a.overflowed_ || b.overflowed_;
    return result;
  }
  friend Checked divided(Checked a, std::int64_t divisor) {
    a.value_ /= divisor;
    return a;
  }
  friend Checked rounded_up(Checked a, std::int64_t multiple) {
    return divided(a + (multiple - 1), multiple) * multiple;
  }

  /// @throws Error kArgument with the call's arguments, `got` as the caller gave them.
  std::int64_t value_or_throw(std::string_view op, std::string_view arguments, const std::string& got) const {
    if (overflowed_) {
      core::throw_argument(op, arguments, got, "what needs less than 2^63 bytes",
                           "The shape is too large for any memory");
    }
    return value_;
  }

 private:
  std::int64_t value_;
  bool overflowed_ = false;
};

void check_range(std::string_view op, std::string_view argument, std::int64_t value, std::int64_t least) {
  if (value < least) core::throw_argument(op, argument, fmt::format("{}", value), fmt::format(">= {}", least));
}

void check_hint(std::string_view op, std::int64_t hidden_bytes, int num_ranks, int topk_idx_bytes) {
  check_range(op, "hidden_bytes", hidden_bytes, 0);
  check_range(op, "num_ranks", num_ranks, 1);
  if (topk_idx_bytes != 4 && topk_idx_bytes != 8) {
    core::throw_argument(op, "topk_idx_bytes", fmt::format("{}", topk_idx_bytes), "4, 8");
  }
}

struct Entry {
  int num_ranks;
  std::array<int, 4> numbers;  // nvl_send, nvl_recv, rdma_send, rdma_recv as V1 lists them
};

// Specification 4.2; kept because callers read the numbers back.
constexpr Entry kDispatch[] = {{2, {24, 256, 6, 128}},    {4, {6, 256, 6, 128}},     {8, {6, 256, 6, 128}},
                               {16, {36, 288, 20, 128}},  {24, {32, 288, 8, 128}},   {32, {32, 288, 8, 128}},
                               {48, {32, 288, 8, 128}},   {64, {32, 288, 8, 128}},   {96, {20, 480, 12, 128}},
                               {128, {20, 560, 12, 128}}, {144, {32, 720, 12, 128}}, {160, {28, 720, 12, 128}}};
constexpr Entry kCombine[] = {{2, {10, 256, 6, 128}},  {4, {9, 256, 6, 128}},   {8, {4, 256, 6, 128}},
                              {16, {4, 288, 12, 128}}, {24, {1, 288, 8, 128}},  {32, {1, 288, 8, 128}},
                              {48, {1, 288, 8, 128}},  {64, {1, 288, 8, 128}},  {96, {1, 480, 8, 128}},
                              {128, {1, 560, 8, 128}}, {144, {2, 720, 8, 128}}, {160, {2, 720, 8, 128}}};

Config default_config(std::string_view op, std::span<const Entry> table, int num_ranks, int num_sms) {
  check_range(op, "num_ranks", num_ranks, 1);
  const Entry* entry = &table.front();
  for (const Entry& candidate : table) {
    if (candidate.num_ranks <= num_ranks) entry = &candidate;
  }
  const auto& [nvl_send, nvl_recv, rdma_send, rdma_recv] = entry->numbers;
  return make_config(num_sms, nvl_send, nvl_recv, rdma_send, rdma_recv);
}

// Bytes of one slot of a receive queue: row, source metadata, then ids, weights and scales at V1's widest (128 each).
Checked slot_bytes(std::int64_t hidden_bytes, int topk_idx_bytes) {
  return Checked(hidden_bytes) + (8 + 128 * std::int64_t{topk_idx_bytes} + 128 * 4 + 128 * 4);
}

std::string text(const Config& config, std::int64_t hidden_bytes, int num_ranks) {
  return fmt::format("{{{}, {}, {}}}, {}, {}", config.num_sms, config.nvl_recv, config.rdma_recv, hidden_bytes,
                     num_ranks);
}
constexpr std::string_view kHintArguments = "config {num_sms, nvl_recv, rdma_recv}, hidden_bytes, num_ranks";

constexpr int kRanksPerNode = 8;  // of V1's formulas
constexpr std::int64_t kGranule = 128;

}  // namespace

Config make_config(int num_sms, int nvl_send, int nvl_recv, int rdma_send, int rdma_recv) {
  constexpr std::string_view kOp = "make_config";
  check_range(kOp, "num_sms", num_sms, 0);
  check_range(kOp, "nvl_send", nvl_send, 1);
  if (nvl_recv <= nvl_send) {
    core::throw_argument(kOp, "nvl_recv", fmt::format("{}", nvl_recv), fmt::format("above nvl_send = {}", nvl_send));
  }
  check_range(kOp, "rdma_send", rdma_send, 1);
  check_range(kOp, "rdma_recv", rdma_recv, 1);
  const std::int64_t rounded = (std::int64_t{rdma_recv} + rdma_send - 1) / rdma_send * rdma_send;
  if (rdma_send > rounded / 2 || rounded > std::numeric_limits<int>::max()) {
    core::throw_argument(
        kOp, "rdma_recv", fmt::format("{}", rdma_recv),
        fmt::format("at least 2 * rdma_send = {} when rounded up to a multiple of rdma_send, below 2^31",
                    2 * std::int64_t{rdma_send}));
  }
  return {num_sms, nvl_send, nvl_recv, rdma_send, static_cast<int>(rounded)};
}

Config dispatch_config(int num_ranks, int num_sms) {
  return default_config("dispatch_config", kDispatch, num_ranks, num_sms);
}

Config combine_config(int num_ranks, int num_sms) {
  return default_config("combine_config", kCombine, num_ranks, num_sms);
}

std::int64_t nvl_size_hint(const Config& given, std::int64_t hidden_bytes, int num_ranks, int topk_idx_bytes) {
  constexpr std::string_view kOp = "nvl_size_hint";
  check_hint(kOp, hidden_bytes, num_ranks, topk_idx_bytes);
  const Config config = make_config(given.num_sms, given.nvl_send, given.nvl_recv, given.rdma_send, given.rdma_recv);
  const std::int64_t num_nodes = (std::int64_t{num_ranks} + kRanksPerNode - 1) / kRanksPerNode;
  const Checked pairs = Checked(config.num_sms / 2) * std::min(num_ranks, kRanksPerNode);
  const Checked bytes =
      pairs * (2 * num_nodes + 3) * 4 + pairs * config.nvl_recv * slot_bytes(hidden_bytes, topk_idx_bytes);
  return rounded_up(bytes, kGranule).value_or_throw(kOp, kHintArguments, text(config, hidden_bytes, num_ranks));
}

std::int64_t rdma_size_hint(const Config& given, std::int64_t hidden_bytes, int num_ranks, int topk_idx_bytes) {
  constexpr std::string_view kOp = "rdma_size_hint";
  check_hint(kOp, hidden_bytes, num_ranks, topk_idx_bytes);
  const Config config = make_config(given.num_sms, given.nvl_send, given.nvl_recv, given.rdma_send, given.rdma_recv);
  if (num_ranks <= kRanksPerNode) return 0;
  const std::int64_t num_nodes = (std::int64_t{num_ranks} + kRanksPerNode - 1) / kRanksPerNode;
  const Checked pairs = Checked(config.num_sms / 2) * num_nodes;
  const Checked bytes =
      pairs * ((8 * 2 + 2) * 2 * 4) + pairs * 2 * config.rdma_recv * (slot_bytes(hidden_bytes, topk_idx_bytes) + 16);
  return rounded_up(bytes, kGranule).value_or_throw(kOp, kHintArguments, text(config, hidden_bytes, num_ranks));
}

std::int64_t low_latency_size_hint(std::int64_t max_tokens, std::int64_t hidden, int num_ranks,
                                   std::int64_t num_experts) {
  constexpr std::string_view kOp = "low_latency_size_hint";
  check_range(kOp, "max_tokens", max_tokens, 0);
  check_range(kOp, "hidden", hidden, 1);
  check_range(kOp, "num_ranks", num_ranks, 1);
  check_range(kOp, "num_experts", num_experts, 1);
  const Checked tokens(max_tokens);
  const Checked elements(hidden);
  const Checked experts(num_experts);
  const Checked scale_bytes = divided(elements + 127, 128) * 4;
  const Checked dispatch_bytes = larger(elements * 2, elements + scale_bytes) + 16;
  const Checked combine_bytes = scale_bytes + elements * 2;
  const Checked send = rounded_up(larger(tokens * dispatch_bytes, experts * tokens * combine_bytes), 16);
  const Checked receive = rounded_up(experts * tokens * larger(dispatch_bytes, combine_bytes), 16);
  const Checked signals = rounded_up(experts * 4, kGranule);
  const Checked total = (send + receive + signals) * 2;
  const Checked hint = divided(total + kGranule, kGranule) * kGranule;  // V1 always adds, also to a multiple
  return hint.value_or_throw(kOp, "max_tokens, hidden, num_experts",
                             fmt::format("{}, {}, {}", max_tokens, hidden, num_experts));
}

}  // namespace anyep::v1
