#include "fault/task.h"

#include <anyep/plan.h>
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <optional>
#include <stdexcept>
#include <utility>

#include "core/routing.h"

namespace anyep::test {
namespace {

constexpr std::int64_t kMostTokens = 96;
constexpr int kDistance = 3;  // between a token's two experts

std::uint16_t bits_of(float value) {
  return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16);
}

template <class T>
std::uint64_t digest(std::uint64_t seed, const std::vector<T>& values) {
  for (const T value : values) {
    seed = (seed ^ static_cast<std::uint64_t>(value)) * 0x100000001B3ull;
  }
  return seed;
}

}  // namespace

void must(bool holds, const char* what, long long got, long long want) {
  if (!holds) throw std::runtime_error(fmt::format("{}: {} instead of {}", what, got, want));
}

Shape Task::shape() {
  return {.num_experts = 8, .top_k = 2, .hidden = 64, .max_tokens = kMostTokens};
}

Budget Task::budget(int num_ranks) {
  Budget budget;
  budget.rows_bytes = std::max(512, 192 * num_ranks) << 10;  // several turns per op
  budget.low_latency_bytes = low_latency_bytes_for(shape(), num_ranks);
  budget.max_experts = 16;
  return budget;
}

Tuning Task::tuning() {
  Tuning tuning = Tuning::from_environment();
  tuning.timeout = std::chrono::seconds(2);
  tuning.startup_timeout = std::chrono::seconds(20);
  tuning.close_timeout = std::chrono::seconds(2);
  return tuning;
}

Task::Task(int num_ranks, int rank) : num_ranks_(num_ranks), rank_(rank), shape_(shape()) {
  const auto tokens = static_cast<std::size_t>(tokens_of(rank));
  const auto hidden = static_cast<std::size_t>(shape_.hidden);
  ids_.resize(tokens * 2);
  weights_.resize(tokens * 2);
  x_.resize(tokens * hidden);
  out_.resize(tokens * hidden);
  const auto local = static_cast<std::size_t>(core::expert_block(shape_.num_experts, num_ranks, rank).count);
  const auto slots = static_cast<std::size_t>(num_ranks * kMostTokens);
  slab_.resize(local * slots * hidden);
  counts_.resize(local);
  source_.resize(local * slots);
  range_.resize(local * static_cast<std::size_t>(num_ranks));
  waited_.resize(static_cast<std::size_t>(num_ranks));
}

std::int64_t Task::tokens_of(int rank) const {
  return kMostTokens - 5 * rank;
}
int Task::expert(int rank, std::int64_t token, int choice, int salt) const {
  return static_cast<int>((token * 5 + rank + salt + choice * kDistance) % shape_.num_experts);
}
int Task::rank_of(int expert) const {
  return core::rank_of_expert(shape_.num_experts, num_ranks_, expert);
}
float Task::value(int rank, std::int64_t token, std::int64_t element, int salt) const {
  return static_cast<float>(1 + (rank * 7 + token * 3 + element + std::int64_t{salt} * 5) % 31);
}

void Task::fill(int salt) {
  const std::int64_t tokens = tokens_of(rank_);
  for (std::int64_t token = 0; token < tokens; ++token) {
    for (int choice = 0; choice < 2; ++choice) {
      ids_[static_cast<std::size_t>(token * 2 + choice)] = expert(rank_, token, choice, salt);
      weights_[static_cast<std::size_t>(token * 2 + choice)] = static_cast<float>(choice + 1);
    }
    for (std::int64_t element = 0; element < shape_.hidden; ++element) {
      x_[static_cast<std::size_t>(token * shape_.hidden + element)] = bits_of(value(rank_, token, element, salt));
    }
  }
  out_.assign(out_.size(), 0xffff);
  slab_.assign(slab_.size(), 0xffff);
}

std::uint64_t Task::high_throughput(Engine& engine, int salt) {
  fill(salt);
  const std::int64_t tokens = tokens_of(rank_);
  Routing routing;
  routing.experts = TensorView::dense(ids_.data(), DType::kI64, {tokens, 2});
  Options wait;
  wait.wait = true;
  const Handle handle = engine.route(shape_, routing);
  const std::int64_t num_rows = handle.num_rows();
  Rows in, rows;
  in.x = TensorView::dense(x_.data(), DType::kBF16, {tokens, shape_.hidden});
  in.experts = routing.experts;
  in.weights = TensorView::dense(weights_.data(), DType::kF32, {tokens, 2});
  rows_.assign(static_cast<std::size_t>(num_rows * shape_.hidden), 0xffff);
  row_experts_.assign(static_cast<std::size_t>(num_rows * 2), -7);
  row_weights_.assign(static_cast<std::size_t>(num_rows * 2), -7);
  OwnedRows owned;
  if (salt % 2 != 0) {
    Shape of = shape_;
    of.top_k = 0;
    owned = engine.make_rows(num_rows, of);
    rows.x = owned.view().x;
  } else {
    rows.x = TensorView::dense(rows_.data(), DType::kBF16, {num_rows, shape_.hidden});
  }
  rows.experts = TensorView::dense(row_experts_.data(), DType::kI64, {num_rows, 2});
  rows.weights = TensorView::dense(row_weights_.data(), DType::kF32, {num_rows, 2});
  engine.dispatch(in, handle, rows, {}, wait);
  check_rows(handle, rows, salt);

  CombineInput back;
  back.x = rows.x;
  Rows out;
  out.x = TensorView::dense(out_.data(), DType::kBF16, {tokens, shape_.hidden});
  engine.combine(back, handle, out, {}, wait);
  check_sums(handle, salt);
  return digest(digest(digest(1, out_), row_experts_), rows_);
}

void Task::check_rows(const Handle& handle, const Rows& rows, int salt) const {
  const auto* const until = handle.rows_until().as<const std::int32_t>();
  const auto* const source = handle.source().as<const std::int32_t>();
  const auto* const x = rows.x.as<const std::uint16_t>();
  const core::ExpertBlock block = core::expert_block(shape_.num_experts, num_ranks_, rank_);
  std::int64_t row = 0;
  for (int from = 0; from < num_ranks_; ++from) {
    for (std::int64_t token = 0; token < tokens_of(from); ++token) {
      const bool here =
          rank_of(expert(from, token, 0, salt)) == rank_ || rank_of(expert(from, token, 1, salt)) == rank_;
      if (!here) continue;
      must(row < until[from] && source[row] == token, "dispatch: token of a row", source[row], token);
      for (int choice = 0; choice < 2; ++choice) {
        const int global = expert(from, token, choice, salt);
        const std::int64_t want = rank_of(global) == rank_ ? global - block.first : -1;
        const auto at = static_cast<std::size_t>(row * 2 + choice);
        must(row_experts_[at] == want, "dispatch: expert of a row", row_experts_[at], want);
        must(row_weights_[at] == (want < 0 ? 0.0f : static_cast<float>(choice + 1)), "dispatch: weight of a row");
      }
      for (std::int64_t element = 0; element < shape_.hidden; ++element) {
        const std::uint16_t want = bits_of(value(from, token, element, salt));
        const std::uint16_t got = x[row * shape_.hidden + element];
        must(got == want, "dispatch: element of a row", got, want);
      }
      ++row;
    }
  }
  must(row == handle.num_rows(), "dispatch: rows", handle.num_rows(), row);
}

void Task::check_sums(const Handle&, int salt) const {
  for (std::int64_t token = 0; token < tokens_of(rank_); ++token) {
    const bool one = rank_of(expert(rank_, token, 0, salt)) == rank_of(expert(rank_, token, 1, salt));
    for (std::int64_t element = 0; element < shape_.hidden; ++element) {
      const std::uint16_t want = bits_of(value(rank_, token, element, salt) * (one ? 1.0f : 2.0f));
      const std::uint16_t got = out_[static_cast<std::size_t>(token * shape_.hidden + element)];
      must(got == want, "combine: element of a sum", got, want);
    }
  }
}

std::uint64_t Task::low_latency(Engine& engine, int salt) {
  fill(salt);
  missing_ = 0;
  const std::int64_t tokens = tokens_of(rank_);
  const core::ExpertBlock block = core::expert_block(shape_.num_experts, num_ranks_, rank_);
  const std::int64_t slots = num_ranks_ * kMostTokens;
  Routing routing;
  routing.experts = TensorView::dense(ids_.data(), DType::kI64, {tokens, 2});
  routing.weights = TensorView::dense(weights_.data(), DType::kF32, {tokens, 2});
  ExpertSlabs slabs;
  slabs.x = TensorView::dense(slab_.data(), DType::kBF16, {block.count, slots, shape_.hidden});
  slabs.counts = TensorView::dense(counts_.data(), DType::kI32, {block.count});
  slabs.source = TensorView::dense(source_.data(), DType::kI32, {block.count, slots});
  slabs.range = TensorView::dense(range_.data(), DType::kI64, {block.count, num_ranks_});
  LowLatencyOptions options;
  options.hook = salt % 2 != 0;
  options.wait = !options.hook;
  options.waited = TensorView::dense(waited_.data(), DType::kI64, {num_ranks_});
  const TensorView x = TensorView::dense(x_.data(), DType::kBF16, {tokens, shape_.hidden});
  engine.low_latency_dispatch(shape_, x, routing, slabs, {}, options).receive().wait();
  check_slabs(salt);
  const TensorView out = TensorView::dense(out_.data(), DType::kBF16, {tokens, shape_.hidden});
  engine.low_latency_combine(shape_, slabs, routing, out, {}, options).receive().wait();
  check_weighted(salt);
  return digest(digest(digest(2, out_), counts_), range_);
}

void Task::check_slabs(int salt) {
  const core::ExpertBlock block = core::expert_block(shape_.num_experts, num_ranks_, rank_);
  const std::int64_t slots = num_ranks_ * kMostTokens;
  for (int from = 0; from < num_ranks_; ++from) {
    std::int64_t sent = 0, came = 0;
    for (int local = 0; local < block.count; ++local) {
      const std::int64_t packed = range_[static_cast<std::size_t>(local * num_ranks_ + from)];
      std::int64_t row = packed >> 32;
      const std::int64_t end = row + (packed & 0xFFFF'FFFF);
      came += end - row;
      for (std::int64_t token = 0; token < tokens_of(from); ++token) {
        const int global = block.first + local;
        if (expert(from, token, 0, salt) != global && expert(from, token, 1, salt) != global) continue;
        ++sent;
        if (row == end) continue;  // a missing rank: none of its tokens are here, see below
        const auto at = static_cast<std::size_t>(local * slots + row);
        must(source_[at] == token, "low latency: token of a row", source_[at], token);
        for (std::int64_t element = 0; element < shape_.hidden; ++element) {
          const std::uint16_t want = bits_of(value(from, token, element, salt));
          const std::uint16_t got =
              slab_[at * static_cast<std::size_t>(shape_.hidden) + static_cast<std::size_t>(element)];
          must(got == want, "low latency: element of a row", got, want);
        }
        ++row;
      }
    }
    must(came == sent || came == 0, "low latency: rows of one source", came, sent);
    if (came != sent) missing_ |= std::uint64_t{1} << from;
  }
}

/// A token's sum lacks the experts of ranks that are missing, whole ranks only.
void Task::check_weighted(int salt) {
  for (std::int64_t token = 0; token < tokens_of(rank_); ++token) {
    const int hosts[2] = {rank_of(expert(rank_, token, 0, salt)), rank_of(expert(rank_, token, 1, salt))};
    for (std::int64_t element = 0; element < shape_.hidden; ++element) {
      const float x = value(rank_, token, element, salt);
      const std::uint16_t got = out_[static_cast<std::size_t>(token * shape_.hidden + element)];
      if (got == bits_of(3 * x)) continue;
      // What is left when one host, or both, did not take part.
      std::uint64_t lost = 0;
      if (hosts[0] != hosts[1] && got == bits_of(2 * x)) lost = std::uint64_t{1} << hosts[0];
      if (hosts[0] != hosts[1] && got == bits_of(x)) lost = std::uint64_t{1} << hosts[1];
      if (got == bits_of(0.0f)) lost = std::uint64_t{1} << hosts[0] | std::uint64_t{1} << hosts[1];
      must(lost != 0, "low latency: element of a sum", got, bits_of(3 * x));
      missing_ |= lost;
    }
  }
}

std::uint64_t Task::round(Engine& engine, int salt) {
  const std::uint64_t first = high_throughput(engine, salt);
  const std::uint64_t second = low_latency(engine, salt);
  engine.barrier();
  must(missing_ == 0, "low latency: ranks missing", static_cast<long long>(missing_), 0);
  return first * 31 + second;
}

Error Task::rounds_until_error(Engine& engine) {
  for (int salt = 0;; ++salt) {
    try {
      round(engine, salt);
    } catch (const Error& error) {
      return error;
    }
  }
}

}  // namespace anyep::test
